"""Types of command-line options. argparse refuses other values, with exit code 2."""

from __future__ import annotations

import json
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uiollms.files.errors import ConfigError, shortened
from uiollms.files.json_files import find_unusable, loads

MAX_SEED = 2**63 - 1  # as that of train.seed


def whole_number(least: int = 1, most: int = 10**9) -> Callable[[str], int]:
    """The type of a whole number from `least` to `most`."""
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
        raise unexpected(text, f"a whole number from {least:,} to {most:,}")

    return read


def temperature(text: str) -> float:
    """The temperature of sampling: 0, or a number that logits can be divided by."""
    value = number_or_nan(text)
    if value == 0 or 1e-4 <= value <= 1e4:
        return value
    raise unexpected(text, "0 (greedy), or a number from 0.0001 to 10000")


def fraction(text: str) -> float:
    """A number above 0, at most 1."""
    value = number_or_nan(text)
    if 0 < value <= 1:
        return value
    raise unexpected(text, "a number above 0, at most 1")


def number_or_nan(text: str) -> float:
    """The number, or NaN for other texts, with which every comparison is false."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def json_object(text: str) -> dict[str, Any]:
    """An object in JSON."""
    try:
        value = loads(text, "the option")
    except (ConfigError, json.JSONDecodeError):
        value = None
    if isinstance(value, dict) and not find_unusable(value):
        return value
    raise unexpected(text, """an object in JSON, such as '{"files": "books/*.epub"}'""")


def file_path(text: str) -> Path:
    """A path that is not empty and contains no zero byte."""
    if not text or "\0" in text:
        raise unexpected(text, "a path: some characters, none of them a zero byte")
    return Path(text)


def unexpected(found: str, expected: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"expected {expected}, found {shortened(found, 60)!r}")
