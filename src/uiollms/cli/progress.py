"""Progress bars that stay readable on narrow terminals."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from tqdm.utils import disp_len

# tqdm's formats, from the widest to the narrowest. None is tqdm's own, which also shows the rate.
FORMATS = (
    None,
    "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    "{desc}: {percentage:3.0f}% [{elapsed}<{remaining}{postfix}]",
)


class ProgressBar(tqdm):
    """A bar that follows the width of the terminal. Where not everything fits, the rate is left
    out first, then the drawn bar, then the counts, so that 80 columns show the loss and the speed
    of a training of hours."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **dict(dynamic_ncols=True) | settings)

    @staticmethod
    def format_meter(
        n: float, total: float | None, elapsed: float, ncols: int | None = None, **settings: Any
    ) -> str:
        """The text of the bar in at most `ncols` columns. Without `ncols` nothing is left out."""
        if not ncols:
            return tqdm.format_meter(n, total, elapsed, ncols=ncols, **settings)
        for bar_format in FORMATS:
            settings["bar_format"] = bar_format
            if disp_len(tqdm.format_meter(n, total, elapsed, **settings)) <= ncols:
                break
        return tqdm.format_meter(n, total, elapsed, ncols=ncols, **settings)
