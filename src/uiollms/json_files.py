"""Reading JSON that people write, where what is wrong with a file is one line with its place; and
writing it, where a number that is none is null."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uiollms.refusals import ConfigError, json_path


def read_json(path: str | Path) -> Any:
    """The JSON value in a file. Raises ConfigError for a missing file, bytes that are not UTF-8,
    broken JSON, and a key that stands twice in an object."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from None
    try:
        return loads(text, str(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None


def as_json(value: Any, **settings: Any) -> str:
    """json.dumps, with null for NaN and infinite numbers, which JSON does not know."""
    return json.dumps(finite(value), allow_nan=False, **settings)


def printable(text: str) -> str:
    """JSON on one line, where control characters and others that a terminal would act upon are escaped."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loads(text: str, source: str) -> Any:
    """json.loads. Raises ConfigError, a line for each, for keys that stand twice in one object."""
    value = json.loads(text, object_pairs_hook=Pairs)
    if faults := written_twice(value, source):
        raise ConfigError("\n".join(faults))
    return value


class Pairs(dict[str, Any]):
    """A JSON object that remembers which of its keys were written more than once, in `twice`."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.twice = [key for key, count in counts.items() if count > 1]


def written_twice(value: Any, source: str) -> list[str]:
    """A line for every key of a JSON value's objects (`Pairs`) that was written more than once: the
    parser would take the last without a word."""
    found: list[tuple[str | int, ...]] = []
    todo: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, Pairs):
            found += [(*place, key) for key in value.twice]
        inner: Iterable[tuple[str | int, Any]] = ()
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
        todo += reversed([((*place, key), part) for key, part in inner])
    wrong = "written twice in one object; keep one of the two"
    return [f"{source}: {json_path(place)}: {wrong}" for place in found]


def half_surrogate(value: Any, location: tuple[str | int, ...] = ()) -> tuple[str | int, ...] | None:
    """Where in a JSON value a text stands that no file can hold; None if nowhere."""
    if isinstance(value, str):
        return location if any("\ud800" <= c <= "\udfff" for c in value) else None
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (half_surrogate(part, (*location, key)) for key, v in inner for part in ((v, key) if isinstance(key, str) else (v,)))
    return next((place for place in found if place is not None), None)
