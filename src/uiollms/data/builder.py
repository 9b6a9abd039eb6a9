"""A document of any corpus -> the sample that training takes a step on and evaluation scores.

Shapes: T tokens of a document.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import CorpusEntry, TrainingTask
from uiollms.data import Document, NewsDocument, RecallDocument, TokenDocument
from uiollms.data.corpora.facts import with_facts
from uiollms.data.documents import Task
from uiollms.data.limits import Limited, check_sample, check_teacher
from uiollms.data.recall_sample import recall_sample
from uiollms.data.sample import PROTOCOLS, Sample
from uiollms.data.tokens import (
    LONGEST_TOKEN,
    common,
    continued_pair,
    first_ids,
    plain_ids,
    tokenize,
    tokenize_pair,
)
from uiollms.files.errors import ConfigError


@dataclass(frozen=True)
class SampleBuilder:
    """Documents -> samples, each by its own task. protocol: who is scored in plain text, "paper"
    or "document"; weigh: gives a sample's tokens the weights of `token_weighting` "context",
    where a corpus may ask for it."""

    model: Limited
    tokenizer: PreTrainedTokenizerBase
    protocol: str = "paper"
    weigh: Callable[[Sample], Sample] | None = None

    def make(
        self, document: Document, truncation: int | None, rng: random.Random, crop: str = "start"
    ) -> Sample:
        """At most `truncation` tokens of a document (None: the capacity), plain text from its
        start or, with `crop` "random", from a random place. `rng` draws that place, the chunk of
        auto encoding, the probe of memory utilization and where a news story is hidden. Raises
        ConfigError, naming the document, where it does not fit."""
        try:
            sample = self._build(document, truncation, rng, crop)
            if teaches_memory(sample):
                check_sample(self.model.limits, sample)
                check_teacher(self.model.limits, sample)
            return sample
        except ValueError as error:
            raise ConfigError(f"{document.source}: {error}") from None

    def train(self, document: Document, entry: CorpusEntry, rng: random.Random) -> Sample:
        """The sample of a training document as the corpus's entry wants it: its task, its teacher,
        the weights of its tokens. Raises ConfigError as `make`, and for a task that the document is
        not for."""
        sample = self.make(trained_for(document, entry, rng), entry.truncation, rng, entry.crop)
        if entry.token_weighting != "context" or not teaches_memory(sample):
            return sample
        if self.weigh is None:
            raise ValueError(
                "token_weighting context needs the base: SampleBuilder(..., weigh=...)"
            )
        return self.weigh(sample)

    def _build(
        self, document: Document, truncation: int | None, rng: random.Random, crop: str
    ) -> Sample:
        most = truncation or self.model.limits.capacity
        chunk_size = self.model.limits.memory.chunk_size
        if isinstance(document, TokenDocument):
            ids, labels = (
                torch.tensor(side[:most]) for side in (document.input_ids, document.labels)
            )
            return taught(Sample.beacon(ids, labels, chunk_size), document)
        if isinstance(document, NewsDocument):
            return self._ask_news(document, most, rng)
        if isinstance(document, RecallDocument):
            length = truncation and min(truncation, self.model.limits.capacity)
            return recall_sample(self.tokenizer, document, chunk_size, length)
        if document.task == "question answering":
            pair = tokenize_pair(self.tokenizer, document.text, document.response or "")
            answered = Sample.question_answering(*pair, chunk_size, document.train_prompt, most)
            return taught(answered, document)
        ids = tokenize(self.tokenizer, document.text)
        if document.task == "memory utilization":
            probe = torch.tensor(
                [rng.randrange(self.model.limits.vocab_size) for _ in range(chunk_size)]
            )
            ids = ids[: min(most, self.model.limits.positions - chunk_size)]
            context = ids[: self._most_compressed()]
            enough = len(context) >= chunk_size
            if enough:
                return Sample.memory_utilization(context, probe, chunk_size)
            return Sample.document(ids, chunk_size)
        if document.task == "auto encoding":  # one chunk, from its own memory alone
            count = len(ids[:most]) // chunk_size
            start = chunk_size * rng.randrange(count) if count else 0
            ids = ids[start : start + chunk_size]
        if document.task in ("auto encoding", "longdata copy"):
            # The copies stand behind all memories.
            ids = ids[: min(most, self._most_compressed(recent=False))]
            return (
                Sample.copy(ids, chunk_size)
                if len(ids) >= chunk_size
                else Sample.document(ids, chunk_size)
            )
        return taught(
            PROTOCOLS[self.protocol](self._cut(ids, truncation, rng, crop), chunk_size), document
        )

    def _ask_news(self, document: NewsDocument, most: int, rng: random.Random) -> Sample:
        """The story hidden in its distractor text, together a whole number of chunks within
        `most` tokens (and, where a teacher reads them raw, within the base's positions); every
        question and the summary asked of it."""
        chunk_size = self.model.limits.memory.chunk_size
        most = min(most, self._most_compressed())  # the questions stand behind all memories
        if document.kl_weight:
            most = min(most, self.model.limits.positions - chunk_size)
        context = self._hide(document, most, rng)
        asked = [
            (f"Question: {question}\nAnswer:", answer) for question, answer in document.questions
        ]
        asked += [("Summary of the story:", document.summary)] if document.summary.strip() else []
        tokens = [
            continued_pair(self.tokenizer, question, f" {answer}") for question, answer in asked
        ]
        fitting = [(q, a[: chunk_size - 1]) for q, a in tokens]
        return Sample.questions(context, fitting, chunk_size, document.kl_weight)

    def _hide(self, document: NewsDocument, most: int, rng: random.Random) -> Tensor:
        """BOS, if the tokenizer writes one, and a part of the text that has the story on lines
        of its own at a random place of its distractor: as many whole chunks as `most` tokens and
        the text allow, the story at a random place of them. A story longer than they are loses
        its end."""
        place = rng.randint(0, len(document.distractor))
        reach = most * LONGEST_TOKEN
        before = document.distractor[max(0, place - reach) : place]
        after = document.distractor[place : place + reach]
        start_text = f"{before}\n" if before else ""
        story_text = start_text + document.text
        first = first_ids(self.tokenizer)
        ids = plain_ids(self.tokenizer, f"{story_text}\n{after}" if after else story_text)
        chunk_size = self.model.limits.memory.chunk_size
        length = min(most, len(first) + len(ids)) // chunk_size * chunk_size - len(first)
        if length < 1:
            return torch.tensor((first + ids)[:most], dtype=torch.int64)
        start = common(plain_ids(self.tokenizer, start_text), ids)
        stop = min(start + length, common(plain_ids(self.tokenizer, story_text), ids))
        cut = rng.randint(max(0, stop - length), min(start, len(ids) - length))
        return torch.tensor(first + ids[cut : cut + length], dtype=torch.int64)

    def _most_compressed(self, recent: bool = True) -> int:
        """Tokens of the chunks whose memories a further full chunk can stand behind; recent: with
        its recent tokens."""
        memory, positions = self.model.limits.memory, self.model.limits.positions
        return memory.most_chunks(positions, recent) * memory.chunk_size

    def _cut(self, ids: Tensor, truncation: int | None, rng: random.Random, crop: str) -> Tensor:
        """At most `truncation` tokens, from the start or from a random place; without one, at
        most the capacity."""
        length = min(truncation or len(ids), self.model.limits.capacity)
        start = rng.randint(0, len(ids) - length) if crop == "random" and len(ids) > length else 0
        return ids[start : start + length]


def taught(sample: Sample, document: Document) -> Sample:
    """The sample with the base as its teacher, where the document has a `kl_weight`."""
    return sample.distilled(document.kl_weight) if document.kl_weight else sample


def trained_for(document: Document, entry: CorpusEntry, rng: random.Random) -> Document:
    """A document with the task and the `kl_weight` of its corpus's entry. rng: draws facts. Raises
    ConfigError where the document is not for that task."""
    task = entry.task
    if task is not None and task != document.task:
        recall = isinstance(document, RecallDocument)
        if fault := task_fault(task, "synthetic recall" if recall else document.task):
            raise ConfigError(f"{document.source}: {fault}")
        if recall:
            return (
                document
                if entry.kl_weight is None
                else replace(document, kl_weight=entry.kl_weight)
            )
        if task == "synthetic recall":
            document = with_facts(document, rng.choice(("facts", "keys")), rng)
        else:
            document = as_task(document, task)
    if entry.kl_weight is None:
        return document
    return replace(document, kl_weight=entry.kl_weight)


def as_task(document: Document, task: Task) -> Document:
    """Plain text for a task; the loss of memory utilization is KL alone."""
    return replace(document, task=task, kl_weight=float(task == "memory utilization"))


def task_fault(task: str, kind: str) -> str | None:
    """Why a document of a `kind` cannot be trained on for a task; None where it can."""
    if task == kind or (task, kind) == ("question answering", "synthetic recall"):
        return None
    made = [other for other in get_args(TrainingTask) if other != "question answering"]
    if kind == "language modeling":
        if task in made:
            return None
        return (
            f"has plain text, not for {task}, which needs an input and an output; allowed are "
            f"{', '.join(made)}"
        )
    return f"has documents for {kind}, task {task!r} is for plain text; leave task out"


def teaches_memory(sample: Sample) -> bool:
    """Whether memory can matter to the sample's loss: some row with a weight reads any."""
    return any(
        row.num_memories and bool(row.token_weights[row.scored].any()) for row in sample.rows
    )
