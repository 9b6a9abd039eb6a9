"""When a run's optimizer steps are due and at which learning rate: everything is counted in
documents.

`train_iters`, `save`, `eval` and `warmup` number documents of all processes together, as the
loop index of the released program does. A step takes `accum_grad` documents of every process
that has its own, and is due with the last of them; what is left over at the end fills no step
and trains nothing, there as here. Runs begun before documents were counted here number steps,
and go on as they began.

A run in stages is several such schedules, one after the other, whose borders lie between two
steps.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal, NamedTuple

from uiollms.config.corpora import Size
from uiollms.config.sections import TrainSection
from uiollms.files.errors import ConfigError

Counts = Literal["documents", "steps"]


@dataclass(frozen=True)
class Schedule:
    """documents: of a step, all processes together; counts: what an iteration is, a document or
    a step; begun: the borders of a run that goes on, which hold however long it is now. Raises
    ConfigError where `train_iters` is not enough for one step of every stage."""

    train: TrainSection
    documents: int
    counts: Counts = "documents"
    begun: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        iterations = self.train.train_iters
        if iterations < self.stride:
            raise ConfigError(
                f"train.train_iters: {iterations} documents make no step of {self.documents} "
                f"(train.accum_grad {self.train.accum_grad} of every process); use at least "
                f"{self.documents}"
            )
        for number, (start, stop) in enumerate(itertools.pairwise((0, *self.borders, iterations))):
            if stop - start < self.stride:
                raise ConfigError(
                    f"train.stages[{number}]: of {iterations} documents (train.train_iters) it has "
                    f"those behind {start} up to {stop}, no step of {self.documents}; raise "
                    "train_iters or its share"
                )

    @property
    def stride(self) -> int:
        """Iterations of a step."""
        return self.documents if self.counts == "documents" else 1

    @property
    def borders(self) -> tuple[int, ...]:
        """Iterations done where a stage ends and the next one begins, the end of the last left
        out."""
        if self.begun:
            return self.begun
        shares = itertools.accumulate(stage.share for stage in self.train.stages[:-1])
        steps = self.train.train_iters / self.stride
        return tuple(round(share * steps) * self.stride for share in shares)

    def steps(self, done: int = 0) -> range:
        """Of every step that is left after `done` iterations, how many are done at its end."""
        return range(done + self.stride, self.train.train_iters + 1, self.stride)

    def left_over(self, done: int) -> int:
        """Iterations of `train_iters` that fill no step, for a run that has ended after `done`."""
        return max(
            0, self.train.train_iters - done
        )  # a run that goes on may have gone further before

    def reaches(self, done: int, every: int) -> bool:
        """Whether the step that ended after `done` iterations reached a multiple of `every`."""
        return done // every > max(0, done - self.stride) // every

    def stage(self, done: int) -> int:
        """The number of the stage, from 0 on, of the step that ends after `done` iterations:
        that of its last document. Without stages the run is one."""
        return bisect_right(self.borders, done - 1)

    def size(self, done: int) -> Size | None:
        """chunk_size and num_memory of the step that ends after `done` iterations, drawn from
        the seed and the step; None: the compressor config's."""
        stages = self.train.stages
        sizes = stages[self.stage(done)].sizes if stages else None
        if sizes is None:
            return None
        return random.Random(f"{self.train.seed} size {done // self.stride}").choice(sizes)

    def learning_rate(self, done: int) -> float:
        """Of the step that ends after `done` iterations: that of its last document, number `done
        - 1` (of its stage), whose turn it is when the released loop steps."""
        stage, ends = self.stage(done), (0, *self.borders, self.train.train_iters)
        start, stop = ends[stage], ends[stage + 1]
        max_lr, warmup = self.train.max_lr, self.train.warmup
        if self.train.stages:
            own = self.train.stages[stage]
            max_lr = max_lr if own.max_lr is None else own.max_lr
            warmup = warmup if own.warmup is None else own.warmup
        course = Course(stop - start, max_lr, warmup)
        rate = rate_of_document if self.counts == "documents" else rate_of_step
        return rate(done - 1 - start, course)


class Course(NamedTuple):
    """A learning rate's rise and fall over `train_iters` iterations; warmup: the share in which
    it rises."""

    train_iters: int
    max_lr: float
    warmup: float


def rate_of_document(i: int, course: Course) -> float:
    """The released program's rate at document i, from 0 on: with T = train_iters and w = int(T *
    warmup) linear from 0 while i / T < warmup, then cosine to 0. w = 0 means no warm-up (it
    divides by it)."""
    T, w = course.train_iters, int(course.train_iters * course.warmup)
    if w and i / T < course.warmup:
        return course.max_lr * i / w
    return course.max_lr / 2 * (1 + math.cos(math.pi * (i - w) / (T - w)))


def rate_of_step(i: int, course: Course) -> float:
    """Of runs that count steps: step i, from 0 on, has (i + 1) / w of the peak, w = train_iters
    * warmup rounded up; then cosine to 0."""
    w = math.ceil(course.warmup * course.train_iters)
    if i < w:
        return course.max_lr * (i + 1) / w
    progress = (i - w) / max(1, course.train_iters - w)
    return course.max_lr * 0.5 * (1 + math.cos(math.pi * progress))
