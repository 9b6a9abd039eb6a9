"""Values of command-line options: argparse refuses those that have no meaning, with exit code 2."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from uiollms.files.errors import shortened

SEEDS = 2**63 - 1  # the largest; as of train.seed


def whole(least: int = 1, most: int = 10**9) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""
    digits = len(str(most))

    def read(text: str) -> int:
        number = text.strip().removeprefix("+")
        if (
            number.isascii()
            and number.isdigit()
            and len(number) <= digits
            and least <= int(number) <= most
        ):
            return int(number)
        raise wrong(f"a whole number from {least:,} to {most:,}", text)

    return read


def temperature(text: str) -> float:
    """0, or so much that dividing by it leaves finite numbers."""
    value = number(text)
    if value == 0 or 1e-4 <= value <= 1e4:
        return value
    raise wrong("0 (greedy), or a number from 0.0001 to 10000", text)


def share(text: str) -> float:
    """More than 0, at most 1."""
    value = number(text)
    if 0 < value <= 1:
        return value
    raise wrong("a number above 0, at most 1", text)


def number(text: str) -> float:
    """NaN where it is none: no comparison is true of it."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def place(text: str) -> Path:
    """A path that a file can have."""
    if not text or "\0" in text:
        raise wrong("a path: some characters, none of them a zero byte", text)
    return Path(text)


def wrong(expected: str, found: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"expected {expected}, found {shortened(found, 60)!r}")
