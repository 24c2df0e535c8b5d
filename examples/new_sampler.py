"""A sampler of your own, from the command line:

    pcpo train digits --sampler examples.new_sampler:ddpm_large_variance

It is DDPM's sampler with the larger of its two variances (Ho et al., arXiv 2006.11239, algorithm 2 with
sigma_t^2 = beta_t): the mean of DDIM at eta = 1, and more noise than any eta gives with it.
"""

import torch

from pcpo_fast import StepTable


def ddpm_large_variance(settings, schedule) -> StepTable:
    """The table for `settings.num_inference_steps` steps on the model's own schedule.

    `settings` holds the sampler's settings of the run, `schedule.scheduler` the scheduler of the model's pipeline. The
    credit is not ours to choose: the trainer applies --credit to the table.
    """
    scheduler = schedule.scheduler
    scheduler.set_timesteps(settings.num_inference_steps)
    timesteps = scheduler.timesteps
    at = scheduler.alphas_cumprod.double()[timesteps]
    ap = torch.cat([at[1:], at.new_ones(1)])
    beta = 1 - at / ap
    return StepTable(
        timesteps=timesteps,
        sample_coef=(ap / at).sqrt(),
        output_coef=-beta / ((1 - at) * (1 - beta)).sqrt(),
        # the last step draws no noise: what it drew would stay in the picture
        std=torch.where(ap < 1, beta.sqrt(), 0.0),
    )
