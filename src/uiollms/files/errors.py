"""Errors in files that a command reads. Each fault is one line with the file and the field."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

Value = TypeVar("Value")
MOST_LINES, LONGEST_LINE = 50, 1000  # limits of what a command prints about faulty input


class ConfigError(ValueError):
    """Faulty input: a config, a file or an environment variable. The message has one line for each
    fault: the file and the field, what was found, what is allowed and how to mend it."""


class Faults:
    """A collector of faults, so that one error reports all of them, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def collect(self, prefix: str = "") -> Iterator[None]:
        """Catches the ConfigError of a block and store its lines. `prefix`, such as a file and a
        field that the check does not know, is put before each line."""
        try:
            yield
        except ConfigError as error:
            self.lines += [prefix + line for line in str(error).splitlines()]

    def report(self) -> None:
        """Raises ConfigError with all collected lines, if there are any."""
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))


_IGNORING_FAULTS: ContextVar[bool] = ContextVar("ignoring_faults", default=False)


@contextmanager
def ignoring_faults() -> Iterator[None]:
    """Makes `validated` accept any value in a block, which reads a config again after its faults
    were reported."""
    token = _IGNORING_FAULTS.set(True)
    try:
        yield
    finally:
        _IGNORING_FAULTS.reset(token)


def validated(value: Value, faults: list[str]) -> Value:
    """Returns the value if a validator found no faults. Raises ValueError with one line for each
    fault otherwise."""
    if faults and not _IGNORING_FAULTS.get():
        raise ValueError("\n".join(faults))
    return value


def describe_fault(fault: Any, model: type[BaseModel], path: str | Path) -> str:
    """Describes a pydantic fault in one line; in several if one of our validators found several
    faults."""
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
    shown = (
        ""
        if isinstance(found, dict | list)
        else f", found {shortened(json.dumps(found, default=str))}"
    )
    start = f"{path}: {where}: " if where else f"{path}: "
    return "\n".join(f"{start}{line}{shown}" for line in message.split("\n"))


def shortened(text: str, length: int = 120) -> str:
    """Replaces the middle of a text that is longer than `length` by its number of characters."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}[.. {len(text) - length:,} more ..]{text[-(length // 2) :]}"


def terminal_lines(text: str) -> str:
    """Makes a text safe for a terminal: escape what would move the cursor or change colours,
    shorten long lines, and keep only the first 50 lines."""
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"... and {len(lines) - MOST_LINES:,} more"]
    return "\n".join(shortened(escaped_line(line), LONGEST_LINE) for line in lines)


def escaped_line(line: str) -> str:
    """Escapes the characters of a line that a terminal would interpret, as JSON escapes them. A
    line of JSON therefore remains the same JSON."""
    if line.isprintable():
        return line
    hidden = {"Cc", "Cf", "Zl", "Zp"}
    return "".join(json.dumps(c)[1:-1] if unicodedata.category(c) in hidden else c for c in line)


def json_path(location: tuple[str | int, ...]) -> str:
    """Writes a location as a path: ("train", "corpus", 0, "name") -> train.corpus[0].name. The
    labels that pydantic adds for union members are left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.isprintable() or not part or len(part) > 80:
            text += f"[{json.dumps(shortened(part, 80))}]"
        elif not any(c in part for c in "([{"):
            text += f".{part}" if text else part
    return text


def fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Returns the names of the fields of the typed object at a location."""
    current: Any = model
    for part in location:
        if isinstance(part, str) and part in current.model_fields:
            annotation = current.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            current = next(
                (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), current
            )
    return [field.alias or name for name, field in current.model_fields.items()]
