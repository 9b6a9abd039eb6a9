"""What a document is, what a corpus is, and the register of corpora by name."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

Task = Literal[
    "language modeling",
    "question answering",
    "activation beacons",
    "auto encoding",
    "longdata copy",
    "memory utilization",
    "news qa summation",
]


@dataclass(frozen=True)
class Document:
    """One document. text: the prompt where there is a response; source: where it was read, for
    messages; response: the answer, None for plain text; task: how it becomes a sample, see
    uiollms/data/sample.py; train_prompt: the prompt is scored like the response; kl_weight: the
    share of KL(teacher || student) in the loss, the rest is cross entropy (0 = plain, 1 =
    distilled)."""

    text: str
    source: str
    response: str | None = None
    task: Task = "language modeling"
    train_prompt: bool = False
    kl_weight: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Nothing to learn from: blank text, or a blank response."""
        return not self.text.strip() or (self.response is not None and not self.response.strip())


@dataclass(frozen=True)
class TokenDocument(Document):
    """A document that comes tokenised. input_ids [T]; labels [T], not shifted, -100 where
    nothing is scored."""

    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class NewsDocument(Document):
    """A news story (`text`) and what is asked about it. questions: pairs of question and answer;
    distractor: the long text that the story gets hidden in."""

    questions: tuple[tuple[str, str], ...] = ()
    summary: str = ""
    distractor: str = ""


class Fact(NamedTuple):
    """What is stated in a text, the question for it, and its value, which both leave to be told."""

    statement: str
    question: str
    value: str


@dataclass(frozen=True)
class RecallDocument(Document):
    """Text (`text`) that facts are hidden in. facts: as many as there is room for, the first first;
    distance: chunks from a statement to its question, None: drawn for each."""

    facts: tuple[Fact, ...] = ()
    distance: int | None = None


Corpus = Sequence[Document]


class Lazy(Sequence[Document]):
    """A corpus of `size` documents, each read by `read(i)` when asked for."""

    def __init__(self, size: int, read: Callable[[int], Document]) -> None:
        self.size, self.read = size, read

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        if not -self.size <= i < self.size:
            raise IndexError(i)
        return self.read(i % self.size)


def joined(parts: Sequence[Corpus]) -> Corpus:
    """Several corpora, one after another."""
    ends = list(itertools.accumulate(len(part) for part in parts))

    def read(i: int) -> Document:
        number = bisect.bisect_right(ends, i)
        return parts[number][i - (ends[number] - len(parts[number]))]

    return Lazy(ends[-1] if ends else 0, read)


def picked(documents: Corpus, numbers: Sequence[int]) -> Corpus:
    """Only the documents of those numbers, in that order."""
    return Lazy(len(numbers), lambda i: documents[numbers[i]])


def altered(documents: Corpus, **changes: Any) -> Corpus:
    """The same documents with other values in some fields: altered(stories, task="longdata
    copy")."""
    return Lazy(len(documents), lambda i: replace(documents[i], **changes))


def cut(documents: Corpus, size: str | None) -> Corpus:
    """The first characters of every document: "128k" = 128 * 1024, "1m" = 1024 * 1024, None =
    all."""
    if size is None:
        return documents
    length = int(size[:-1]) * {"k": 1024, "m": 1024 * 1024}[size[-1]]

    def read(i: int) -> Document:
        document = documents[i]
        return replace(document, text=document.text[:length])

    return Lazy(len(documents), read)
