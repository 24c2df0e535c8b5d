"""Pure PyTorch, one op per file: the textbook formula that everything is held against, and the CPU path."""

from .affine import compute_dtype
from .gradient import gradient
from .philox import sample_noise
from .policy_loss import OBJECTIVES, policy_loss, step_log_ratio
from .sampler_step import sampler_step
from .step_log_prob import step_log_prob

__all__ = [
    "OBJECTIVES",
    "compute_dtype",
    "gradient",
    "policy_loss",
    "sample_noise",
    "sampler_step",
    "step_log_prob",
    "step_log_ratio",
]
