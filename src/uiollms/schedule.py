"""When a run's optimizer steps are due and at which learning rate: everything is counted in documents.

`train_iters`, `save`, `eval` and `warmup` number documents of all processes together, as the loop index of
the released program does. A step takes `accum_grad` documents of every process that has its own, and is
due with the last of them; what is left over at the end fills no step and trains nothing, there as here.
Runs begun before documents were counted here number steps, and go on as they began.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from uiollms.config import ConfigError, TrainSection

Counts = Literal["documents", "steps"]


@dataclass(frozen=True)
class Schedule:
    """documents: of a step, all processes together; counts: what an iteration is, a document or a step.
    Raises ConfigError where `train_iters` is not enough for one step."""

    train: TrainSection
    documents: int
    counts: Counts = "documents"

    def __post_init__(self) -> None:
        if self.train.train_iters < self.stride:
            raise ConfigError(
                f"train.train_iters: {self.train.train_iters} documents make no step of {self.documents} "
                f"(train.accum_grad {self.train.accum_grad} of every process); use at least {self.documents}"
            )

    @property
    def stride(self) -> int:
        """Iterations of a step."""
        return self.documents if self.counts == "documents" else 1

    def steps(self, done: int = 0) -> range:
        """Of every step that is left after `done` iterations, how many are done at its end."""
        return range(done + self.stride, self.train.train_iters + 1, self.stride)

    def left_over(self, done: int) -> int:
        """Iterations of `train_iters` that fill no step, for a run that has ended after `done`."""
        return max(0, self.train.train_iters - done)  # a run that goes on may have gone further before

    def reaches(self, done: int, every: int) -> bool:
        """Whether the step that ended after `done` iterations reached a multiple of `every`."""
        return done // every > max(0, done - self.stride) // every

    def learning_rate(self, done: int) -> float:
        """Of the step that ends after `done` iterations: that of its last document, number `done - 1`,
        whose turn it is when the released loop steps."""
        rate = rate_of_document if self.counts == "documents" else rate_of_step
        return rate(done - 1, self.train)


def rate_of_document(i: int, train: TrainSection) -> float:
    """The released program's rate at document i, from 0 on: with T = train_iters and w = int(T * warmup)
    linear from 0 while i / T < warmup, then cosine to 0. w = 0 means no warm-up (it divides by it)."""
    T, w = train.train_iters, int(train.train_iters * train.warmup)
    if w and i / T < train.warmup:
        return train.max_lr * i / w
    return train.max_lr / 2 * (1 + math.cos(math.pi * (i - w) / (T - w)))


def rate_of_step(i: int, train: TrainSection) -> float:
    """Of runs that count steps: step i, from 0 on, has (i + 1) / w of the peak, w = train_iters * warmup
    rounded up; then cosine to 0."""
    w = math.ceil(train.warmup * train.train_iters)
    if i < w:
        return train.max_lr * (i + 1) / w
    progress = (i - w) / max(1, train.train_iters - w)
    return train.max_lr * 0.5 * (1 + math.cos(math.pi * progress))
