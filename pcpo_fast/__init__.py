"""pcpo-fast: the fast, exact core for aligning image diffusion and flow models with policy gradients.

Importing it needs torch and numpy alone; Triton, diffusers and the rest load when they are first used.
"""

from .ops import PolicyLoss, SamplerStep, policy_loss, sample_noise, sampler_step, step_log_prob, step_log_ratio
from .tables import StepTable, ddim_table, flow_table, shifted_sigmas

__version__ = "0.1.0"

__all__ = [
    "PolicyLoss",
    "SamplerStep",
    "StepTable",
    "ddim_table",
    "flow_table",
    "policy_loss",
    "sample_noise",
    "sampler_step",
    "shifted_sigmas",
    "step_log_prob",
    "step_log_ratio",
]
