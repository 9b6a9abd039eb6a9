"""When the optimizer's steps of a run are due, and their learning rate. Everything is counted in
documents.

`train_iters`, `save`, `eval` and `warmup` count documents of all processes together, as the loop
index of the released program does. A step takes `accum_grad` documents of every process that has
documents of its own, and is due after the last of them. Documents that are left at the end and
fill no step are not trained on, as in the released program. Runs that were begun before documents
were counted count steps, and continue to do so.

A run in stages has several such schedules, one after the other. They meet between two steps.
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
    """documents: the documents of one step, of all processes together; counts: what an iteration
    is, a document or a step; fixed_borders: the borders of a run that continues, which do not
    move if `train_iters` does. Raises ConfigError if `train_iters` does not give every stage one
    step."""

    train: TrainSection
    documents: int
    counts: Counts = "documents"
    fixed_borders: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        iterations = self.train.train_iters
        if iterations < self.stride:
            raise ConfigError(
                f"train.train_iters: {iterations} documents are less than one step of "
                f"{self.documents} (train.accum_grad {self.train.accum_grad} of every process); "
                f"use at least {self.documents}"
            )
        for number, (start, stop) in enumerate(itertools.pairwise((0, *self.borders, iterations))):
            if stop - start < self.stride:
                raise ConfigError(
                    f"train.stages[{number}]: it has the documents {start} to {stop} of "
                    f"{iterations} (train.train_iters), less than one step of {self.documents}; "
                    "raise train_iters or the stage's share"
                )

    @property
    def stride(self) -> int:
        """The iterations of one step."""
        return self.documents if self.counts == "documents" else 1

    @property
    def borders(self) -> tuple[int, ...]:
        """The iterations after which a stage ends and the next one begins; without the end of the
        last stage."""
        if self.fixed_borders:
            return self.fixed_borders
        ends = itertools.accumulate(stage.share for stage in self.train.stages[:-1])
        steps = self.train.train_iters / self.stride
        return tuple(round(end * steps) * self.stride for end in ends)

    def steps(self, done: int = 0) -> range:
        """Returns, for every step that follows after `done` iterations, the iterations at its
        end."""
        return range(done + self.stride, self.train.train_iters + 1, self.stride)

    def left_over(self, done: int) -> int:
        """Returns how many iterations of `train_iters` fill no step, for a run that ended after
        `done` iterations. A resumed run may have done more than `train_iters` before."""
        return max(0, self.train.train_iters - done)

    def reaches(self, done: int, every: int) -> bool:
        """Whether the step that ended after `done` iterations reached a multiple of `every`."""
        return done // every > max(0, done - self.stride) // every

    def stage(self, done: int) -> int:
        """Returns the number of the stage, from 0 on, of the step that ends after `done`
        iterations. Without stages it is 0."""
        return bisect_right(self.borders, done - 1)

    def size(self, done: int) -> Size | None:
        """Returns chunk_size and num_memory of the step that ends after `done` iterations. They are
        drawn from the stage's sizes by the seed and the step; None means the compressor config's.
        """
        stages = self.train.stages
        sizes = stages[self.stage(done)].sizes if stages else None
        if sizes is None:
            return None
        return random.Random(f"{self.train.seed} size {done // self.stride}").choice(sizes)

    def learning_rate(self, done: int) -> float:
        """Returns the learning rate of the step that ends after `done` iterations. It is the rate
        of the step's last document, number `done - 1` in its stage, as in the released program."""
        stage, ends = self.stage(done), (0, *self.borders, self.train.train_iters)
        start, stop = ends[stage], ends[stage + 1]
        max_lr, warmup = self.train.max_lr, self.train.warmup
        if self.train.stages:
            section = self.train.stages[stage]
            max_lr = max_lr if section.max_lr is None else section.max_lr
            warmup = warmup if section.warmup is None else section.warmup
        course = Course(stop - start, max_lr, warmup)
        rate = rate_of_document if self.counts == "documents" else rate_of_step
        return rate(done - 1 - start, course)


class Course(NamedTuple):
    """The course of a learning rate over `train_iters` iterations: it rises to `max_lr` during the
    first part `warmup` of them, a fraction, then falls."""

    train_iters: int
    max_lr: float
    warmup: float


def rate_of_document(i: int, course: Course) -> float:
    """Returns the released program's rate at document i, from 0 on. With T = train_iters and w =
    int(T * warmup) it rises linearly from 0 while i / T < warmup, then follows a cosine to 0. With
    w = 0 there is no warm-up (the released program divides by w)."""
    T, w = course.train_iters, int(course.train_iters * course.warmup)
    if w and i / T < course.warmup:
        return course.max_lr * i / w
    return course.max_lr / 2 * (1 + math.cos(math.pi * (i - w) / (T - w)))


def rate_of_step(i: int, course: Course) -> float:
    """Returns the rate at step i, from 0 on, of runs that count steps. It is (i + 1) / w of the
    peak during the first w steps, with w = train_iters * warmup rounded up, then follows a cosine
    to 0."""
    w = math.ceil(course.warmup * course.train_iters)
    if i < w:
        return course.max_lr * (i + 1) / w
    progress = (i - w) / max(1, course.train_iters - w)
    return course.max_lr * 0.5 * (1 + math.cos(math.pi * progress))
