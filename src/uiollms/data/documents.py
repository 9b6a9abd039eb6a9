"""Documents, and corpora as lazy sequences of documents."""

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
    """One document.

    text: the text, or the prompt of a response; source: where the document was read, for messages;
    response: the answer, None for plain text; task: how the document becomes a sample, see
    uiollms/data/sample.py; train_prompt: whether the prompt is scored, too; kl_weight: weight of
    KL(teacher || student) in the loss, the rest is cross entropy.
    """

    text: str
    source: str
    response: str | None = None
    task: Task = "language modeling"
    train_prompt: bool = False
    kl_weight: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether the text or the response is blank, so that there is nothing to learn."""
        return not self.text.strip() or (self.response is not None and not self.response.strip())


@dataclass(frozen=True)
class TokenDocument(Document):
    """A tokenised document. input_ids [T]; labels [T], not shifted, -100 for tokens that are not
    scored."""

    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class NewsDocument(Document):
    """A news story (`text`) with questions about it. questions: pairs of question and answer;
    summary: the reference summary; distractor: the long text in which the story is hidden."""

    questions: tuple[tuple[str, str], ...] = ()
    summary: str = ""
    distractor: str = ""


@dataclass(frozen=True)
class QuestionDocument(Document):
    """A question of a benchmark: `text` is the prompt and `response` the first reference answer.

    references: all answers that count as right; metric: the name of the score in
    uiollms/evaluation/answer_metrics.py; labels: the answers that are possible, for metrics that
    need them; max_new_tokens: of an answer; first_line: whether only its first line is scored.
    """

    references: tuple[str, ...] = ()
    metric: str = "token_f1"
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 32
    first_line: bool = False


class Fact(NamedTuple):
    """A statement that contains a value, the question for the value, and the value itself."""

    statement: str
    question: str
    value: str


@dataclass(frozen=True)
class RecallDocument(Document):
    """A filler text (`text`) in which facts are hidden. facts: as many of them as fit are used, in
    their order; distance: chunks from a statement to its question, None for random distances."""

    facts: tuple[Fact, ...] = ()
    distance: int | None = None


ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatDocument(Document):
    """A conversation. messages: objects with `role` (one of ROLES) and `content`, and further keys
    that a chat template may read; text: the messages in a form for people, which is not
    tokenised."""

    messages: tuple[dict[str, Any], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether every message of the assistant is blank, so that there is nothing to learn."""
        return not any(
            message["role"] == "assistant" and message["content"].strip()
            for message in self.messages
        )


Corpus = Sequence[Document]


class LazyCorpus(Sequence[Document]):
    """A corpus of `size` documents; `read(i)` reads document i at every access."""

    def __init__(self, size: int, read: Callable[[int], Document]) -> None:
        self.size, self.read = size, read

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        if not -self.size <= i < self.size:
            raise IndexError(i)
        return self.read(i % self.size)


def concatenate(parts: Sequence[Corpus]) -> Corpus:
    """Concatenates several corpora."""
    ends = list(itertools.accumulate(len(part) for part in parts))

    def read(i: int) -> Document:
        number = bisect.bisect_right(ends, i)
        return parts[number][i - (ends[number] - len(parts[number]))]

    return LazyCorpus(ends[-1] if ends else 0, read)


def select_documents(documents: Corpus, numbers: Sequence[int]) -> Corpus:
    """The documents with the given numbers, in that order."""
    return LazyCorpus(len(numbers), lambda i: documents[numbers[i]])


def with_fields(documents: Corpus, **changes: Any) -> Corpus:
    """The documents with new values in some fields: with_fields(stories, task="longdata copy")."""
    return LazyCorpus(len(documents), lambda i: replace(documents[i], **changes))


def cut_texts(documents: Corpus, size: str | None) -> Corpus:
    """Keeps only the first characters of every document. size: None keeps all."""
    if size is None:
        return documents
    length = num_characters(size)

    def read(i: int) -> Document:
        document = documents[i]
        return replace(document, text=document.text[:length])

    return LazyCorpus(len(documents), read)


def num_characters(size: str) -> int:
    """The characters of a corpus name's SIZE: "128k" are 128 * 1024, "1m" are 1024 * 1024."""
    return int(size[:-1]) * {"k": 1024, "m": 1024 * 1024}[size[-1]]
