"""The published formulas by paper, written once, in float64: steps, log-probabilities and losses.

A step goes from a latent x and a model output m to the mean and the standard deviation of x'; sigmas and alphas are
float64 tensors, and k is the step.
"""

import math

import torch

# steps: mean and standard deviation of x'


def ddpo_step(x, m, alphas, timestep, num_steps, prediction_type="epsilon", eta=1.0):
    """kvablack/ddpo-pytorch: DDIM (arXiv 2010.02502, equations 12 and 16), where the timestep before 0 counts as 0."""
    at, ap = alphas[timestep], alphas[max(timestep - len(alphas) // num_steps, 0)]
    variance = (1 - ap) / (1 - at) * (1 - at / ap)
    if prediction_type == "epsilon":
        x0, epsilon = (x - (1 - at).sqrt() * m) / at.sqrt(), m
    elif prediction_type == "sample":
        x0, epsilon = m, (x - at.sqrt() * m) / (1 - at).sqrt()
    else:
        x0, epsilon = at.sqrt() * x - (1 - at).sqrt() * m, at.sqrt() * m + (1 - at).sqrt() * x
    std = eta * variance.sqrt()
    return ap.sqrt() * x0 + (1 - ap - std**2).sqrt() * epsilon, std


def dance_step(x, v, sigmas, k, eta=0.3):
    """XueZeyue/DanceGRPO, FLUX: the ODE's step, and half eta^2 of the score that the predicted sample gives."""
    sigma, change = sigmas[k], sigmas[k + 1] - sigmas[k]
    score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    return x + change * v - eta**2 / 2 * score * change, eta * (-change).sqrt()


def flow_grpo_step(x, v, sigmas, k, noise_level=0.7):
    """yifan123/flow_grpo: at sigma = 1 the noise level takes the second sigma in its denominator."""
    sigma, change, g = sigmas[k], sigmas[k + 1] - sigmas[k], flow_grpo_noise(sigmas, k, noise_level)
    mean = x * (1 + g**2 / (2 * sigma) * change) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * change
    return mean, g * (-change).sqrt()


def flow_grpo_noise(sigmas, k, noise_level=0.7):
    """What flow_grpo calls std_dev_t."""
    denominator = 1 - (sigmas[1] if sigmas[k] == 1 else sigmas[k])
    return noise_level * (sigmas[k] / denominator).sqrt()


def cps_step(x, v, sigmas, k, noise_level=0.8):
    """FlowCPS as flow_grpo has it: predicted sample and noise, mixed again at the next sigma."""
    sigma, after = sigmas[k], sigmas[k + 1]
    std = after * math.sin(noise_level * math.pi / 2)
    return (1 - after) * (x - sigma * v) + (after**2 - std**2).sqrt() * (x + (1 - sigma) * v), std


# log-probabilities, means over a row's elements


def mean_of_rows(values):
    return values.flatten(1).mean(dim=1)


def gaussian(x_next, mean, std):
    return mean_of_rows(-((x_next - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi)))


def gaussian_without_constants(x_next, mean, std):
    """DanceGRPO's: the constants stand in a statement of their own and are not added."""
    return mean_of_rows(-((x_next - mean) ** 2) / (2 * std**2))


def squared_distance(x_next, mean, std):
    return mean_of_rows(-((x_next - mean) ** 2))


# losses, means over rows


def pcpo_loss(log_ratio, advantages, clip_range):
    """The log-hinge of PCPO (arXiv 2509.25774), and the rows whose gradient is cut off."""
    loss = (clip_range * advantages.abs() - advantages * log_ratio).clamp(min=0)
    return loss, loss == 0


def ppo_loss(log_ratio, advantages, clip_range):
    """PPO's clipped ratio (arXiv 1707.06347), which is DDPO's and GRPO's, and the rows whose gradient is cut off."""
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def guard_log_ratio(log_ratio, shift, std):
    """GRPO-Guard's (arXiv 2510.22319): without the shift of the mean, |mean_new - mean_old|^2 / (2 std^2), and times
    std. Its loss is PPO's divided by the step's interval."""
    return (log_ratio + shift) * std


LOSSES = {"pcpo": pcpo_loss, "ppo": ppo_loss}
