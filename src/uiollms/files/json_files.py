"""Reading JSON that people write, where what is wrong with a file is one line with its place; and
writing it, where a number that is none is null."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from uiollms.files.errors import ConfigError, json_path
from uiollms.files.reading import MOST_JSON, read_bytes

DEEPEST = 100  # levels of lists and objects in each other: programs that walk them call themselves
LONGEST_NUMBER = 400  # digits; of float64 the largest has 309
Location = tuple[str | int, ...]


def read_json(path: str | Path) -> Any:
    """The JSON value in a file. Raises ConfigError for what is no file or too large a one, bytes
    that are not UTF-8, broken JSON, and what `loads` refuses."""
    try:
        # Some editors write a byte order mark.
        text = read_bytes(path, MOST_JSON).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from None
    try:
        return loads(text, str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None


def as_json(value: Any, **settings: Any) -> str:
    """json.dumps, with null for NaN and infinite numbers, which JSON does not know."""
    return json.dumps(finite(value), allow_nan=False, **settings)


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loads(text: str | bytes, source: str) -> Any:
    """json.loads. Raises ConfigError, a line for each, for keys that stand twice in one object,
    numbers of more than 400 digits and what is nested deeper than 100 levels."""
    try:
        value = json.loads(text, object_pairs_hook=Pairs, parse_int=whole_number)
    except RecursionError:
        raise ConfigError(
            f"{source}: lists or objects nested deeper than {DEEPEST} levels"
        ) from None
    faults: dict[str, None] = {}
    for location, part in parts_of(value):
        if len(location) == DEEPEST and isinstance(part, dict | list):
            wrong = f"nested deeper than {DEEPEST} levels"
        elif isinstance(part, TooLong):
            wrong = f"a number of {part.digits:,} digits; at most {LONGEST_NUMBER} are read"
        elif isinstance(part, Pairs) and part.twice:
            wrong = "written twice in one object; keep one of the two"
            faults |= {
                f"{source}: {json_path((*location, key))}: {wrong}": None for key in part.twice
            }
            continue
        else:
            continue
        where = json_path(location)
        faults[f"{source}: {where}: {wrong}" if where else f"{source}: {wrong}"] = None
    if faults:
        raise ConfigError("\n".join(faults))
    return value


class Pairs(dict[str, Any]):
    """A JSON object that remembers which of its keys were written more than once, in `twice`: the
    parser would take the last without a word."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice: list[str] = []
        if len(self) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.twice = [key for key, count in counts.items() if count > 1]


class TooLong:
    """A number of so many digits, which takes Python long to read, or cannot be."""

    def __init__(self, digits: int) -> None:
        self.digits = digits


def whole_number(text: str) -> int | TooLong:
    digits = len(text.lstrip("-"))
    return TooLong(digits) if digits > LONGEST_NUMBER else int(text)


def parts_of(value: Any) -> Iterator[tuple[Location, Any]]:
    """A JSON value, then all within it down to level 100, each with its place; an object's keys
    come as what they are the keys of."""
    todo: list[tuple[Location, Any]] = [((), value)]
    while todo:
        place, value = todo.pop()
        yield place, value
        inner: Iterable[tuple[str | int, Any]] = ()
        if isinstance(value, dict | list) and len(place) < DEEPEST:
            inner = value.items() if isinstance(value, dict) else enumerate(value)
        todo += reversed([((*place, key), part) for key, part in inner])


def unusable(value: Any) -> str | None:
    """What no config can mean, with its place: a text that no file can hold, a zero byte, which
    no name can hold, a whole number past 64 bits, endless nesting. None where there is nothing
    such."""
    for location, part in parts_of(value):
        wrong = None
        if len(location) == DEEPEST and isinstance(part, dict | list):
            wrong = f"nested deeper than {DEEPEST} levels"
        elif type(part) is int and not -(2**63) <= part < 2**63:
            wrong = "a whole number past 64 bits; at most 9223372036854775807 is read"
        for text in (part, *part) if isinstance(part, dict) else (part,):
            if isinstance(text, str) and "\0" in text:
                wrong = "holds a zero byte (\\u0000), which no name and no path can"
            if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
                wrong = "holds half of a surrogate pair, which is no text"
        if wrong:
            return f"{json_path(location)}: {wrong}" if json_path(location) else wrong
    return None
