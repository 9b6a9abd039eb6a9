"""Compares what is learned with different gradient estimators.

All runs of one seed start from the same weights, new or loaded, and read the same documents in the
same order; only the encoder's gradient differs. The learning rate stays constant after its warm-up,
so curves can be compared at any iteration, and after any number of seconds.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from uiollms.config.sections import TrainSection
from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import token_losses
from uiollms.files.atomic import atomic_file
from uiollms.model.memory_lm import MemoryLM
from uiollms.study.gradients import INFINITE
from uiollms.training.estimators import Estimator
from uiollms.training.optimizer import make_optimizer, optimizer_step
from uiollms.training.schedule import Schedule
from uiollms.training.step import gradient_step

# 97.5 % quantiles of Student's t for 1 .. 9 degrees of freedom, for intervals of 2 .. 10 seeds
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def held_out_nll(model: MemoryLM, samples: Sequence[Sample]) -> float:
    """Mean NLL with memory of all scored tokens of `samples`, in nats."""
    return (
        torch.cat([token_losses(model, sample, "memory")[1] for sample in samples])
        .double()
        .mean()
        .item()
    )


def learn(
    model: MemoryLM,
    samples: Iterator[Sample],
    held_out: Sequence[Sample],
    estimator: Estimator,
    train: TrainSection,
) -> dict[str, Any]:
    """Trains a model on `train.train_iters` documents -> its held-out NLL in nats, after every
    `train.eval` documents, and the iterations, which are optimizer steps here."""
    optimizer = make_optimizer(model, train)
    schedule = Schedule(train, train.accum_grad)
    steps = schedule.steps()
    warmup = max(1, math.ceil(train.warmup * len(steps)))
    rng = random.Random(train.seed)
    model.train()
    iterations, nll = [0], [held_out_nll(model, held_out)]
    for iteration, done in enumerate(steps, start=1):
        gradient_step(
            model,
            [next(samples) for _ in range(train.accum_grad)],
            estimator=estimator,
            rng=[rng] * train.accum_grad,
            scale=1 / train.accum_grad,
            report_all=False,
        )
        optimizer_step(optimizer, train.max_lr * min(1, iteration / warmup), train.clip_grad)
        if schedule.reaches(done, train.eval):
            iterations.append(iteration)
            nll.append(held_out_nll(model, held_out))
    return {"iterations": iterations, "nll": nll}


def step_seconds(
    estimators: Sequence[tuple[str, int, Estimator]],
    start: Callable[[int], tuple[MemoryLM, Iterator[Sample]]],
    rounds: int = 7,
) -> dict[tuple[str, int], float]:
    """Median seconds of a gradient step by (name, S) of the estimator. All estimators run in turn
    on the same documents, so that other load on the machine slows all alike."""
    model, samples = start(0)
    model.train()
    gradient_step(model, next(samples), estimator="exact", report_all=False)  # warm up
    seconds: dict[tuple[str, int], list[float]] = {(name, S): [] for name, S, _ in estimators}
    for seed in range(rounds):
        sample = next(samples)
        for name, S, estimator in estimators:
            started = time.perf_counter()
            gradient_step(model, sample, estimator=estimator, rng=seed, report_all=False)
            seconds[name, S].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def compare(
    estimators: Sequence[tuple[str, int, Estimator]],
    seeds: Sequence[int],
    start: Callable[[int], tuple[MemoryLM, Iterator[Sample]]],
    held_out: Sequence[Sample],
    train: TrainSection,
    done: Sequence[dict[str, Any]],
    record: Callable[[dict[str, Any]], None],
    bar: Callable[..., Iterable[Any]] = tqdm,
) -> None:
    """Trains with every estimator (name, S, object) and every seed, seed by seed.

    start:  maps a seed to a model and its stream of documents
    done:   curves of trainings that are skipped
    record: is called with each new curve
    """
    runs = [(seed, *estimator) for seed in seeds for estimator in estimators]
    finished = {(curve["seed"], curve["estimator"], curve["S"]) for curve in done}
    for seed, name, S, estimator in bar(
        [run for run in runs if run[:3] not in finished], desc="trainings"
    ):
        model, samples = start(seed)
        curve = learn(model, samples, held_out, estimator, train.model_copy(update={"seed": seed}))
        record({"estimator": name, "S": S, "seed": seed} | curve)


def summarise(
    curves: Sequence[dict[str, Any]], seconds: dict[tuple[str, int], float]
) -> list[dict[str, Any]]:
    """One row per estimator: held-out NLL after all iterations, and after as many iterations as it
    finishes in the time that the fastest estimator takes for all.

    seconds: of one step, by (estimator, S)

    Numbers are means over seeds, +- the half width of a 95 % Student interval. "to exact" is the
    mean difference to the run of the exact estimator with the same seed.
    """
    names = list(dict.fromkeys((curve["estimator"], curve["S"]) for curve in curves))
    last = curves[0]["iterations"][-1]
    affordable = {name: last * min(seconds[n] for n in names) / seconds[name] for name in names}

    def at(curve: dict[str, Any], iteration: float) -> float:
        return interpolated(curve["iterations"], curve["nll"], iteration)

    exact = {curve["seed"]: curve for curve in curves if curve["estimator"] == "exact"}
    exact_affordable = next(
        (count for (name, _), count in affordable.items() if name == "exact"), last
    )
    rows = []
    for name in names:
        estimator_curves = [curve for curve in curves if (curve["estimator"], curve["S"]) == name]
        row: dict[str, Any] = {
            "estimator": name[0],
            "S": name[1],
            "seeds": len(estimator_curves),
            "step_seconds": seconds[name],
        }
        paired = [curve for curve in estimator_curves if curve["seed"] in exact]
        for label, iteration, exact_iteration in (
            ("equal iterations", last, last),
            ("equal seconds", affordable[name], exact_affordable),
        ):
            row[label] = interval([at(curve, iteration) for curve in estimator_curves])
            differences = [
                at(curve, iteration) - at(exact[curve["seed"]], exact_iteration) for curve in paired
            ]
            row[f"{label}, to exact"] = "" if name[0] == "exact" else interval(differences)
        rows.append(row)
    return rows


def interpolated(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Linear interpolation of the points (x, y) at `at`. Past the last point it is the last y."""
    for (x0, y0), (x1, y1) in zip(
        zip(x, y, strict=True), zip(x[1:], y[1:], strict=True), strict=False
    ):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return y[-1]


def interval(values: Sequence[float]) -> str:
    """ "mean +- half width" of a 95 % Student interval. A single value is shown without a width."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3f}"
    if len(values) == 1:
        return mean
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} +- {half:.3f}"


def plot_curves(
    panels: dict[str, Sequence[dict[str, Any]]], references: dict[str, float], path: Any
) -> None:
    """Draws held-out NLL against iterations, one line per estimator: its mean over seeds, with the
    range of the seeds shaded.

    panels:     title -> curves of one panel
    references: name -> value of horizontal lines, such as the NLL without memory
    """
    from matplotlib.figure import Figure  # slow to import

    columns = min(2, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.5 + 5.5 * columns, 1 + 4.2 * height), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False, sharey=True)
    for axes in grid.flatten()[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, curves) in zip(grid.flatten(), panels.items(), strict=False):
        estimators = list(dict.fromkeys((c["estimator"], c["S"]) for c in curves))
        for i, (name, S) in enumerate(estimators):
            trained = [c for c in curves if (c["estimator"], c["S"]) == (name, S)]
            iterations = trained[0]["iterations"]
            nll = list(zip(*(c["nll"] for c in trained), strict=True))
            # Each line is thinner than the one below it, so that lines on each other stay visible.
            axes.plot(
                iterations,
                [statistics.mean(values) for values in nll],
                color=f"C{i}",
                linewidth=4 - 0.6 * i,
                label=name if S == INFINITE else f"{name}, S = {S}",
            )
            low, high = [min(values) for values in nll], [max(values) for values in nll]
            axes.fill_between(iterations, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        for (name, value), style in zip(references.items(), (":", "--", "-."), strict=False):
            axes.axhline(value, color="0.3", linestyle=style, label=name)
        seeds = len({c["seed"] for c in curves})
        seeds_text = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
        axes.set_title(f"{title}: {seeds_text}" if title else seeds_text.capitalize(), fontsize=12)
        axes.set_xlabel("optimizer steps", fontsize=11)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("held-out NLL (nats per scored token)", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10)
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
