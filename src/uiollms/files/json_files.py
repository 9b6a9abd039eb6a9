"""Read JSON that people write, with one line for each fault and its location, and write JSON in
which NaN and infinite numbers are null."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from uiollms.files.errors import ConfigError, json_path
from uiollms.files.reading import MOST_JSON, read_text

DEEPEST = 100  # levels of nested lists and objects, which recursive functions visit
LONGEST_NUMBER = 400  # digits; the largest float64 has 309
Location = tuple[str | int, ...]


def read_json(path: str | Path) -> Any:
    """Reads the JSON value of a file. Raises ConfigError if there is no such file or it is too
    large, for bytes that are not UTF-8, broken JSON, and everything that `loads` refuses."""
    text = read_text(path, MOST_JSON)
    try:
        return loads(text, str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None


def as_json(value: Any, **settings: Any) -> str:
    """json.dumps, but NaN and infinite numbers, which JSON does not have, become null."""
    return json.dumps(replace_nonfinite(value), allow_nan=False, **settings)


def replace_nonfinite(value: Any) -> Any:
    """Replaces NaN and infinite numbers in a nested value by None."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loads(text: str | bytes, source: str) -> Any:
    """json.loads with more checks. Raises ConfigError, with one line for each fault, for keys that
    occur twice in an object, numbers of more than 400 digits, and nesting deeper than 100 levels.
    """
    try:
        value = json.loads(text, object_pairs_hook=Pairs, parse_int=parse_integer)
    except RecursionError:
        raise ConfigError(
            f"{source}: lists or objects nested deeper than {DEEPEST} levels"
        ) from None
    faults: dict[str, None] = {}
    for location, part in nested_values(value):
        if len(location) == DEEPEST and isinstance(part, dict | list):
            wrong = f"nested deeper than {DEEPEST} levels"
        elif isinstance(part, LongNumber):
            wrong = f"a number of {part.digits:,} digits; at most {LONGEST_NUMBER} are read"
        elif isinstance(part, Pairs) and part.duplicates:
            wrong = "written twice in one object; keep one of the two"
            faults |= {
                f"{source}: {json_path((*location, key))}: {wrong}": None for key in part.duplicates
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
    """A JSON object that lists its keys that occur more than once in `duplicates`. The parser
    silently uses the last value."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.duplicates: list[str] = []
        if len(self) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.duplicates = [key for key, count in counts.items() if count > 1]


class LongNumber:
    """A number with so many digits that Python converts it slowly or not at all."""

    def __init__(self, digits: int) -> None:
        self.digits = digits


def parse_integer(text: str) -> int | LongNumber:
    digits = len(text.lstrip("-"))
    return LongNumber(digits) if digits > LONGEST_NUMBER else int(text)


def nested_values(value: Any) -> Iterator[tuple[Location, Any]]:
    """Yields a JSON value and all values nested in it down to level 100, each with its location."""
    stack: list[tuple[Location, Any]] = [((), value)]
    while stack:
        location, value = stack.pop()
        yield location, value
        inner: Iterable[tuple[str | int, Any]] = ()
        if isinstance(value, dict | list) and len(location) < DEEPEST:
            inner = value.items() if isinstance(value, dict) else enumerate(value)
        stack += reversed([((*location, key), part) for key, part in inner])


def find_unusable(value: Any) -> str | None:
    """Finds a value that no config can contain and describe it with its location: half of a
    surrogate pair, which no file can contain, a zero byte, which no name can contain, an integer
    of more than 64 bits, or nesting deeper than 100 levels. Returns None if there is none."""
    for location, part in nested_values(value):
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
