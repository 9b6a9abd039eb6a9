"""What surrounds the training step: samples from documents, the learning rate, the run folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
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

    def __next__(self) -> Sample:
        for _ in range(self.MOST_SKIPPED):
            number, document = next(self.mixture)
            entry = self.entries[number]
            sample = self.maker.make(document, entry.truncation, self.mixture.rng, entry.crop)
            if teaches_memory(sample):
                return sample
            self.skipped += 1
        raise ConfigError(
            f"train.corpus: {self.MOST_SKIPPED} documents in a row fit one chunk of "
            f"{self.maker.model.memory_config.chunk_size} tokens; memory needs longer ones"
        )


class Run:
    """The run folder: resolved config, metrics as JSON lines, plots."""

    def __init__(self, config: EnvConfig, env_conf: str | Path) -> None:
        self.folder = Path(config.train.run_dir or Path("runs") / Path(env_conf).stem)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(config.model_dump_json(indent=4) + "\n")
        self.metrics = self.folder / "metrics.jsonl"
        self.metrics.write_text("")
        self.started = time.time()

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl, with the seconds since the run began."""
        line = json.dumps({"seconds": round(time.time() - self.started, 2), **values})
        with self.metrics.open("a") as file:
            file.write(line + "\n")
