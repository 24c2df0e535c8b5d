"""Triton kernels, one op per file; imported on first use by `pcpo_fast.ops`."""

import triton

from .gradient import gradient
from .philox import sample_noise
from .policy_loss import OBJECTIVES, policy_loss, step_log_ratio
from .sampler_step import sampler_step
from .step_log_prob import step_log_prob

# whether these kernels run in Triton's interpreter: fixed when they were decorated
INTERPRETED: bool = triton.knobs.runtime.interpret

__all__ = [
    "INTERPRETED",
    "OBJECTIVES",
    "gradient",
    "policy_loss",
    "sample_noise",
    "sampler_step",
    "step_log_prob",
    "step_log_ratio",
]
