"""The axis of a reward, for the figures of a run and of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# the axis of a reward that is at most 0 is logarithmic where its largest distance to 0 is so many times its smallest
LOGARITHMIC_FROM = 3.0


class RewardAxis:
    """An axis on which gains can be seen: logarithmic in -reward for rewards that are at most 0, else linear.

    A policy that learns approaches 0 by a factor per epoch, so on a linear axis all algorithms end in one line.

    Args:
        rewards: all that the axis shows; which of the two it is follows from them.
    """

    def __init__(self, rewards: Sequence[float]) -> None:
        gaps = [-reward for reward in rewards]
        positive = [gap for gap in gaps if gap > 0]
        self.floor = min(positive, default=1.0)
        self.logarithmic = (
            bool(positive) and min(gaps, default=0) >= 0 and max(positive) / self.floor >= LOGARITHMIC_FROM
        )

    def to_axis(self, rewards: NDArray[Any]) -> NDArray[Any]:
        """Coordinates on the axis; a reward of exactly 0 is shown with the highest one below it."""
        return np.maximum(-rewards, self.floor) if self.logarithmic else rewards

    def between(self, low: float, high: float, count: int) -> NDArray[Any]:
        """Rewards (count,) from low to high, at equal distances on the axis."""
        if self.logarithmic:
            return -np.geomspace(-low, max(-high, self.floor), count)
        return np.linspace(low, high, count)

    def label(self, axis: Any) -> None:
        """Sets up a matplotlib axis: scale, direction and ticks that say rewards."""
        if not self.logarithmic:
            return
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes = axis.axes
        which = axis.axis_name
        getattr(axes, f"set_{which}scale")("log")
        if not getattr(axes, f"{which}axis_inverted")():
            getattr(axes, f"invert_{which}axis")()
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{-value:g}"))
        axis.set_minor_formatter(NullFormatter())
