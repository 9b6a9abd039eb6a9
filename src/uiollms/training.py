"""What surrounds the training step: samples from documents, the learning rate, evaluations."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.config import ConfigError, CorpusEntry, EnvConfig, TaskEntry, TrainSection
from uiollms.data import Document, Mixture, NewsDocument, TokenDocument, open_corpus
from uiollms.data.mixture import Draw
from uiollms.distributed import ALONE, Group
from uiollms.evaluate import PROTOCOLS, PerplexityResult, evaluate_perplexity
from uiollms.model import MemoryLM
from uiollms.tasks import Sample

log = logging.getLogger("uiollms")


def learning_rate(iteration: int, config: TrainSection) -> float:
    """Linear warm-up over the first `warmup` share of `train_iters` (rounded up), then cosine to 0. The first iteration
    already learns: with W warm-up iterations, iteration i (0-based) has (i + 1) / W of the peak."""
    warmup = math.ceil(config.warmup * config.train_iters)
    if iteration < warmup:
        return config.max_lr * (iteration + 1) / warmup
    progress = (iteration - warmup) / max(1, config.train_iters - warmup)
    return config.max_lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: MemoryLM, config: TrainSection) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.trainable_parameters().values(),
        lr=config.max_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> Tensor:
    """[T] int64, with the tokenizer's own first tokens (BOS) if `special`; its warning about length is off, memory is there
    for that."""
    return torch.tensor(tokenizer(text, verbose=False, add_special_tokens=special).input_ids, dtype=torch.int64)


@dataclass(frozen=True)
class Drawn:
    """A document for the training step. rng: of its reservoirs and LoRA dropout, as much its own as its text, so that neither the
    number of processes nor a restart changes them."""

    source: str
    sample: Sample
    rng: random.Random


class Samples:
    """The endless stream of training samples from the documents of `train.corpus`, the same in every process. A document that no
    memory can help with (blank, plain text that fits one chunk, an answer within the first) trains nothing: it is skipped and
    counted."""

    MOST_SKIPPED = 10_000  # in a row, before the corpora count as unusable

    def __init__(self, config: EnvConfig, tokenizer: PreTrainedTokenizerBase, model: MemoryLM) -> None:
        self.entries: Sequence[CorpusEntry] = config.train.corpus
        corpora = [open_corpus(entry.name, tokenizer) for entry in self.entries]
        self.seed = config.train.seed
        self.mixture = Mixture(corpora, [entry.partition for entry in self.entries], self.seed)
        self.tokenizer, self.model = tokenizer, model
        self.protocol = PROTOCOLS[config.train.loss]
        self.skipped = 0

    def take(self, count: int, group: Group = ALONE) -> list[Drawn]:
        """The stream's next `count` samples, or of those every `group.size`-th from number `group.rank`. Each process opens its
        own, and they tell each other which are skipped, so all go on from the same place. Raises ConfigError if all are."""
        taken: list[Draw] = []
        opened: dict[int, Drawn | None] = {}
        in_a_row = 0
        while len(taken) < count:
            draws = [next(self.mixture) for _ in range(count - len(taken))]
            for draw in draws[group.rank :: group.size]:
                opened[draw.number] = self.open(draw)
            holders = group.sum(*(opened.get(draw.number) is not None for draw in draws))
            for draw, used in zip(draws, holders, strict=True):
                taken += [draw] if used else []
                in_a_row = 0 if used else in_a_row + 1
                self.skipped += not used
                if in_a_row == self.MOST_SKIPPED:
                    raise ConfigError(
                        f"train.corpus: {in_a_row} documents in a row are blank or fit one chunk of "
                        f"{self.model.memory_config.chunk_size} tokens; memory needs longer ones; the last is "
                        f"{self.mixture.open(draw).source}"
                    )
        mine = [opened.get(draw.number) or self.open(draw) for draw in taken[group.rank :: group.size]]
        return [drawn for drawn in mine if drawn]

    def open(self, draw: Draw) -> Drawn | None:
        """The sample of a draw, None where it trains nothing; the same in every process and at any time."""
        document = self.mixture.open(draw)
        if document.is_empty:
            return None
        sample = self.sample_of(document, self.entries[draw.corpus], self.generator("sample", draw))
        if not any(row.num_memories and len(row.scored) for row in sample.rows):
            return None
        return Drawn(document.source, sample, self.generator("step", draw))

    def generator(self, use: str, draw: Draw) -> random.Random:
        return random.Random(f"{self.seed} {use} {draw.number}")

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, in plain lists and numbers (JSON)."""
        return {"mixture": self.mixture.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the corpora have changed since the state was taken."""
        self.mixture.load_state_dict(state["mixture"])
        self.skipped = state["skipped"]

    def sample_of(self, document: Document, entry: CorpusEntry, rng: random.Random) -> Sample:
        """A document -> its sample, by its task and the corpus's `truncation`; rng: of crops and other places. Raises
        ConfigError, naming the document, where it does not fit."""
        try:
            return self.build(document, entry, entry.truncation or self.model.capacity, rng)
        except ValueError as error:
            raise ConfigError(f"{document.source}: {error}") from None

    def build(self, document: Document, entry: CorpusEntry, most: int, rng: random.Random) -> Sample:
        chunk_size = self.model.memory_config.chunk_size
        if isinstance(document, TokenDocument):
            ids, labels = (torch.tensor(side[:most]) for side in (document.input_ids, document.labels))
            sample = Sample.beacon(ids, labels, chunk_size)
            return sample.distilled(document.kl_weight) if document.kl_weight else sample
        if isinstance(document, NewsDocument):
            return self.ask_news(document, most, rng)
        ids = tokenize(self.tokenizer, document.text)
        if document.task == "question answering":
            response = tokenize(self.tokenizer, document.response or "", special=False)
            return Sample.question_answering(ids, response, chunk_size, document.train_prompt, most)
        if document.task == "memory utilization":
            probe = torch.tensor([rng.randrange(self.model.config.vocab_size) for _ in range(chunk_size)])
            ids = ids[: min(most, self.model.config.max_position_embeddings - chunk_size)]
            enough = len(ids) >= chunk_size
            return Sample.memory_utilization(ids, probe, chunk_size) if enough else Sample.document(ids, chunk_size)
        if document.task in ("auto encoding", "longdata copy"):
            ids = ids[: min(most, self.model.capacity - chunk_size)]  # the copies stand behind all memories
            return Sample.copy(ids, chunk_size) if len(ids) >= chunk_size else Sample.document(ids, chunk_size)
        return self.protocol(self.cut(ids, entry, rng), chunk_size)

    def ask_news(self, document: NewsDocument, most: int, rng: random.Random) -> Sample:
        """The story hidden at a random place of its distractor text, together a whole number of chunks within `most` tokens
        (and, where a teacher reads them raw, within the base's positions); every question and the summary asked of it."""
        chunk_size = self.model.memory_config.chunk_size
        if document.kl_weight:
            most = min(most, self.model.config.max_position_embeddings - chunk_size)
        most = most // chunk_size * chunk_size
        story = tokenize(self.tokenizer, document.text)[:most]
        around = tokenize(self.tokenizer, document.distractor, special=False)
        whole = (len(story) + len(around)) // chunk_size * chunk_size
        around = around[: max(0, min(most, whole) - len(story))]
        place = rng.randint(0, len(around))
        context = torch.cat([around[:place], story, around[place:]])
        asked = [(f"Question: {question}\nAnswer:", answer) for question, answer in document.questions]
        asked += [("Summary of the story:", document.summary)] if document.summary.strip() else []
        tokens = [tuple(tokenize(self.tokenizer, side, special=False) for side in (q, f" {a}")) for q, a in asked]
        fitting = [(q, a[: chunk_size - 1]) for q, a in tokens]
        return Sample.questions(context, fitting, chunk_size, document.kl_weight)

    def cut(self, ids: Tensor, entry: CorpusEntry, rng: random.Random) -> Tensor:
        """At most `truncation` tokens, from the start or from a random place; without one, at most the capacity."""
        length = min(entry.truncation or len(ids), self.model.capacity)
        start = rng.randint(0, len(ids) - length) if entry.crop == "random" and len(ids) > length else 0
        return ids[start : start + length]


class Evaluation:
    """The evaluation tasks of a run. Documents are tokenised once, and what the frozen base scores on its own (window,
    raw) is computed once: only memory changes while training goes on."""

    def __init__(self, model: MemoryLM, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[TaskEntry]) -> None:
        self.model, self.tasks = model, tasks
        self.documents = [evaluation_documents(model, tokenizer, task) for task in tasks]
        self.baselines: list[PerplexityResult | None] = [None] * len(tasks)

    def run(self, progress: Callable[[list[Tensor]], Iterable[Tensor]] = iter) -> list[PerplexityResult]:
        """Evaluate the model as it is now; documents are scored independently of each other."""
        results = []
        was_training = self.model.training
        self.model.eval()
        for i, (task, documents) in enumerate(zip(self.tasks, self.documents, strict=True)):

            def measure(modes: Sequence[str], task: TaskEntry = task, documents: list[Tensor] = documents) -> PerplexityResult:
                return evaluate_perplexity(self.model, progress(documents), task.task_name, task.truncation, modes)

            baseline = self.baselines[i] = self.baselines[i] or measure(task.compare)
            result = measure(["memory"])
            results.append(replace(result, per_document=result.per_document | baseline.per_document))
        self.model.train(was_training)
        return results


def evaluation_documents(model: MemoryLM, tokenizer: PreTrainedTokenizerBase, task: TaskEntry) -> list[Tensor]:
    """Token ids [T] of a task's documents: the first `num_instance` of its corpus that fill `truncation`, and where there
    are not so many, the first shorter ones of more than a chunk. Raises ConfigError if there is none."""
    corpus = open_corpus(task.task_name, tokenizer)
    length = min(task.truncation or model.capacity, model.capacity)
    full: list[Tensor] = []
    shorter: list[Tensor] = []
    for i in range(len(corpus)):
        ids = tokenize(tokenizer, corpus[i].text)[:length]
        if len(ids) > model.memory_config.chunk_size:
            (full if len(ids) == length else shorter).append(ids)
        if len(full) == task.num_instance:
            break
    documents = (full + shorter)[: task.num_instance]
    if not documents:
        raise ConfigError(f"corpus {task.task_name!r} has no document longer than one chunk")
    if len(documents) < task.num_instance:
        log.warning("%s: %d documents of the %d asked for", task.task_name, len(documents), task.num_instance)
    return documents
