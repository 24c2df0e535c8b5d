"""What a reward may return: one number per image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_scores(result: Any, count: int) -> Tensor:
    """The scores that a reward returned, float32 (count,) on the CPU.

    Args:
        result: `count` numbers in a tensor of any device and dtype, an array, a pandas Series, a list or a tuple; or a
            pair (scores, info), as rewards of ddpo-pytorch and flow_grpo return. The info is not used.
        count: the number of images.

    Raises:
        ValueError: for everything else, with what was returned and what is accepted.
    """
    # two numbers are the scores of two images
    is_pair = isinstance(result, tuple) and len(result) == 2 and _is_container(result[0])
    scores = result[0] if is_pair else result
    try:
        values = _as_tensor(scores)
        if values.shape == (count,):
            return values.to(torch.float32)
        found, advice = f"shape {tuple(values.shape)}", ""
        if values.shape == (count, 1):
            advice = "; squeeze(1) removes the second dimension"
        cause = None
    except Exception as error:
        found = "None" if scores is None else f"a {type(scores).__name__} that holds no numbers ({error})"
        advice, cause = "", error
    of_pair = " as the scores of a pair (scores, info)" if is_pair else ""
    raise ValueError(
        f"returned {found}{of_pair} for {count} images; it must return one number per image, as a tensor, an array or "
        f"a list of shape ({count},), or a pair (scores, info) of these and anything else{advice}"
    ) from cause


def _is_container(scores: Any) -> bool:
    return isinstance(scores, list | tuple | dict | str) or getattr(scores, "ndim", 0) > 0


def _as_tensor(scores: Any) -> Tensor:
    """Real numbers of any shape as a tensor on the CPU."""
    if isinstance(scores, list | tuple):
        # tensors of one element each, perhaps on a GPU
        scores = [score.item() if isinstance(score, Tensor) else score for score in scores]
    if not isinstance(scores, Tensor):
        array = np.asarray(scores)
        if array.dtype.kind not in "biuf" or isinstance(scores, np.ma.MaskedArray):
            raise TypeError(f"its dtype is {array.dtype}")
        # torch reads neither negative strides nor all of NumPy's dtypes
        return torch.from_numpy(np.array(array, np.float64))
    if scores.is_complex():
        raise TypeError(f"its dtype is {scores.dtype}")
    return scores.detach().cpu().to_dense()
