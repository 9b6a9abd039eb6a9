"""Which documents a task scores, and the samples that they become."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import COPY_TASKS, RETRIEVAL_TASKS, TEXT_TASKS, TaskEntry
from uiollms.data import (
    ChatDocument,
    Document,
    QuestionDocument,
    RecallDocument,
    open_corpus,
)
from uiollms.data.builder import SampleBuilder, entry_plugin, teaches_memory, with_task
from uiollms.data.documents import LazyCorpus, Task
from uiollms.data.limits import check_sample
from uiollms.data.protocols import fewest_tokens, protocol_samples
from uiollms.data.recall_sample import last_value
from uiollms.data.retrieval import DEPTHS, make_trials
from uiollms.data.sample import Sample
from uiollms.data.tokens import tokenize, tokenize_pair
from uiollms.files.errors import ConfigError
from uiollms.model.memory_lm import MemoryLM
from uiollms.plugins import TaskPlugin

log = logging.getLogger("uiollms")
PLAIN = "language modeling"  # the kind of a document that is only text
# task_type -> the kinds of documents that it takes. A task that is not listed here takes documents
# of its own kind only.
ACCEPTED_KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*TEXT_TASKS, *RETRIEVAL_TASKS), (PLAIN,)),
    **{kind: (kind, PLAIN) for kind in (*COPY_TASKS, "memory utilization")},
    # The corpus determines which version's loss a document has.
    "news qa summation v2": ("news qa summation",),
}


def accepted_kinds(task_type: str, plugin: TaskPlugin | None) -> tuple[str, ...]:
    """The kinds of documents that a task takes, which may be a plugin's."""
    return plugin.accepts if plugin else ACCEPTED_KINDS.get(task_type, (task_type,))


@dataclass(frozen=True, eq=False)
class Instance:
    """One document of a task.

    samples:  one sample, for auto encoding one per chunk, for protocol sliding one per window
    depth:    where a retrieval trial hides its sentence, 0 to 1
    prompt:   [T] token ids that a generated answer continues, for tasks that generate
    response: [T] token ids that the answer is compared with, for tasks that generate
    question: the document, if it is a benchmark's question with a metric of its own
    """

    samples: tuple[Sample, ...]
    depth: float = 0.0
    prompt: Tensor | None = None
    response: Tensor | None = None
    question: QuestionDocument | None = None


def find_partner(instances: Sequence[Instance], i: int) -> Instance | None:
    """The document whose memories document i reads in mode "shuffled". It is the next document
    (after the last comes the first) with at least as many samples and memories. Returns None if
    there is none."""

    def has_as_many(other: Instance) -> bool:
        samples = instances[i].samples
        return len(other.samples) >= len(samples) and all(
            len(b.chunks) >= len(a.chunks) for a, b in zip(samples, other.samples, strict=False)
        )

    ring = [*instances[i + 1 :], *instances[:i]]
    return next((other for other in ring if has_as_many(other)), None)


def task_instances(
    model: MemoryLM, tokenizer: PreTrainedTokenizerBase, task: TaskEntry
) -> dict[str | None, list[Instance]]:
    """The documents of a task by protocol (None for tasks that have one way to score). Raises
    ConfigError if the corpus has no document for the task."""
    chunk_size = model.memory_config.chunk_size
    if task.task_type in TEXT_TASKS:
        texts = evaluation_documents(model, tokenizer, task)
        return {
            p: [Instance(text_samples(model, task, p, ids)) for ids in texts]
            for p in dict.fromkeys(task.protocols)
        }
    if task.task_type in RETRIEVAL_TASKS:
        length = task.truncation or model.capacity
        filler, depths = task_documents(task, tokenizer), task.depths or DEPTHS
        found = make_trials(
            task.task_type, filler, tokenizer, length, chunk_size, task.num_instance, depths
        )
        return {None: [Instance((trial.sample,), trial.depth) for trial in found]}
    builder = SampleBuilder(model, tokenizer)
    instances: list[Instance] = []
    for i, document in enumerate(task_documents(task, tokenizer)):
        instance = (
            None if document.is_empty else make_instance(builder, document, task, random.Random(i))
        )
        if instance:
            instances.append(instance)
        if len(instances) == task.num_instance:
            break
    check_count(instances, task)
    return {None: instances}


def text_samples(
    model: MemoryLM, task: TaskEntry, protocol: str, ids: Tensor
) -> tuple[Sample, ...]:
    """The samples of a text [T] under a protocol. Raises ConfigError if they exceed the base's
    positions, as the raw tokens of a segment can."""
    samples = protocol_samples(protocol, ids, model.memory_config.chunk_size)
    try:
        for sample in samples:
            check_sample(model.limits, sample)
    except ValueError as error:
        raise ConfigError(f"{task.task_name}: protocol {protocol}: {error}") from None
    return samples


def make_instance(
    builder: SampleBuilder, document: Document, task: TaskEntry, rng: random.Random
) -> Instance | None:
    """An instance of any task but text and retrieval. Returns None if none of the document's
    scored tokens reads memory. Raises ConfigError that names the document if it does not fit the
    model."""
    # Training draws one chunk of an auto encoding document; evaluation scores every chunk.
    every_chunk = task.task_type == "auto encoding"
    sample = builder.make(
        replace(document, task="longdata copy") if every_chunk else document,
        task.truncation,
        rng,
        plugin=entry_plugin(task),
    )
    if not teaches_memory(sample):
        return None
    if {"raw", "recent"} & {*task.compare} and any(row.repeat for row in sample.rows):
        raise ConfigError(
            f"{document.source}: {task.task_type} decodes from memory alone, which cannot be "
            "compared with raw or recent; take them out of compare"
        )
    if every_chunk:
        return Instance(
            tuple(
                Sample.copy(chunk, builder.model.limits.memory.chunk_size)
                for chunk in sample.chunks
            )
        )
    if task.generate and isinstance(document, ChatDocument | RecallDocument):
        prompt, response = last_value(sample)
        return Instance((sample,), prompt=prompt, response=response)
    if task.generate:
        ids = torch.cat([row.input_ids for row in sample.rows])
        _, response = tokenize_pair(builder.tokenizer, document.text, document.response or "")
        question = document if isinstance(document, QuestionDocument) else None
        return Instance((sample,), 0.0, ids[: -len(response)], response, question)
    return Instance((sample,))


def task_documents(task: TaskEntry, tokenizer: PreTrainedTokenizerBase) -> Sequence[Document]:
    """The documents of a task's corpus, converted to the task's kind. Access to a document of a
    kind that the task does not take raises ConfigError."""
    corpus = open_corpus(task.task_name, tokenizer, task.corpus_options)
    plugin = entry_plugin(task)
    kinds = accepted_kinds(task.task_type, plugin)
    # These tasks make their samples of plain text themselves.
    takes_text = plugin or task.task_type in (*TEXT_TASKS, *RETRIEVAL_TASKS)

    def read(i: int) -> Document:
        document = corpus[i]
        if document.task not in kinds:
            raise ConfigError(
                f"corpus {task.task_name!r}: {document.source} is for {document.task}, task_type "
                f"{task.task_type!r} takes documents for {' or '.join(kinds)}"
            )
        if document.task == PLAIN and not takes_text:
            return with_task(document, cast(Task, task.task_type))
        return document

    return LazyCorpus(len(corpus), read)


def evaluation_documents(
    model: MemoryLM, tokenizer: PreTrainedTokenizerBase, task: TaskEntry
) -> list[Tensor]:
    """Token ids [T] int64 of a text task's documents, cut to `truncation`.

    With `documents` "first" these are the first `num_instance` of the corpus, without blank
    documents and those of one token, which have no scored token. With "full" they are the first
    that fill `truncation`; if these are too few, the first shorter ones of more than a chunk
    follow. All documents are long enough for every protocol (`fewest_tokens`), such as "later",
    which scores none of the first chunk and one more token. Raises ConfigError if there is no
    document.
    """
    length = min(task.truncation or model.capacity, model.capacity)
    chunk_size = model.memory_config.chunk_size
    fewest = max(fewest_tokens(protocol, chunk_size) for protocol in task.protocols)
    if task.documents == "full":
        fewest = max(fewest, chunk_size + 1)
    preferred: list[Tensor] = []
    shorter: list[Tensor] = []
    for document in task_documents(task, tokenizer):
        ids = tokenize(tokenizer, document.text)[:length]
        if len(ids) >= fewest and not document.is_empty:
            fits = task.documents == "first" or len(ids) == length
            (preferred if fits else shorter).append(ids)
        if len(preferred) == task.num_instance:
            break
    found = (preferred + shorter)[: task.num_instance]
    check_count(found, task)
    return found


def check_count(found: Sequence[Any], task: TaskEntry) -> None:
    """Raises ConfigError if no document was found; warns if they are fewer than `num_instance`."""
    if not found:
        any_text = task.task_type in TEXT_TASKS and task.documents == "first"
        any_text &= all(fewest_tokens(protocol, 1) == 2 for protocol in task.protocols)
        condition = "has a token to score" if any_text else "is long enough for memory"
        raise ConfigError(
            f"corpus {task.task_name!r} has no document for {task.task_type} that {condition}"
        )
    if len(found) < task.num_instance:
        log.warning(
            "%s: the corpus has %d documents, num_instance is %d",
            task.task_name,
            len(found),
            task.num_instance,
        )
