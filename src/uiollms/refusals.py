"""What is wrong with what a command reads: one line for every fault, with the file and the path in it."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

Value = TypeVar("Value")


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line a fault: file, JSON path, what was found, what is allowed."""


class Faults:
    """Faults found in one look at what a command reads, reported together, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Around a check that raises ConfigError: what it found is kept for later."""
        try:
            yield
        except ConfigError as error:
            self.lines += str(error).splitlines()

    def report(self) -> None:
        """Raises ConfigError with all lines, if there are any."""
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))


def all_right(value: Value, faults: list[str]) -> Value:
    """For validators that look at several fields: the value, if there are no faults. Raises ValueError
    with a line for each."""
    if faults:
        raise ValueError("\n".join(faults))
    return value


def describe(fault: Any, model: type[BaseModel], path: str | Path) -> str:
    """One line for one pydantic fault; more where a validator of ours found more."""
    where = json_path(fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = fields_at(model, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        return f"{path}: {where}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{path}: {where}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    found = fault["input"]
    shown = "" if isinstance(found, dict | list) else f", found {json.dumps(found, default=str)}"
    start = f"{path}: {where}: " if where else f"{path}: "
    return "\n".join(f"{start}{line}{shown}" for line in message.split("\n"))


def json_path(location: tuple[str | int, ...]) -> str:
    """("train", "corpus", 0, "name") -> train.corpus[0].name; pydantic's labels of union members are left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.isprintable() or not part:
            text += f"[{json.dumps(part)}]"
        elif not any(c in part for c in "([{"):
            text += f".{part}" if text else part
    return text


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


def loads(text: str, source: str) -> Any:
    """json.loads. Raises ConfigError, a line for each, for keys that stand twice in one object."""
    value = json.loads(text, object_pairs_hook=Pairs)
    if faults := written_twice(value, source):
        raise ConfigError("\n".join(faults))
    return value


def half_surrogate(value: Any, location: tuple[str | int, ...] = ()) -> tuple[str | int, ...] | None:
    """Where in a JSON value a text stands that no file can hold; None if nowhere."""
    if isinstance(value, str):
        return location if any("\ud800" <= c <= "\udfff" for c in value) else None
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (half_surrogate(part, (*location, key)) for key, v in inner for part in ((v, key) if isinstance(key, str) else (v,)))
    return next((place for place in found if place is not None), None)


def fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the typed object that a location leads to."""
    current: Any = model
    for part in location:
        if isinstance(part, str) and part in current.model_fields:
            annotation = current.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), current)
    return [field.alias or name for name, field in current.model_fields.items()]
