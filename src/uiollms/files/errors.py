"""What is wrong with what a command reads: one line for every fault, with the file and the path
in it."""

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
MOST_LINES, LONGEST_LINE = 50, 1000  # of what a command says of wrong input


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line a fault: file, JSON path, what was
    found, what is allowed."""


class Faults:
    """Faults found in one look at what a command reads, reported together, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def noted(self, where: str = "") -> Iterator[None]:
        """Around a check that raises ConfigError: what it found is kept for later, behind
        `where`, the file and the field that the check does not know."""
        try:
            yield
        except ConfigError as error:
            self.lines += [where + line for line in str(error).splitlines()]

    def report(self) -> None:
        """Raises ConfigError with all lines, if there are any."""
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))


_FORGIVING: ContextVar[bool] = ContextVar("forgiving", default=False)


@contextmanager
def forgiving() -> Iterator[None]:
    """Inside, `all_right` lets everything pass: for a second look at a config whose faults are
    known."""
    token = _FORGIVING.set(True)
    try:
        yield
    finally:
        _FORGIVING.reset(token)


def all_right(value: Value, faults: list[str]) -> Value:
    """For validators that look at several fields: the value, if there are no faults. Raises
    ValueError with a line for each."""
    if faults and not _FORGIVING.get():
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
    shown = (
        ""
        if isinstance(found, dict | list)
        else f", found {shortened(json.dumps(found, default=str))}"
    )
    start = f"{path}: {where}: " if where else f"{path}: "
    return "\n".join(f"{start}{line}{shown}" for line in message.split("\n"))


def shortened(text: str, length: int = 120) -> str:
    """Both ends of a long text, with how much is between them."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}[.. {len(text) - length:,} more ..]{text[-(length // 2) :]}"


def as_lines(text: str) -> str:
    """Lines for a terminal: what would move its cursor or change its colours is escaped, a long
    line shortened, and of very many lines the first 50 kept."""
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"... and {len(lines) - MOST_LINES:,} more"]
    return "\n".join(shortened(as_shown(line), LONGEST_LINE) for line in lines)


def as_shown(line: str) -> str:
    """One line for a terminal: what it would act upon is escaped as in JSON, so that JSON stays
    the same."""
    if line.isprintable():
        return line
    hidden = {"Cc", "Cf", "Zl", "Zp"}
    return "".join(json.dumps(c)[1:-1] if unicodedata.category(c) in hidden else c for c in line)


def json_path(location: tuple[str | int, ...]) -> str:
    """("train", "corpus", 0, "name") -> train.corpus[0].name; pydantic's labels of union members
    are left out."""
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
    """Names of the fields of the typed object that a location leads to."""
    current: Any = model
    for part in location:
        if isinstance(part, str) and part in current.model_fields:
            annotation = current.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            current = next(
                (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), current
            )
    return [field.alias or name for name, field in current.model_fields.items()]
