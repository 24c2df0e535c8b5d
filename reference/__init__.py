"""Pure PyTorch, one op per file: the textbook formula that everything is held against, and the CPU path."""

from .affine import compute_dtype
from .philox import sample_noise
from .policy_loss import OBJECTIVES, policy_loss
from .sampler_step import sampler_step
from .step_log_prob import step_log_prob

__all__ = ["OBJECTIVES", "compute_dtype", "policy_loss", "sample_noise", "sampler_step", "step_log_prob"]
