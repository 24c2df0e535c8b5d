"""Text in images: how much of the text that a prompt asks for can be read (Flow-GRPO, Liu et al., arXiv 2505.05470).

The reward is 1 - min(d, n) / n, for a text of n letters and d, the number of letters to add, remove or change in what
was read. Case and white space do not count, and d is 0 if what was read contains the text, as in Flow-GRPO's code.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.errors import RewardError
from pcpo_fast.rewards.pixels import to_pictures
from pcpo_fast.rewards.weights import need

# straight or typographic quotation marks
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class Ocr:
    """How much of the wanted text can be read in each image, in [0, 1]. RapidOCR reads it on the CPU, with the models
    of its package.

    The text is `metadata["text"]` if there is one, else the first part of the prompt in double quotation marks.
    """

    def __init__(self) -> None:
        need("ocr", "rapidocr", "onnxruntime", "rapidfuzz")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        from rapidfuzz.distance import Levenshtein

        scores = []
        for picture, wanted in zip(to_pictures(images), map(text_of, prompts, metadata), strict=True):
            wanted, read = _letters(wanted), _letters("".join(_reader()(picture).txts or ()))
            distance = 0 if wanted in read else Levenshtein.distance(wanted, read)
            scores.append(1 - min(distance, len(wanted)) / len(wanted))
        return torch.tensor(scores)


def text_of(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text that an image of the prompt should show.

    Raises:
        RewardError: if there is none.
    """
    text = metadata.get("text")
    if text is None:
        found = _QUOTED.search(prompt)
        text = found and (found[1] or found[2])
    if not isinstance(text, str) or not _letters(text):
        raise RewardError(
            f"the prompt {prompt!r} does not say which text to show; put the text into double quotation marks, or into "
            'the metadata as "text"'
        )
    return text


def _letters(text: str) -> str:
    return "".join(text.split()).lower()


@functools.cache
def _reader() -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            # everything that was read counts, however unsure it is
            "Global.text_score": 0.0,
            "Global.log_level": "error",
            # it would take every core, and wait for them busily
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        }
    )
