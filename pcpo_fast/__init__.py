"""pcpo-fast: the fast, exact core for aligning image diffusion and flow models with policy gradients.

Importing it needs torch and numpy alone; Triton, diffusers and the rest load when they are first used.
"""

from .ops import (
    Guidance,
    NoiseKey,
    PolicyLoss,
    RatioStats,
    Reference,
    SamplerStep,
    StoredStates,
    policy_loss,
    ratio_stats,
    sample_noise,
    sampler_step,
    step_log_prob,
    step_log_ratio,
)
from .samplers import StepTable, shifted_sigmas

__version__ = "0.2.0"

__all__ = [
    "Guidance",
    "NoiseKey",
    "PolicyLoss",
    "RatioStats",
    "Reference",
    "SamplerStep",
    "StepTable",
    "StoredStates",
    "policy_loss",
    "ratio_stats",
    "sample_noise",
    "sampler_step",
    "shifted_sigmas",
    "step_log_prob",
    "step_log_ratio",
]
