"""Parity with the published trainers: their steps, log-probabilities and losses, written from the formulas in float64.

A trainer's step goes from a latent x and a model output m to the mean and the standard deviation of x'. What is held
against it reads the table's `rows`, which are float32: a coefficient is off by half a unit, U, relative to itself, and
that is the only rounding in a tolerance here. With d the error of z in standard deviations,

    x' is off by U (|a x| + |b m| + |s z|),    d = U (|a x| + |b m|) / s + U |z|

and everything else follows from d and from the roundings of the row's other numbers.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from published import (
    LOSSES,
    cps_step,
    dance_step,
    ddpo_step,
    flow_grpo_noise,
    flow_grpo_step,
    gaussian,
    gaussian_without_constants,
    guard_log_ratio,
    mean_of_rows,
    squared_distance,
)
from torch import Tensor

from pcpo_fast import (
    Reference,
    StepTable,
    StoredStates,
    policy_loss,
    sampler_step,
    shifted_sigmas,
    step_log_prob,
)
from pcpo_fast.advantages import Advantages
from pcpo_fast.config import LossSettings

diffusers = pytest.importorskip("diffusers")

U = torch.finfo(torch.float32).eps / 2
SHAPE = (8, 4, 8, 8)
PER_ROW = (-1, 1, 1, 1)


@dataclasses.dataclass
class Trainer:
    """A published trainer on its schedule, and our table for it."""

    table: StepTable
    step: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor] = gaussian
    clip_range: float = 1e-4

    def offset(self, k):
        """What our log-probability has and theirs leaves out."""
        constants = -self.table.std[k].log() - math.log(math.sqrt(2 * math.pi))
        return constants if self.log_prob is gaussian_without_constants else 0.0


def sd_scheduler(**settings):
    """Stable Diffusion 1.5's."""
    defaults = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return diffusers.DDIMScheduler(**defaults | {"set_alpha_to_one": False, "steps_offset": 1} | settings)


def ddpo(num_steps=50, prediction_type="epsilon", **settings):
    scheduler = sd_scheduler(prediction_type=prediction_type, **settings)
    scheduler.set_timesteps(num_steps)
    alphas, timesteps = scheduler.alphas_cumprod.double(), scheduler.timesteps.tolist()
    return Trainer(
        StepTable.from_scheduler(scheduler, num_steps, credit="native"),
        lambda x, m, k: ddpo_step(x, m, alphas, timesteps[k], num_steps, prediction_type),
    )


def dance_sigmas():
    s = torch.linspace(1, 0, 17, dtype=torch.float64)
    return 3 * s / (1 + 2 * s)


def dance():
    sigmas = dance_sigmas()
    table = StepTable.flow(shifted_sigmas(16, 3.0), sde="dance", noise_level=0.3, credit="native")
    return Trainer(table, lambda x, v, k: dance_step(x, v, sigmas, k), gaussian_without_constants)


def sd3_scheduler(num_steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler


def flow_grpo(num_steps=10):
    scheduler = sd3_scheduler(num_steps)
    sigmas = scheduler.sigmas.double()
    table = StepTable.from_scheduler(scheduler, num_steps, sde="flow", noise_level=0.7, credit="native")
    return Trainer(table, lambda x, v, k: flow_grpo_step(x, v, sigmas, k))


def cps(num_steps=10):
    scheduler = sd3_scheduler(num_steps)
    sigmas = scheduler.sigmas.double()
    table = StepTable.from_scheduler(
        scheduler, num_steps, sde="cps", noise_level=0.8, normalized=False, credit="native"
    )
    return Trainer(table, lambda x, v, k: cps_step(x, v, sigmas, k), squared_distance, clip_range=1e-5)


TRAINERS = {
    "ddpo": ddpo,
    "ddpo, v": lambda: ddpo(20, "v_prediction"),
    "ddpo, sample": lambda: ddpo(20, "sample"),
    "dance": dance,
    "flow-grpo": flow_grpo,
    "cps": cps,
}
FLOWS = ("dance", "flow-grpo", "cps")


@pytest.fixture(params=TRAINERS)
def trainer(request):
    return TRAINERS[request.param]()


def stochastic_steps(trainer):
    return trainer.table.trainable.nonzero().squeeze(1).tolist()


def draw(*shape):
    """x, m, z."""
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(shape or SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))


def error_of_mean(table, k, x, m):
    return U * ((table.sample_coef[k] * x).abs() + (table.output_coef[k] * m).abs())


def error_of_noise(table, k, x, m, z):
    """d."""
    return error_of_mean(table, k, x, m) / table.std[k] + U * z.abs()


def error_of_log_prob(table, k, z, d):
    """Of offset - k z^2 / 2, whose two numbers are rounded too."""
    scale = table.log_prob_scale[k]
    squares = scale * ((z.abs() + d / 2) * d + U * z**2 / 2)
    return mean_of_rows(squares) + U * table.log_prob_offset[k].abs() + 1e-14


def test_the_steps_that_draw_noise(trainer):
    """DDPO trains every step, from the last timestep to the first; a flow's last step, from t to 0, is the ODE's."""
    count, steps = len(trainer.table), stochastic_steps(trainer)
    assert steps == list(range(count if trainer.table.timesteps.dtype == torch.int64 else count - 1))
    if trainer.table.timesteps.dtype == torch.int64:
        assert trainer.table.timesteps[-1] == 1
    else:
        # the first is at t = 1
        assert trainer.table.timesteps[0] == 1000


def test_steps_and_log_probs(trainer):
    x, m, z = draw()
    table = trainer.table
    for k in stochastic_steps(trainer):
        mean, std = trainer.step(x, m, k)
        ours = sampler_step(m, x, table, k, z, impl="torch")
        error = error_of_mean(table, k, x, m) + U * (std * z).abs()
        assert ((ours.prev_sample - (mean + std * z)).abs() <= error + 1e-14).all()
        d = error_of_noise(table, k, x, m, z)
        theirs = trainer.log_prob(ours.prev_sample, mean, std) + trainer.offset(k)
        assert ((ours.log_prob - theirs).abs() <= error_of_log_prob(table, k, z, d)).all()


def test_log_probs_of_kept_states_and_their_gradients(trainer):
    x, m, z = draw()
    table = trainer.table
    for k in stochastic_steps(trainer):
        mean, std = trainer.step(x, m, k)
        x_next = mean + std * z
        results = []
        for impl in ("theirs", "ours"):
            output = m.clone().requires_grad_()
            if impl == "theirs":
                log_prob = trainer.log_prob(x_next, *trainer.step(x, output, k)) + trainer.offset(k)
            else:
                log_prob = step_log_prob(output, x, x_next, table, k, impl="torch")
            results += [log_prob.detach(), *torch.autograd.grad(log_prob.sum(), output)]
        theirs, their_gradient, ours, our_gradient = results
        d = error_of_noise(table, k, x, m, z)
        assert ((ours - theirs).abs() <= error_of_log_prob(table, k, z, d)).all()
        # k (b / s) z / numel, of which k, b and s are rounded
        coefficient = (table.log_prob_scale * table.output_coef / table.std)[k].abs() / x[0].numel()
        assert ((our_gradient - their_gradient).abs() <= coefficient * (d + 3 * U * z.abs()) + 1e-15).all()


def changed_output(m, z, weight, scale, clip_range, guarded):
    """Eight rows whose log-ratio is 0.3 or 3 clip ranges up or down, with advantages of both signs.

    With w e = p z + q y, y across z, it is -k (p <z, z> + p^2 <z, z> / 2 + q^2 <y, y> / 2): p is solved for the wanted
    one, and the part across z takes off a tenth of its size. The guard's is -k p <z, z>.
    """
    rows = list(itertools.product((0.3, 3.0), (-1.0, 1.0), (1.5, -0.7)))
    size, sign, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    across = torch.randn(m.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    squares = mean_of_rows(z * z)
    across = across - z * (mean_of_rows(across * z) / squares).view(PER_ROW)
    wanted = size * sign * clip_range / (scale * squares)
    along = -wanted if guarded else (1 - 2 * wanted).sqrt() - 1
    return m + (along.view(PER_ROW) * z + (0.2 * wanted.abs()).sqrt().view(PER_ROW) * across) / weight, advantages


@pytest.mark.parametrize("source", ["noise", "states"])
@pytest.mark.parametrize(
    ("name", "objective", "guarded"),
    [*itertools.product(TRAINERS, LOSSES, (False,)), ("flow-grpo", "ppo", True), ("dance", "ppo", True)],
)
def test_losses_and_gradients(name, objective, guarded, source):
    trainer = TRAINERS[name]()
    table = trainer.table.guarded() if guarded else trainer.table
    x, m_old, z = draw()
    for k in stochastic_steps(trainer):
        scale = table.log_prob_scale[k] * (table.std[k] if guarded else 1.0)
        w, h = table.weight[k], 1.0
        if guarded:
            sigmas = dance_sigmas() if name == "dance" else sd3_scheduler(10).sigmas.double()
            h = sigmas[k] - sigmas[k + 1]
        m_new, advantages = changed_output(m_old, z, w, scale, trainer.clip_range, guarded)

        old_mean, std = trainer.step(x, m_old, k)
        x_next = old_mean + std * z
        theirs = m_new.clone().requires_grad_()
        new_mean, _ = trainer.step(x, theirs, k)
        log_ratio = trainer.log_prob(x_next, new_mean, std) - trainer.log_prob(x_next, old_mean, std)
        shift = mean_of_rows((new_mean - old_mean) ** 2) / (2 * std**2)
        if guarded:
            log_ratio = guard_log_ratio(log_ratio, shift, std)
        loss, clipped = LOSSES[objective](log_ratio, advantages, trainer.clip_range)
        loss = (loss / h).mean()
        (gradient,) = torch.autograd.grad(loss, theirs)

        ours = m_new.clone().requires_grad_()
        given = StoredStates(x, x_next) if source == "states" else z
        result = policy_loss(
            *(ours, m_old, given, table, k, advantages),
            objective=objective,
            clip_range=trainer.clip_range,
            impl="torch",
        )
        (our_gradient,) = torch.autograd.grad(result.loss, ours)

        # w, which the second term has twice, k, s and h
        e, d = m_new - m_old, error_of_noise(table, k, x, m_old, z) if source == "states" else torch.zeros_like(z)
        direction, slip = z.abs() + (w * e).abs(), 5 * U
        error = scale * w.abs() * mean_of_rows(e.abs() * (d + slip * direction)) + 1e-14
        assert ((result.log_ratio - log_ratio).abs() <= error).all()
        assert torch.equal(result.clipped, clipped) and clipped.sum() == 2
        # the ratio is within a part in a thousand of 1
        slope = 1.001 * advantages.abs() / h
        of_interval = U * slope.mean() if guarded else 0.0
        assert (result.loss - loss).abs() <= (slope * error).mean() + of_interval + 1e-14
        bound = (slope * scale * w.abs()).view(PER_ROW) * (d + (slip + error.view(PER_ROW)) * direction) / e.numel()
        assert ((our_gradient - gradient).abs() <= bound + 1e-15).all()
        assert (gradient.flatten(1).norm(dim=1) == 0).equal(clipped)


@pytest.mark.parametrize("trainer", ["flow-grpo", "cps"], indirect=True)
def test_the_divergence_from_a_reference(trainer):
    """Flow-GRPO divides by its std_dev_t, the noise per unit of t: its divergence is h times that of the Gaussians.

    FlowCPS's std_dev_t is the step's own, and its divergence ours.
    """
    table, sigmas = trainer.table, sd3_scheduler(10).sigmas.double()
    x, m, reference = draw()
    for k in stochastic_steps(trainer):
        (mean, std), (ref_mean, _) = trainer.step(x, m, k), trainer.step(x, reference, k)
        their_std, factor = std, 1.0
        if trainer.log_prob is gaussian:
            their_std, factor = flow_grpo_noise(sigmas, k), sigmas[k] - sigmas[k + 1]
        theirs = mean_of_rows((mean - ref_mean) ** 2).mean() / (2 * their_std**2)
        nothing = torch.zeros(len(x), dtype=torch.float64)
        ours = policy_loss(m, m, m, table, k, nothing, kl=Reference(reference, 1.0), impl="torch")
        assert float(factor * ours.loss) == pytest.approx(float(theirs), rel=3 * U)
        assert float(ours.kl.mean()) == pytest.approx(float(ours.loss), rel=1e-12)


def test_the_first_ratio_is_one(trainer):
    """Theirs only in exact arithmetic, ours in any."""
    x, m, z = (t.to(torch.bfloat16) for t in draw())
    for k in stochastic_steps(trainer):
        x_next = sampler_step(m, x, trainer.table, k, z.float(), impl="torch").prev_sample
        result = policy_loss(*(m, m, StoredStates(x, x_next), trainer.table, k, torch.ones(len(x))), impl="torch")
        assert (result.log_ratio == 0).all()


# the last step of a flow


@pytest.mark.parametrize("name", FLOWS)
def test_the_last_step_of_a_flow_goes_to_the_predicted_sample(name):
    trainer = TRAINERS[name]()
    table, last = trainer.table, len(trainer.table) - 1
    x, v, z = draw()
    sigma = table.interval[last]
    ours = sampler_step(v, x, table, last, z, impl="torch")
    predicted = x - sigma * v
    assert ((ours.prev_sample - predicted).abs() <= U * (sigma * v).abs() + 1e-15).all()
    assert (ours.log_prob == 0).all()
    output = (v + 1).requires_grad_()
    result = policy_loss(output, v, z, table, last, torch.ones(len(x)), impl="torch")
    (gradient,) = torch.autograd.grad(result.loss, output)
    assert (result.log_ratio == 0).all() and (gradient == 0).all()

    mean, std = trainer.step(x, v, last)
    if name == "cps":
        # the same step, with no noise to train on
        assert std == 0
        torch.testing.assert_close(mean, predicted, rtol=0, atol=1e-14)
    elif name == "dance":
        # they take this step with noise, leave it out of the loss, and decode the predicted sample
        assert std == pytest.approx(0.3 * math.sqrt(1 / 6), rel=1e-12)
    else:
        # they take this step with noise, leave it out of the loss, and decode the result: noise of this size stays
        assert std == pytest.approx(6.28e-3, rel=1e-3)
        shift = std**2 / (2 * sigma) * (x + (1 - sigma) * v)
        torch.testing.assert_close(mean, predicted - shift, rtol=0, atol=1e-14)


def test_noise_that_the_last_step_leaves_on_an_evenly_spaced_schedule():
    """Flow-GRPO's rule at t = 0.25, the last of 10 steps with shift 3: a fifth of the image's own deviation."""
    _, std = flow_grpo_step(*draw()[:2], shifted_sigmas(10, 3.0), 9)
    assert std == pytest.approx(0.7 * math.sqrt(0.25 / 0.75) * 0.5, rel=1e-12)
    assert std > 0.2
    assert StepTable.flow(shifted_sigmas(10, 3.0), noise_level=0.7).std[9] == 0


@pytest.mark.parametrize("settings", [{"set_alpha_to_one": True}, {"steps_offset": 0}], ids=["alpha one", "no offset"])
def test_the_last_step_of_diffusion_where_it_is_deterministic(settings):
    """DDPO never reads the scheduler's final alpha: noise is drawn where that is 1. It has 0 / 0 at timestep 0."""
    trainer = ddpo(**settings)
    x, m, z = draw()
    mean, std = trainer.step(x, m, 49)
    theirs = trainer.log_prob(mean + std * z, mean, std)
    if "set_alpha_to_one" in settings:
        assert std > 0 and theirs.isfinite().all()
    else:
        assert std == 0 and theirs.isnan().all()
    ours = sampler_step(m, x, trainer.table, 49, z, impl="torch")
    assert stochastic_steps(trainer) == list(range(49))
    assert (ours.log_prob == 0).all() and ours.prev_sample.isfinite().all()


# left out on purpose, and its size


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 4.9e-3), (torch.float16, 2.0e-4)], ids=str)
def test_log_probs_taken_before_the_latent_is_rounded(dtype, largest):
    """DDPO's rollout takes the log-probability of x' in float32 and stores x' in half precision; its update reads that.

    The model has not changed, so each log-ratio should be 0. It is about -q^2 / (2 std^2), q the rounding: most where
    the step draws the least noise.
    """
    trainer = ddpo()
    x, m, z = draw(4, 4, 64, 64)
    off = []
    for k in stochastic_steps(trainer):
        mean, std = trainer.step(x, m, k)
        x_next = mean + std * z
        stored = x_next.to(dtype)
        theirs = trainer.log_prob(stored.double(), mean, std) - trainer.log_prob(x_next, mean, std)
        off.append(theirs.abs().max().item())
        # ours belongs to what is stored
        ours = sampler_step(m, x.to(dtype), trainer.table, k, z, impl="torch")
        kept = step_log_prob(m, x.to(dtype), ours.prev_sample, trainer.table, k, impl="torch")
        assert ours.prev_sample.dtype == dtype and torch.equal(ours.log_prob, kept)
    assert off.index(max(off)) == len(off) - 1
    assert max(off) == pytest.approx(largest, rel=0.05)


@pytest.mark.parametrize(
    ("name", "rounding", "largest"),
    [
        ("dance", "whole", 3.3e-4),
        ("flow-grpo", "whole", 9.2e-5),
        ("dance", "bf16", 4.3e-3),
        ("flow-grpo", "bf16", 1.66e-3),
    ],
)
def test_sigmas_made_again_from_rounded_timesteps(name, rounding, largest):
    """A step made again from timesteps that were rounded is not the step of the rollout: the model has not changed, and
    each log-ratio should be 0."""
    x, m, z = draw(4, 4, 64, 64)
    trainer, step = TRAINERS[name](), dance_step if name == "dance" else flow_grpo_step
    sigmas = dance_sigmas() if name == "dance" else sd3_scheduler(10).sigmas.double()
    rounded = (1000 * sigmas).floor() if rounding == "whole" else (1000 * sigmas).to(torch.bfloat16).double()
    off = []
    for k in stochastic_steps(trainer):
        (mean, std), (other, other_std) = step(x, m, sigmas, k), step(x, m, rounded / 1000, k)
        x_next = mean + std * z
        off.append((gaussian(x_next, other, other_std) - gaussian(x_next, mean, std)).abs().max().item())
    assert max(off) == pytest.approx(largest, rel=0.05)
    # the table's coefficients come from the sigmas themselves, and what the model is told is not rounded further
    torch.testing.assert_close(trainer.table.timesteps.double(), 1000 * sigmas[:-1], rtol=2 * U, atol=0)


# advantages


@pytest.mark.parametrize(
    ("name", "correction", "epsilon", "factor"),
    [("flow-grpo", 0, 1e-4, 1.0), ("dance", 1, 1e-8, math.sqrt(11 / 12))],
)
def test_advantages_of_groups(name, correction, epsilon, factor):
    """Flow-GRPO's with global_std off, and DanceGRPO's, whose deviation is the unbiased one."""
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0)).double()
    groups = rewards.view(2, 12)
    deviation = groups.std(dim=1, correction=correction, keepdim=True)
    theirs = ((groups - groups.mean(dim=1, keepdim=True)) / (deviation + epsilon)).flatten()
    ours = Advantages(LossSettings(advantage="group"))(rewards.float(), ["a"] * 12 + ["b"] * 12, 12).double()
    # the two epsilons, relative to a deviation of at least 0.2
    assert deviation.min() > 0.2
    torch.testing.assert_close(factor * ours, theirs, rtol=1e-4 / 0.2 if name == "dance" else 4 * U, atol=4 * U)


def test_advantages_of_prompts():
    """DDPO's, with 1e-6 for our 1e-4: the last 16 rewards of a prompt, and the whole epoch's while it has fewer."""
    generator, buffers = torch.Generator().manual_seed(1), {"a": [], "b": []}
    advantages = Advantages(LossSettings(advantage="prompt", advantage_clip=10.0))
    for _ in range(3):
        prompts = ["a"] * 12 + ["b"] * 4
        rewards = torch.rand(16, generator=generator)
        theirs = torch.empty(16, dtype=torch.float64)
        for prompt, rows in (("a", slice(0, 12)), ("b", slice(12, 16))):
            buffers[prompt] = [*buffers[prompt], *rewards[rows].tolist()][-16:]
            peers = torch.tensor(buffers[prompt] if len(buffers[prompt]) == 16 else rewards.tolist()).double()
            assert peers.std(correction=0) > 0.1
            theirs[rows] = (rewards[rows].double() - peers.mean()) / (peers.std(correction=0) + 1e-6)
        ours = advantages(rewards, prompts, 16).double()
        torch.testing.assert_close(ours, theirs, rtol=1e-4 / 0.1, atol=4 * U)
