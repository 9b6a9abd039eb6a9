"""Measures seconds and peak memory of one training step for every estimator and S."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from uiollms.data.sample import Sample
from uiollms.kernels.peak_memory import PeakMemory
from uiollms.model.memory_lm import MemoryLM
from uiollms.study.gradients import NAMES, estimators_of
from uiollms.training.step import gradient_step


def study_cost(
    model: MemoryLM,
    ids: Tensor,
    sizes: Sequence[int],
    repeats: int = 1,
    names: Sequence[str] = NAMES,
    bar: Callable[..., Iterable[Any]] = tqdm,
) -> list[dict[str, Any]]:
    """One row per estimator and S: median seconds and peak memory of a training step, and the
    number of chunks that were encoded again.

    ids:     token ids [T] of the document
    sizes:   values of S
    repeats: how often each estimator runs; they run in turn, so that other load on the machine
             slows all alike
    bar:     wraps the steps in a progress bar
    """
    sample = Sample.language_modeling(ids, model.memory_config.chunk_size)
    gradient_step(model, sample, estimator="tbptt", S=1)  # warm up
    measured = [
        (name, S, estimator) for name, S, estimator in estimators_of(sizes) if name in names
    ]
    seconds: list[list[float]] = [[] for _ in measured]
    backwards: list[list[int]] = [[] for _ in measured]
    peaks: list[list[int]] = [[] for _ in measured]
    for seed in range(repeats):
        for i, (*_, estimator) in enumerate(
            bar(measured, desc=f"steps, turn {seed + 1} of {repeats}")
        ):
            model.zero_grad(set_to_none=True)
            with PeakMemory(model.device) as peak:
                start = time.perf_counter()
                result = gradient_step(
                    model, sample, estimator=estimator, rng=seed, report_all=False
                )
                seconds[i].append(time.perf_counter() - start)
            peaks[i].append(peak.bytes)
            backwards[i].append(len(result.reencoded))
    return [
        {
            "estimator": name,
            "S": S,
            "encoder_backwards": statistics.mean(backwards[i]),
            "seconds": statistics.median(seconds[i]),
            "peak_mib": max(peaks[i]) / 2**20,
        }
        for i, (name, S, _) in enumerate(measured)
    ]
