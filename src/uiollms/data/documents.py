"""What a document is, what a corpus is, and the register of corpora by name."""

from __future__ import annotations

import bisect
import difflib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

from uiollms.files.errors import ConfigError

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


SIZE = r"(?:\.([1-9]\d*[km]))?"  # the optional argument of a corpus name that `cut` understands


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


class Source(Protocol):
    """Something a corpus is read from: a raw_data file, a hub dataset, a Python package."""

    @property
    def name(self) -> str: ...

    def missing(self) -> str | None:
        """What is not on this machine and how to get it, in one line; None if it is there."""


@dataclass(frozen=True)
class NamedCorpus:
    """An entry of the register. usage: the name as people write it, {a,b} one of, [.x] optional;
    pattern: of the name in lower case without spaces, its groups are the opener's arguments;
    tokenized: the opener also takes a tokenizer, and its first argument is how many tokens a
    document has at most. mixed: not all documents are of kind `task`; needs: sources of all that
    the name may stand for; reads: of the same arguments, those that the opener reads; taught: of
    the same arguments, the most tokens that a teacher reads raw (0: none does, or it depends on
    the truncation alone); chunks: of the same arguments, the fewest chunks that a document
    needs, and how many it has without a truncation (0, 0: any); version: of the same arguments,
    which of several states of the corpus this machine has, for results (None: there is one)."""

    usage: str
    pattern: re.Pattern[str]
    task: str
    needs: tuple[Source, ...]
    tokenized: bool
    opener: Callable[..., Corpus]
    mixed: bool
    reads: Callable[..., Sequence[Source]]
    taught: Callable[..., int]
    chunks: Callable[..., tuple[int, int]]
    version: Callable[..., str | None]


REGISTER: list[NamedCorpus] = []
Opener = Callable[..., Corpus]


def corpus(
    usage: str,
    pattern: str,
    task: str = "language modeling",
    needs: Sequence[Source] = (),
    tokenized: bool = False,
    mixed: bool = False,
    reads: Callable[..., Sequence[Source]] | None = None,
    taught: Callable[..., int] = lambda *arguments: 0,
    chunks: Callable[..., tuple[int, int]] = lambda *arguments: (0, 0),
    version: Callable[..., str | None] = lambda *arguments: None,
) -> Callable[[Opener], Opener]:
    """Register the decorated opener under a name, see NamedCorpus."""

    def register(opener: Opener) -> Opener:
        found = NamedCorpus(
            usage=usage,
            pattern=re.compile(pattern),
            task=task,
            needs=tuple(needs),
            tokenized=tokenized,
            opener=opener,
            mixed=mixed,
            reads=reads or (lambda *arguments: needs),
            taught=taught,
            chunks=chunks,
            version=version,
        )
        REGISTER.append(found)
        return opener

    return register


def find_corpus(name: str) -> tuple[NamedCorpus, tuple[str | None, ...]]:
    """The entry of that name and the arguments in it; case and spaces do not matter (in a
    `files:` pattern they do). Opens nothing, so it also checks a config's names in no time.
    Raises ConfigError for an unknown name, with the nearest known one.

    "RedPajama book sample.train.1M" -> (entry of redpajama book sample, ("1m",))
    """
    head, colon, tail = name.partition(":")
    key = re.sub(r"\s", "", head).lower() + colon + (tail.strip() if colon else "")
    for entry in REGISTER:
        if match := entry.pattern.fullmatch(key):
            return entry, match.groups()
    usages = [entry.usage for entry in REGISTER]
    heads = {re.sub(r"\s", "", re.split(r"[.\[{:]", usage)[0]): usage for usage in reversed(usages)}
    near = difflib.get_close_matches(key.split(".")[0], heads, n=1, cutoff=0.5)
    hint = f"did you mean {heads[near[0]]}?" if near else f"known: {', '.join(usages)}"
    raise ConfigError(f"corpus {name!r} is unknown; {hint}")
