"""Evaluation of a model on the tasks of a config: documents are chosen once and scored in every
mode that a task compares, as often as a training run evaluates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.alternatives.costs import MEASURED_MODES, Cost, measure_cost
from uiollms.alternatives.presses import Presses, PressFailure
from uiollms.build import resized_for_task
from uiollms.config.corpora import COPY_TASKS, RETRIEVAL_TASKS, Size, TaskEntry
from uiollms.config.modes import is_press
from uiollms.data.registry import find_corpus
from uiollms.data.sample import Sample
from uiollms.evaluation.answer_metrics import score_answer
from uiollms.evaluation.base_prompts import ANSWER_MODES, base_prompt
from uiollms.evaluation.copying import greedy_copy, greedy_reconstruction, written_chunk
from uiollms.evaluation.instances import Instance, find_partner, task_instances
from uiollms.evaluation.results import ScoredTask, TaskScores
from uiollms.evaluation.scoring import (
    ScoredRows,
    all_likeliest,
    longest_text,
    losses_of,
    pressed_hidden,
    scored_hidden,
    scored_positions,
)
from uiollms.evaluation.statistics import DocumentScore
from uiollms.files.errors import ConfigError
from uiollms.model.memory_lm import MemoryLM

log = logging.getLogger("uiollms")
Progress = Callable[[list[Instance]], Iterable[Instance]]  # wraps the documents in a progress bar
Scores = dict[str, dict[int, DocumentScore]]  # mode -> index of a document -> its score


@dataclass(frozen=True, eq=False)
class Measurement:
    """A task (of a text task: under one protocol), the chunk size and number of slots it is scored
    with, and its documents."""

    task: TaskEntry
    size: Size
    protocol: str | None
    instances: list[Instance]


class Evaluation:
    """The evaluation tasks of a run.

    Documents are tokenised once. The scores of the frozen base (all modes but memory and shuffled)
    are computed once, because training changes only the memory. Copy tasks are the exception: their
    first token, `repeat_token`, is trained. Raises ConfigError, before anything is scored, for a
    task whose corpus has no documents for it or whose size does not fit the model.
    """

    def __init__(
        self, model: MemoryLM, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[TaskEntry]
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.measurements: list[Measurement] = []
        self.presses = Presses(model, tokenizer)
        # By index of the measurement.
        self._base_scores: dict[int, Scores] = {}
        self._costs: dict[int, dict[str, Cost]] = {}
        self._failures: dict[int, dict[str, str]] = {}
        for task in tasks:
            try:
                size = resized_for_task(model.memory_config, task, model.base.config).size
            except ConfigError as error:
                raise ConfigError(f"{task.task_name}: {error}") from None
            with model.sized(size):
                found = task_instances(model, tokenizer, task)
            for protocol, instances in found.items():
                if "shuffled" in task.compare and len(instances) < 2:
                    raise ConfigError(
                        f"{task.task_name}: compare: shuffled needs 2 documents, the corpus has "
                        "one that fits"
                    )
                self.measurements.append(Measurement(task, size, protocol, instances))

    def run(self, progress: Progress = iter) -> list[TaskScores]:
        """Scores the model as it is now. Returns one result per task; perplexity and language
        modeling have one per protocol. Documents are scored independently of each other."""
        was_training = self.model.training
        self.model.eval()
        try:
            results = []
            for index, measurement in enumerate(self.measurements):
                with self.model.sized(measurement.size):
                    results.append(self._measure(index, measurement, progress))
            return results
        finally:
            self.model.train(was_training)

    def _measure(self, index: int, measurement: Measurement, progress: Progress) -> TaskScores:
        task = measurement.task
        copies = task.task_type in COPY_TASKS
        base_modes = [mode for mode in task.compare if mode != "shuffled" and not copies]
        if index not in self._base_scores:
            too_long = any(
                longest_text(sample) > self.model.limits.positions
                for instance in measurement.instances
                for sample in instance.samples
            )
            modes = [mode for mode in base_modes if not (too_long and reads_raw(mode))]
            self._failures[index] = {
                mode: "the context is longer than the base's positions"
                for mode in base_modes
                if mode not in modes
            }
            self._costs[index] = {}
            if task.costs and not copies:
                self._measure_costs(index, measurement, modes)
            self._base_scores[index] = self._score_all(
                measurement, [mode for mode in modes if not is_press(mode)], progress
            )
            for mode in filter(is_press, modes):
                self._press(index, measurement, mode)
        memory_modes = ["memory", *(mode for mode in task.compare if mode not in base_modes)]
        corpus, arguments = find_corpus(task.task_name, task.corpus_options)
        return TaskScores(
            ScoredTask(
                name=task.task_name,
                task_type=task.task_type,
                truncation=task.truncation,
                chunk_size=self.model.memory_config.chunk_size,
                protocol=measurement.protocol,
                num_memory=self.model.memory_config.num_memory,
                corpus_version=corpus.version(*arguments),
            ),
            self._score_all(measurement, memory_modes, progress) | self._base_scores[index],
            self._costs[index],
            self._failures[index],
        )

    def _measure_costs(self, index: int, measurement: Measurement, modes: Sequence[str]) -> None:
        """Measures memory and the modes that run in this process."""
        sample = measurement.instances[0].samples[0]
        for mode in MEASURED_MODES:
            if mode == "memory" or mode in modes:
                cost = measure_cost(self.model, sample, mode)
                if cost is not None:
                    self._costs[index][mode] = cost

    def _press(self, index: int, measurement: Measurement, mode: str) -> None:
        """Scores all documents with a press. If it fails, the reason takes the place of scores."""
        samples = [sample for one in measurement.instances for sample in one.samples]
        try:
            pressed = self.presses.run(mode, samples, measurement.task.costs)
        except PressFailure as failure:
            log.warning("%s: %s is not scored: %s", measurement.task.task_name, mode, failure)
            self._failures[index][mode] = str(failure)
            return
        if pressed.cost:
            self._costs[index][mode] = pressed.cost
        hidden = iter(pressed.hidden)
        self._base_scores[index][mode] = {
            i: self._score(
                measurement.task,
                instance,
                mode,
                None,
                False,
                [next(hidden) for _ in instance.samples],
            )
            for i, instance in enumerate(measurement.instances)
        }

    def _score_all(
        self, measurement: Measurement, modes: Sequence[str], progress: Progress
    ) -> Scores:
        scores: Scores = {mode: {} for mode in modes}
        if not modes:
            return scores
        for i, instance in enumerate(progress(measurement.instances)):
            for mode in modes:
                other = find_partner(measurement.instances, i) if mode == "shuffled" else None
                if mode == "shuffled" and other is None:
                    log.warning(
                        "%s: document %d is not scored in mode shuffled, no other is as long",
                        measurement.task.task_name,
                        i + 1,
                    )
                    continue
                scores[mode][i] = self._score(measurement.task, instance, mode, other, i == 0)
        return scores

    def _score(
        self,
        task: TaskEntry,
        instance: Instance,
        mode: str,
        other: Instance | None,
        show: bool,
        pressed: Sequence[Tensor] | None = None,
    ) -> DocumentScore:
        """Scores one document in one mode.

        other:   the document whose memories are read instead, for mode "shuffled"
        show:    whether a copy task also stores its first chunk as text
        pressed: for a press, the hidden states of every sample's scored tokens
        """
        chunks_read: Sequence[Tensor | None] = [None] * len(instance.samples)
        if other is not None:
            # A longer document's last samples are not read.
            chunks_read = [sample.chunks for sample in other.samples[: len(instance.samples)]]
        pairs = list(zip(instance.samples, chunks_read, strict=True))

        def batches(number: int) -> Iterator[ScoredRows]:
            sample, chunks = pairs[number]
            if pressed is not None:
                return pressed_hidden(self.model, sample, pressed[number])
            return scored_hidden(self.model, sample, mode, chunks)

        losses = [losses_of(self.model, s, batches(n)) for n, (s, _) in enumerate(pairs)]
        loss, nll = (torch.cat(column).float() for column in zip(*losses, strict=True))
        if task.task_type == "auto encoding":  # its samples are chunks that all start at 0
            positions = torch.arange(len(nll))
        else:
            positions = torch.cat([scored_positions(sample) for sample in instance.samples])
        details: dict[str, Any] = {}
        if task.task_type in RETRIEVAL_TASKS:
            details = {
                "correct": all(all_likeliest(self.model, batches(n)) for n in range(len(pairs))),
                "depth": instance.depth,
            }
        elif task.task_type in COPY_TASKS:
            details = self._copy(task.task_type, pairs, mode, show)
        elif instance.prompt is not None and mode in (*ANSWER_MODES, "shuffled"):
            details = {"texts": (self._answer(instance, mode, other, task.max_new_tokens),)}
        if instance.question and "texts" in details:
            ((_, text),) = details["texts"]
            score = score_answer(text, instance.question)
            details["answer"] = instance.question.metric, score
        return DocumentScore(nll, loss, positions, **details)

    def _copy(
        self, task_type: str, pairs: Sequence[tuple[Sample, Tensor | None]], mode: str, show: bool
    ) -> dict[str, Any]:
        """Generates free-running copies of a document's chunks, and compares them with the
        originals."""
        originals = torch.cat([sample.chunks for sample, _ in pairs])
        chunks_read = torch.cat(
            [
                sample.chunks if chunks is None else chunks[: len(sample.chunks)]
                for sample, chunks in pairs
            ]
        )
        if mode == "window":
            count = 1 if task_type == "auto encoding" else len(originals)
            copies = greedy_copy(self.model, originals[:0], count).expand(len(originals), -1)
        elif task_type == "auto encoding":
            copies = greedy_reconstruction(self.model, chunks_read)
        else:
            copies = greedy_copy(self.model, chunks_read, len(originals))
        details: dict[str, Any] = {
            "texts": tuple(
                (self._decode(original), self._decode(copy))
                for original, copy in zip(originals, copies, strict=True)
            ),
            "hits": (int((copies == originals).sum()), originals.numel()),
        }
        if show:
            sample, other = pairs[0]
            found = scored_hidden(self.model, sample, mode, other)
            guesses = torch.cat([self.model.logits(h).argmax(-1).cpu() for _, h, _ in found])
            details["written"] = written_chunk(
                originals[0], copies[0], guesses[: originals.shape[1]], self._decode
            )
        return details

    def _answer(
        self, instance: Instance, mode: str, other: Instance | None, most: int | None
    ) -> tuple[str, str]:
        """(reference, greedy answer).

        other: the document that replaces the prompt's full chunks, for mode "shuffled"
        most:  largest number of tokens of the answer, see `_answer_length`
        """
        assert instance.prompt is not None and instance.response is not None
        prompt, memory = instance.prompt, self.model.memory_config
        answering: Any = self.model
        if mode == "shuffled":
            assert other is not None
            num_chunks = (len(prompt) - 1) // memory.chunk_size
            others = other.samples[0].chunks[:num_chunks].flatten()
            prompt = torch.cat([others, prompt[num_chunks * memory.chunk_size :]])
        elif mode != "memory":
            answering = self.model.base
            prompt = torch.tensor(base_prompt(prompt.tolist(), memory, mode))
        ids = prompt[None].to(self.model.device)
        output = answering.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=self._answer_length(instance, mode, most),
        )
        return self._decode(instance.response), self._decode(output[0, ids.shape[1] :])

    def _answer_length(self, instance: Instance, mode: str, most: int | None) -> int:
        """Largest number of tokens of an answer: the benchmark's, or `most`, or those of the
        reference. With the prompt they fit the capacity, in mode raw the base's positions."""
        assert instance.prompt is not None and instance.response is not None
        wanted = most or len(instance.response)
        if instance.question:
            wanted = instance.question.max_new_tokens
        limit = self.model.limits.positions if mode == "raw" else self.model.capacity
        return max(1, min(wanted, limit - len(instance.prompt)))

    def _decode(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def reads_raw(mode: str) -> bool:
    """Whether the base reads the whole raw context in a mode, so that its positions limit it."""
    return mode in ("raw", "pooled") or is_press(mode)
