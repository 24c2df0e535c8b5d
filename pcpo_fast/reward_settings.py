"""Settings of rewards: their names, how models score, and servers."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Gt, Interval

from pcpo_fast.errors import SettingError


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    rewards: tuple[str, ...] = ("digit_alignment",)
    """Rewards to train on: names, or module:function for your own.
    A weight may follow, as in jpeg_compressibility=0.5. A model takes weights of yours, as in pickscore:/local/path."""
    eval_rewards: tuple[str, ...] = ("digit_accuracy",)
    """Rewards that are measured in evaluations and never trained on."""
    reward_timeout: Annotated[float, Gt(0)] | None = None
    """Seconds that one reward may take for the images of an epoch or an evaluation; None means any time."""
    reward_batch_size: Annotated[int, Gt(0)] = 8
    """Images that a reward's model scores at a time, and images in a request to a server."""
    reward_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the models of rewards; their scores are computed from its outputs in fp32."""
    reward_device: str | None = None
    """Device of the models of rewards; None means the policy's."""
    reward_servers: tuple[str, ...] = ()
    """Rewards that a server scores, as name=URL; the name can then be used in rewards and eval_rewards."""
    reward_failures: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """Largest fraction of an epoch's images that a server may fail to score; more end the run, which is saved."""

    def check(self) -> None:
        if not self.rewards:
            raise SettingError("rewards", "is empty; name at least one reward")
        used = {spec.partition("=")[0] for spec in (*self.rewards, *self.eval_rewards)}
        for name in self.servers():
            if name not in used:
                raise SettingError(
                    "reward_servers", f"the server {name!r} scores nothing; name it in rewards or eval_rewards, too"
                )

    def servers(self) -> dict[str, str]:
        """The URLs of the reward servers, by the name of the reward.

        Raises:
            SettingError: for what is no name=URL, and for a name that is given twice.
        """
        urls: dict[str, str] = {}
        for spec in self.reward_servers:
            name, _, url = spec.partition("=")
            if not re.fullmatch(r"[\w.-]+", name) or not _is_http(url):
                raise SettingError(
                    "reward_servers", f"{spec!r} was given; write name=URL, such as hps=http://127.0.0.1:8100"
                )
            if name in urls:
                raise SettingError("reward_servers", f"{name!r} is given twice; give each server its own name")
            urls[name] = url.rstrip("/")
        return urls


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # reading the port checks it
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
