"""What surrounds the training step: samples from documents, the optimizer, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from uiollms.config import ConfigError, CorpusEntry, EnvConfig, TrainSection
from uiollms.data import Mixture, open_corpus
from uiollms.model import MemoryLM
from uiollms.samples import SampleMaker, teaches_memory
from uiollms.tasks import Sample


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


class Samples(Iterator[Sample]):
    """An endless stream of training samples from the documents of `train.corpus`. A document that no memory can help with
    (plain text that fits one chunk, an answer within the first) trains nothing: it is skipped and counted."""

    MOST_SKIPPED = 10_000  # in a row, before the corpora count as unusable

    def __init__(self, config: EnvConfig, tokenizer: PreTrainedTokenizerBase, model: MemoryLM) -> None:
        self.entries: Sequence[CorpusEntry] = config.train.corpus
        corpora = [open_corpus(entry.name, tokenizer) for entry in self.entries]
        self.mixture = Mixture(corpora, [entry.partition for entry in self.entries], config.train.seed)
        self.maker = SampleMaker(model, tokenizer, config.train.loss)
        self.skipped = 0
        self.source = ""  # of the last sample's document

    def __next__(self) -> Sample:
        for _ in range(self.MOST_SKIPPED):
            number, document = next(self.mixture)
            entry = self.entries[number]
            sample = self.maker.make(document, entry.truncation, self.mixture.rng, entry.crop)
            if teaches_memory(sample):
                self.source = document.source
                return sample
            self.skipped += 1
        raise ConfigError(
            f"train.corpus: {self.MOST_SKIPPED} documents in a row fit one chunk of "
            f"{self.maker.model.memory_config.chunk_size} tokens; memory needs longer ones"
        )

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, in plain lists and numbers (JSON)."""
        return {"mixture": self.mixture.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the corpora have changed since the state was taken."""
        self.mixture.load_state_dict(state["mixture"])
        self.skipped = state["skipped"]
