"""The evaluation tasks of a run: documents chosen once, scored in every mode asked for, as often
as training wants to know."""

from __future__ import annotations

import difflib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.build import at_size
from uiollms.config.corpora import COPY_TASKS, RETRIEVAL_TASKS, TEXT_TASKS, Size, TaskEntry
from uiollms.data import Document, RecallDocument, open_corpus
from uiollms.data.builder import SampleBuilder, as_task, teaches_memory
from uiollms.data.documents import Lazy, Task
from uiollms.data.recall_sample import last_value
from uiollms.data.registry import find_corpus
from uiollms.data.retrieval import DEPTHS, trials
from uiollms.data.sample import PROTOCOLS, Sample
from uiollms.data.tokens import tokenize, tokenize_pair
from uiollms.evaluation.results import DocumentScore, TaskResult
from uiollms.evaluation.scoring import (
    exact_match,
    greedy_copy,
    greedy_reconstruction,
    longest_text,
    positions,
    scored_hidden,
    token_losses,
)
from uiollms.files.errors import ConfigError
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.positions import num_positions

log = logging.getLogger("uiollms")
PLAIN = "language modeling"  # the kind of a document that is only text
# task_type -> the kinds of documents it takes; one's own kind alone, where it is not named here
ACCEPTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*TEXT_TASKS, *RETRIEVAL_TASKS), (PLAIN,)),
    **{kind: (kind, PLAIN) for kind in (*COPY_TASKS, "memory utilization")},
    "news qa summation v2": ("news qa summation",),  # the corpus says which version's loss it is
}


@dataclass(frozen=True, eq=False)
class Instance:
    """One document of a task: its samples (auto encoding: one for each chunk, else one); depth:
    of a retrieval trial; prompt, response [T]: what a generated answer starts from and is
    compared with."""

    samples: tuple[Sample, ...]
    depth: float = 0.0
    prompt: Tensor | None = None
    response: Tensor | None = None


@dataclass(eq=False)
class Measurement:
    """A task (under one protocol), the size of its chunks, its documents, and the scores that do
    not change while memory is trained."""

    task: TaskEntry
    size: Size
    protocol: str | None
    instances: list[Instance]
    baselines: dict[str, dict[int, DocumentScore]] | None = None


class Evaluation:
    """The evaluation tasks of a run. Documents are tokenised once, and what the frozen base scores
    on its own (window, raw, recent) is computed once: only memory changes while training goes on
    (and the `repeat_token` that starts a copy). Raises ConfigError for a task whose corpus has no
    documents for it, or whose size does not fit, before anything is scored."""

    def __init__(
        self, model: MemoryLM, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[TaskEntry]
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.measurements: list[Measurement] = []
        for task in tasks:
            try:
                size = at_size(model.memory_config, task, model.config).size
            except ConfigError as error:
                raise ConfigError(f"{task.task_name}: {error}") from None
            with model.sized(size):
                found = instances_of(model, tokenizer, task)
            for instances in found.values():
                if "shuffled" in task.compare and len(instances) < 2:
                    raise ConfigError(
                        f"{task.task_name}: compare: shuffled needs 2 documents, the corpus has "
                        "one that fits"
                    )
            for protocol, instances in found.items():
                self.measurements.append(Measurement(task, size, protocol, instances))

    def run(
        self, progress: Callable[[list[Instance]], Iterable[Instance]] = iter
    ) -> list[TaskResult]:
        """Evaluate the model as it is now: one result a task (perplexity and language modeling:
        a protocol). Documents are scored independently of each other."""
        was_training = self.model.training
        self.model.eval()
        try:
            results = []
            for measurement in self.measurements:
                with self.model.sized(measurement.size):
                    results.append(self.measure(measurement, progress))
            return results
        finally:
            self.model.train(was_training)

    def measure(
        self, work: Measurement, progress: Callable[[list[Instance]], Iterable[Instance]]
    ) -> TaskResult:
        task = work.task
        bases = () if task.task_type in COPY_TASKS else ("window", "raw", "recent")
        fixed = [mode for mode in bases if mode in task.compare]
        if work.baselines is None:
            room = num_positions(self.model.config)
            if "raw" in fixed and any(
                longest_text(s) > room for x in work.instances for s in x.samples
            ):
                fixed.remove("raw")
            work.baselines = self.score_all(work, fixed, progress) if fixed else {}
        changing = ["memory", *(mode for mode in task.compare if mode not in bases)]
        scores = self.score_all(work, changing, progress) | work.baselines
        corpus, arguments = find_corpus(task.task_name)
        return TaskResult(
            name=task.task_name,
            task_type=task.task_type,
            truncation=task.truncation,
            chunk_size=self.model.memory_config.chunk_size,
            protocol=work.protocol,
            num_memory=self.model.memory_config.num_memory,
            corpus_version=corpus.version(*arguments),
            scores=scores,
        )

    def score_all(
        self,
        work: Measurement,
        modes: Sequence[str],
        progress: Callable[[list[Instance]], Iterable[Instance]],
    ) -> dict[str, dict[int, DocumentScore]]:
        scores: dict[str, dict[int, DocumentScore]] = {mode: {} for mode in modes}
        for i, instance in enumerate(progress(work.instances)):
            for mode in modes:
                other = partner(work.instances, i) if mode == "shuffled" else None
                if mode == "shuffled" and other is None:
                    log.warning(
                        "%s: no other document is as long as number %d: not shuffled",
                        work.task.task_name,
                        i + 1,
                    )
                    continue
                scores[mode][i] = self.score(work.task, instance, mode, other, shown=i == 0)
        return scores

    def score(
        self, task: TaskEntry, instance: Instance, mode: str, other: Instance | None, shown: bool
    ) -> DocumentScore:
        """One document in one mode; other: the document whose memories are read instead
        ("shuffled"); shown: of a copy also what is shown of its first chunk."""
        read: Sequence[Tensor | None] = [None] * len(instance.samples)
        if other is not None:
            read = [sample.chunks for sample in other.samples]
        pairs = list(
            zip(instance.samples, read, strict=False)
        )  # a longer partner's last chunks have no reader
        losses = [token_losses(self.model, sample, mode, chunks) for sample, chunks in pairs]
        loss, nll = (torch.cat(column).float() for column in zip(*losses, strict=True))
        parts = [positions(sample) for sample in instance.samples]
        if task.task_type == "auto encoding":  # every chunk is a sample that begins at 0
            parts = [torch.arange(len(nll))]
        details: dict[str, Any] = {}
        if task.task_type in RETRIEVAL_TASKS:
            details = {
                "correct": all(exact_match(self.model, s, mode, c) for s, c in pairs),
                "depth": instance.depth,
            }
        elif task.task_type in COPY_TASKS:
            details = self.copied(task.task_type, pairs, mode, shown)
        elif instance.prompt is not None and mode in ("memory", "raw"):
            details = {"texts": (self.answered(instance, mode),)}
        return DocumentScore(nll, loss, torch.cat(parts), **details)

    def copied(
        self, task_type: str, pairs: Sequence[tuple[Sample, Tensor | None]], mode: str, shown: bool
    ) -> dict[str, Any]:
        """The free-running copy beside its original, chunk by chunk."""
        originals = torch.cat([sample.chunks for sample, _ in pairs])
        read = torch.cat(
            [
                sample.chunks if chunks is None else chunks[: len(sample.chunks)]
                for sample, chunks in pairs
            ]
        )
        if mode == "window":
            one = greedy_copy(
                self.model, originals[:0], 1 if task_type == "auto encoding" else len(originals)
            )
            copies = one.expand(len(originals), -1)
        elif task_type == "auto encoding":
            copies = greedy_reconstruction(self.model, read)
        else:
            copies = greedy_copy(self.model, read, len(originals))
        texts = tuple(zip(self.texts(originals), self.texts(copies), strict=True))
        hits = int((copies == originals).sum()), originals.numel()
        details: dict[str, Any] = {"texts": texts, "hits": hits}
        if shown:
            guesses = self.guessed(pairs[0][0], mode, pairs[0][1])[: originals.shape[1]]
            details["written"] = self.written(originals[0], copies[0], guesses)
        return details

    def guessed(self, sample: Sample, mode: str, other: Tensor | None) -> Tensor:
        """The likeliest token at every scored position of a sample, [T']."""
        found = scored_hidden(self.model, sample, mode, other)
        return torch.cat([self.model.logits(hidden).argmax(-1).cpu() for _, hidden, _ in found])

    def written(self, original: Tensor, copy: Tensor, guesses: Tensor) -> dict[str, Any]:
        """The first chunk [l], its copy [l] and the guesses [l] of its tokens: see summaries.py."""
        matcher = difflib.SequenceMatcher(None, original.tolist(), copy.tolist(), autojunk=False)
        in_order = torch.zeros(len(copy), dtype=torch.bool)
        for block in matcher.get_matching_blocks():
            in_order[block.b : block.b + block.size] = True
        return dict(
            original=self.text(original),
            tokens=len(original),
            alone=self.pieces(copy, in_order),
            guided=self.pieces(guesses, guesses == original),
        )

    def pieces(self, ids: Tensor, right: Tensor) -> dict[str, Any]:
        """Token ids [l] in runs that are right, or not."""
        pieces = []
        for is_right, run in itertools.groupby(range(len(ids)), key=right.tolist().__getitem__):
            pieces.append((self.text(ids[list(run)]), is_right))
        return dict(pieces=pieces, right=int(right.sum()))

    def answered(self, instance: Instance, mode: str) -> tuple[str, str]:
        """(reference, greedy answer of at most as many tokens)."""
        assert instance.prompt is not None and instance.response is not None
        ids = instance.prompt[None].to(self.model.device)
        answering: Any = self.model if mode == "memory" else self.model.base
        most = len(instance.response)
        answer = answering.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most
        )
        reference, generated = self.texts([instance.response, answer[0, ids.shape[1] :]])
        return reference, generated

    def texts(self, ids: Iterable[Tensor]) -> list[str]:
        return [self.text(row) for row in ids]

    def text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def partner(instances: Sequence[Instance], i: int) -> Instance | None:
    """The document whose memories document i reads when they are shuffled: the next one, counted
    round, that has as many."""

    def has_enough(other: Instance) -> bool:
        own = instances[i].samples
        enough = all(
            len(b.chunks) >= len(a.chunks) for a, b in zip(own, other.samples, strict=False)
        )
        return len(other.samples) >= len(own) and enough

    ring = [*instances[i + 1 :], *instances[:i]]
    return next((other for other in ring if has_enough(other)), None)


def instances_of(
    model: MemoryLM, tokenizer: PreTrainedTokenizerBase, task: TaskEntry
) -> dict[str | None, list[Instance]]:
    """The documents of a task, by protocol (None where there is one way to score). Raises
    ConfigError if there is none."""
    chunk_size = model.memory_config.chunk_size
    if task.task_type in TEXT_TASKS:
        texts = evaluation_documents(model, tokenizer, task)
        return {
            p: [Instance((PROTOCOLS[p](ids, chunk_size),)) for ids in texts]
            for p in dict.fromkeys(task.protocols)
        }
    if task.task_type in RETRIEVAL_TASKS:
        length = task.truncation or model.capacity
        filler, depths = documents_of(task, tokenizer), task.depths or DEPTHS
        found = trials(
            task.task_type, filler, tokenizer, length, chunk_size, task.num_instance, depths
        )
        return {None: [Instance((trial.sample,), trial.depth) for trial in found]}
    maker = SampleBuilder(model, tokenizer)
    instances = []
    for i, document in enumerate(documents_of(task, tokenizer)):
        instance = (
            None if document.is_empty else instance_of(maker, document, task, random.Random(i))
        )
        if instance:
            instances.append(instance)
        if len(instances) == task.num_instance:
            break
    return {None: enough(instances, task)}


def instance_of(
    maker: SampleBuilder, document: Document, task: TaskEntry, rng: random.Random
) -> Instance | None:
    """A document of a task with samples of its own; None where memory cannot matter to them.
    Raises ConfigError, naming the document, where it does not fit the model."""
    every_chunk = task.task_type == "auto encoding"  # where training draws one
    sample = maker.make(
        replace(document, task="longdata copy") if every_chunk else document, task.truncation, rng
    )
    if not teaches_memory(sample):
        return None
    if every_chunk:
        return Instance(
            tuple(
                Sample.copy(chunk, maker.model.limits.memory.chunk_size) for chunk in sample.chunks
            )
        )
    if task.generate and isinstance(document, RecallDocument):
        prompt, response = last_value(sample)
        return Instance((sample,), prompt=prompt, response=response)
    if task.generate:
        ids = torch.cat([row.input_ids for row in sample.rows])
        _, response = tokenize_pair(maker.tokenizer, document.text, document.response or "")
        return Instance((sample,), prompt=ids[: -len(response)], response=response)
    return Instance((sample,))


def documents_of(task: TaskEntry, tokenizer: PreTrainedTokenizerBase) -> Sequence[Document]:
    """The documents of a task's corpus, each as the task has it. Reading one of a kind that the
    task has no use for raises ConfigError."""
    corpus = open_corpus(task.task_name, tokenizer)
    kinds = ACCEPTED.get(task.task_type, (task.task_type,))

    def read(i: int) -> Document:
        document = corpus[i]
        if document.task not in kinds:
            raise ConfigError(
                f"corpus {task.task_name!r}: {document.source} is for {document.task}, task_type "
                f"{task.task_type!r} takes "
                f"documents for {' or '.join(kinds)}"
            )
        if document.task == PLAIN and task.task_type not in (*TEXT_TASKS, *RETRIEVAL_TASKS):
            return as_task(
                document, cast(Task, task.task_type)
            )  # one of ACCEPTED's with a kind of its own
        return document

    return Lazy(len(corpus), read)


def evaluation_documents(
    model: MemoryLM, tokenizer: PreTrainedTokenizerBase, task: TaskEntry
) -> list[Tensor]:
    """Token ids [T] of a task's documents, cut to `truncation`: the first `num_instance` of its
    corpus, passing over blank ones and those of one token, where nothing is scored. With
    `documents` "full" the first that fill `truncation`, and where there are not so many, the
    first shorter ones of more than a chunk. Raises ConfigError if there is none."""
    length = min(task.truncation or model.capacity, model.capacity)
    least = model.memory_config.chunk_size if task.documents == "full" else 1
    full: list[Tensor] = []
    shorter: list[Tensor] = []
    for document in documents_of(task, tokenizer):
        ids = tokenize(tokenizer, document.text)[:length]
        if len(ids) > least and not document.is_empty:
            as_good = task.documents == "first" or len(ids) == length
            (full if as_good else shorter).append(ids)
        if len(full) == task.num_instance:
            break
    return enough((full + shorter)[: task.num_instance], task)


def enough(found: list[Any], task: TaskEntry) -> list[Any]:
    """Raises ConfigError if no document was found; warns of fewer than asked for."""
    if not found:
        text = task.task_type in TEXT_TASKS and task.documents == "first"
        what = (
            f"{task.task_type} that "
            f"{'has a token to score' if text else 'is long enough for memory'}"
        )
        raise ConfigError(f"corpus {task.task_name!r} has no document for {what}")
    if len(found) < task.num_instance:
        log.warning(
            "%s: %d documents of the %d asked for", task.task_name, len(found), task.num_instance
        )
    return found
