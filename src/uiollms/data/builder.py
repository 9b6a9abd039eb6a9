"""Build samples, which training and evaluation use, from the documents of any corpus.

Shapes: T tokens of a document.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import CorpusEntry, TaskEntry, TaskType, TrainingTask
from uiollms.data import ChatDocument, Document, NewsDocument, RecallDocument, TokenDocument
from uiollms.data.chat import tokenize_chat
from uiollms.data.corpora.facts import with_facts
from uiollms.data.documents import Task
from uiollms.data.limits import Limited, check_sample, check_teacher
from uiollms.data.recall_sample import recall_sample
from uiollms.data.sample import PROTOCOLS, Sample
from uiollms.data.tokens import (
    LONGEST_TOKEN,
    common_prefix_length,
    continuation_pair,
    plain_ids,
    prefix_ids,
    tokenize,
    tokenize_pair,
)
from uiollms.files.errors import ConfigError
from uiollms.plugins import TaskPlugin, is_plugin, make_plugin


@dataclass(frozen=True)
class SampleBuilder:
    """Builds the sample of a document according to its task.

    protocol: which tokens of plain text are scored, "paper" or "document"; weigh: returns a sample
    with the token weights of `token_weighting` "context", which only corpora with that setting
    need.
    """

    model: Limited
    tokenizer: PreTrainedTokenizerBase
    protocol: str = "paper"
    weigh: Callable[[Sample], Sample] | None = None

    def make(
        self,
        document: Document,
        truncation: int | None,
        rng: random.Random,
        crop: str = "start",
        plugin: TaskPlugin | None = None,
    ) -> Sample:
        """Builds a sample of at most `truncation` tokens of a document (None: the capacity). Plain
        text is read from its start or, with `crop` "random", from a random position. A `plugin`
        makes the sample of its task.

        rng: draws that position, the chunk of auto encoding, the probe of memory utilization and
        the position of a news story. Raises ConfigError, naming the document, if the sample exceeds
        the model's limits.
        """
        try:
            if plugin:
                sample = self._plugin_sample(plugin, document, truncation, rng)
            else:
                sample = self._build(document, truncation, rng, crop)
            if teaches_memory(sample):
                check_sample(self.model.limits, sample)
                check_teacher(self.model.limits, sample)
            return sample
        except ValueError as error:
            raise ConfigError(f"{document.source}: {error}") from None

    def train(self, document: Document, entry: CorpusEntry, rng: random.Random) -> Sample:
        """Builds the sample of a training document with the task, teacher and token weights that
        its corpus entry sets. Raises ConfigError as `make` does, and if the document does not
        support the task."""
        sample = self.make(
            as_training_document(document, entry, rng),
            entry.truncation,
            rng,
            entry.crop,
            entry_plugin(entry),
        )
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
            return with_teacher(Sample.beacon(ids, labels, chunk_size), document)
        if isinstance(document, NewsDocument):
            return self._news_sample(document, most, rng)
        if isinstance(document, RecallDocument):
            length = truncation and min(truncation, self.model.limits.capacity)
            return recall_sample(self.tokenizer, document, chunk_size, length)
        if isinstance(document, ChatDocument):
            tokens = tokenize_chat(self.tokenizer, document.messages)
            return with_teacher(Sample.conversation(*tokens, chunk_size, most), document)
        if document.task == "question answering":
            pair = tokenize_pair(self.tokenizer, document.text, document.response or "")
            answered = Sample.question_answering(*pair, chunk_size, document.train_prompt, most)
            return with_teacher(answered, document)
        ids = tokenize(self.tokenizer, document.text)
        if document.task == "memory utilization":
            probe = torch.tensor(
                [rng.randrange(self.model.limits.vocab_size) for _ in range(chunk_size)]
            )
            ids = ids[: min(most, self.model.limits.positions - chunk_size)]
            context = ids[: self._most_compressed()]
            if len(context) >= chunk_size:
                return Sample.memory_utilization(context, probe, chunk_size)
            return Sample.document(ids, chunk_size)
        if document.task == "auto encoding":  # one chunk, copied from its memory
            count = len(ids[:most]) // chunk_size
            start = chunk_size * rng.randrange(count) if count else 0
            ids = ids[start : start + chunk_size]
        if document.task in ("auto encoding", "longdata copy"):
            # The copies come after all memories.
            ids = ids[: min(most, self._most_compressed(recent=False))]
            return (
                Sample.copy(ids, chunk_size)
                if len(ids) >= chunk_size
                else Sample.document(ids, chunk_size)
            )
        return with_teacher(
            PROTOCOLS[self.protocol](self._cut(ids, truncation, rng, crop), chunk_size), document
        )

    def _plugin_sample(
        self, plugin: TaskPlugin, document: Document, truncation: int | None, rng: random.Random
    ) -> Sample:
        limits = self.model.limits
        length = min(truncation or limits.capacity, limits.capacity)
        chunk_size = limits.memory.chunk_size
        sample = plugin.make_sample(document, self.tokenizer, chunk_size, length, rng)
        if not isinstance(sample, Sample):
            raise ValueError(
                f"{type(plugin).__name__}.make_sample returned {type(sample).__name__}, expected "
                "a Sample"
            )
        if len(sample.chunks) and sample.chunks.shape[1] != chunk_size:
            raise ValueError(
                f"{type(plugin).__name__}.make_sample returned chunks of {sample.chunks.shape[1]} "
                f"tokens, expected chunk_size {chunk_size}"
            )
        return sample

    def _news_sample(self, document: NewsDocument, most: int, rng: random.Random) -> Sample:
        """Hides the story in its distractor text, and ask every question and for the summary. Story
        and distractor are a whole number of chunks within `most` tokens (and within the base's
        positions, if a teacher reads them raw)."""
        chunk_size = self.model.limits.memory.chunk_size
        most = min(most, self._most_compressed())  # the questions come after all memories
        if document.kl_weight:
            most = min(most, self.model.limits.positions - chunk_size)
        context = self._hide_story(document, most, rng)
        questions = [
            (f"Question: {question}\nAnswer:", answer) for question, answer in document.questions
        ]
        questions += (
            [("Summary of the story:", document.summary)] if document.summary.strip() else []
        )
        tokens = [
            continuation_pair(self.tokenizer, question, f" {answer}")
            for question, answer in questions
        ]
        fitting = [(q, a[: chunk_size - 1]) for q, a in tokens]
        return Sample.questions(context, fitting, chunk_size, document.kl_weight)

    def _hide_story(self, document: NewsDocument, most: int, rng: random.Random) -> Tensor:
        """Inserts the story on separate lines at a random position of its distractor, and cuts out
        as many whole chunks around it as `most` tokens and the text allow. The story has a random
        position in them; a story that is longer loses its end. Starts with BOS, if the tokenizer
        adds it."""
        position = rng.randint(0, len(document.distractor))
        reach = most * LONGEST_TOKEN
        before = document.distractor[max(0, position - reach) : position]
        after = document.distractor[position : position + reach]
        start_text = f"{before}\n" if before else ""
        story_text = start_text + document.text
        first = prefix_ids(self.tokenizer)
        ids = plain_ids(self.tokenizer, f"{story_text}\n{after}" if after else story_text)
        chunk_size = self.model.limits.memory.chunk_size
        length = min(most, len(first) + len(ids)) // chunk_size * chunk_size - len(first)
        if length < 1:
            return torch.tensor((first + ids)[:most], dtype=torch.int64)
        start = common_prefix_length(plain_ids(self.tokenizer, start_text), ids)
        stop = min(start + length, common_prefix_length(plain_ids(self.tokenizer, story_text), ids))
        cut = rng.randint(max(0, stop - length), min(start, len(ids) - length))
        return torch.tensor(first + ids[cut : cut + length], dtype=torch.int64)

    def _most_compressed(self, recent: bool = True) -> int:
        """The number of tokens in the chunks whose memories a further full chunk can read. `recent`
        also counts that chunk's recent tokens."""
        memory, positions = self.model.limits.memory, self.model.limits.positions
        return memory.most_chunks(positions, recent) * memory.chunk_size

    def _cut(self, ids: Tensor, truncation: int | None, rng: random.Random, crop: str) -> Tensor:
        """Cuts a text to `truncation` tokens and the capacity, from the start or from a random
        position."""
        length = min(truncation or len(ids), self.model.limits.capacity)
        start = rng.randint(0, len(ids) - length) if crop == "random" and len(ids) > length else 0
        return ids[start : start + length]


def with_teacher(sample: Sample, document: Document) -> Sample:
    """Adds the base as the sample's teacher if the document has a `kl_weight`."""
    return sample.distilled(document.kl_weight) if document.kl_weight else sample


def as_training_document(document: Document, entry: CorpusEntry, rng: random.Random) -> Document:
    """Returns a document with the task and the `kl_weight` of its corpus entry. rng: draws the
    facts of synthetic recall. Raises ConfigError if the document does not support the task."""
    task, plugin = entry.task, entry_plugin(entry)
    if task is not None and task != document.task:
        recall = isinstance(document, RecallDocument)
        if fault := task_fault(task, "synthetic recall" if recall else document.task, plugin):
            raise ConfigError(f"{document.source}: {fault}")
        if recall:
            return (
                document
                if entry.kl_weight is None
                else replace(document, kl_weight=entry.kl_weight)
            )
        if task == "synthetic recall":
            document = with_facts(document, rng.choice(("facts", "keys")), rng)
        elif plugin is None:
            document = with_task(document, cast(Task, task))
    if entry.kl_weight is None:
        return document
    return replace(document, kl_weight=entry.kl_weight)


def with_task(document: Document, task: Task) -> Document:
    """Gives plain text a task. The loss of memory utilization is only the KL."""
    return replace(document, task=task, kl_weight=float(task == "memory utilization"))


def entry_plugin(entry: CorpusEntry | TaskEntry) -> TaskPlugin | None:
    """The plugin for the task of an entry, None if the task is one of this package. Raises
    ConfigError if there is no such plugin or its options are faulty."""
    task = entry.task if isinstance(entry, CorpusEntry) else entry.task_type
    if task is None or not is_plugin(task):
        return None
    built_in = dict.fromkeys((*get_args(TrainingTask), *get_args(TaskType)))
    return make_plugin(TaskPlugin, task, entry.task_options, built_in)


def task_fault(task: str, kind: str, plugin: TaskPlugin | None = None) -> str | None:
    """Describes why documents of a `kind` do not support a task, which may be a plugin's. Returns
    None if they do."""
    if plugin:
        if kind in plugin.accepts:
            return None
        return f"has documents for {kind}, {task} takes documents for {' or '.join(plugin.accepts)}"
    if task == kind or (task, kind) == ("question answering", "synthetic recall"):
        return None
    supported = [other for other in get_args(TrainingTask) if other != "question answering"]
    if kind == "language modeling":
        if task in supported:
            return None
        return (
            f"has plain text, but {task} needs an input and an output; allowed are "
            f"{', '.join(supported)}"
        )
    return f"has documents for {kind}, task {task!r} is for plain text; leave task out"


def teaches_memory(sample: Sample) -> bool:
    """Whether the sample's loss depends on memory: a row with a nonzero weight reads one."""
    return any(
        row.num_memories and bool(row.token_weights[row.scored].any()) for row in sample.rows
    )
