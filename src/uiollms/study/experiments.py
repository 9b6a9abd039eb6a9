"""Tables that are made by several commands: what they consist of, how their numbers are read from
results, and how they are written. paper_tables.py has those of the paper, with its numbers beside
ours, and ablations.py has our own.

A table is a list of `Step`s, each a command of this package, and of `Cell`s, which read one number
with its interval from the results of a step.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from uiollms.evaluation.statistics import Estimate
from uiollms.files.atomic import atomic_file
from uiollms.study.learning import STUDENT_T, interpolated

SCALES = ("small", "paper")


@dataclass(frozen=True)
class Experiment:
    """A config of its own, derived from a shipped one.

    base:    name of the shipped environment config
    memory:  changed fields of its compressor config
    model:   changed fields of the section `model`; "{table}" in the path of weights stands for the
             table's folder
    train:   changed fields of the section `train`
    tasks:   the evaluations of test.py
    """

    base: str
    memory: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    tasks: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Step:
    """A command of the package, whose results are in the folder `name` of the table's folder.

    command:    arguments of `uiollms`; "{folder}" stands for the step's folder, "{shared}" for one
                that all tables share
    experiment: the config that is written to {folder}/env.json first, None if there is none
    what:       the work in words, for a dry run
    """

    name: str
    command: Sequence[str]
    experiment: Experiment | None = None
    what: str = ""


class Cell(NamedTuple):
    """One number of a table.

    row:    the row, in words
    number: what it is, with its unit
    step:   the name of the step whose folder `read` reads
    read:   returns the number and its 95 % interval; the interval is NaN where there is none
    paper:  the paper's number, None if no source for it is at hand
    unit:   what the paper's number is, if it is not `number`; such a number is not drawn
    """

    row: str
    number: str
    step: str
    read: Callable[[Path], Estimate]
    paper: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class StudyTable:
    """title: of the table; source: what is known of the settings of the paper's table, None for a
    table that is not the paper's; notes: what differs here; steps and cells: by scale."""

    title: str
    source: str | None
    notes: Mapping[str, str]
    steps: Mapping[str, Sequence[Step]]
    cells: Mapping[str, Sequence[Cell]]


# ---- Reading results -----------------------------------------------------------------------------

NO_INTERVAL = (math.nan, math.nan)


def of_test(index: int, key: str, mode: str = "memory") -> Callable[[Path], Estimate]:
    """Reads a number of result `index` of a step's test.json. BLEU-4, ROUGE-L and the like are
    those of `mode`; "bound" and other comparisons of modes are the task's."""

    def read(folder: Path) -> Estimate:
        result = json.loads((folder / "test.json").read_text(encoding="utf-8"))["results"][index]
        numbers = result if key in result else result[mode]
        interval = numbers.get("interval_95" if key == "perplexity" else f"{key}_interval_95")
        documents = result["documents"]
        return Estimate(
            numbers[key], tuple(interval) if interval and documents > 1 else NO_INTERVAL
        )

    return read


def of_row(column: str, **selected: Any) -> Callable[[Path], Estimate]:
    """Reads a column of the row of results.json that has the selected values, without interval."""

    def read(folder: Path) -> Estimate:
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
        (row,) = (r for r in rows if all(r[key] == value for key, value in selected.items()))
        return Estimate(row[column], NO_INTERVAL)

    return read


def of_curves(
    estimator: str, S: int, minus: tuple[str, str, int] | None = None
) -> Callable[[Path], Estimate]:
    """Reads the last held-out NLL of an estimator in the step's curves, as the mean over seeds with
    its Student interval.

    minus: (step, estimator, S) whose NLL with the same seed is subtracted
    """

    def last(folder: Path, estimator: str, S: int) -> dict[int, float]:
        (path,) = folder.glob("distance-*/curves.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        chosen = [line for line in lines if (line["estimator"], line["S"]) == (estimator, S)]
        return {line["seed"]: line["nll"][-1] for line in chosen}

    def read(folder: Path) -> Estimate:
        found = last(folder, estimator, S)
        if minus:
            base = last(folder.parent / minus[0], minus[1], minus[2])
            found = {seed: nll - base[seed] for seed, nll in found.items() if seed in base}
        return student(list(found.values()))

    return read


def of_seeds(
    variant: str,
    seeds: Sequence[int],
    key: str,
    mode: str | None = "memory",
    minus: str | None = None,
    share: Callable[[Path, str], float] | None = None,
) -> Callable[[Path], Estimate]:
    """Reads a number of the evaluations in the metrics.jsonl of a variant's trainings, which are
    the steps "VARIANT-SEED", as the mean over seeds with its Student interval.

    key:   such as "nll" or "bound", of the first task
    mode:  the mode that has the number; None if the task has it
    minus: the variant whose number with the same seed is subtracted
    share: maps the table's folder and a variant to the share of its iterations after which it is
           read; without it, all variants are read at their ends
    """

    def curve(folder: Path) -> tuple[list[int], list[float]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        found = {line["iteration"]: line["eval"][0] for line in lines if "eval" in line}
        numbers = [result[mode][key] if mode else result[key] for result in found.values()]
        return list(found), numbers

    def number_of(folder: Path, name: str, seed: int) -> float:
        iterations, numbers = curve(folder / f"{name}-{seed}")
        part = share(folder, name) if share else 1.0
        return interpolated(iterations, numbers, part * iterations[-1])

    def read(folder: Path) -> Estimate:
        table = folder.parent
        found = [number_of(table, variant, seed) for seed in seeds]
        if minus:
            base = [number_of(table, minus, seed) for seed in seeds]
            found = [a - b for a, b in zip(found, base, strict=True)]
        return student(found)

    return read


def student(values: Sequence[float]) -> Estimate:
    """The mean and its 95 % Student interval, for 2 to 10 values."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return Estimate(mean, NO_INTERVAL)
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, (mean - half, mean + half))


# ---- Writing them --------------------------------------------------------------------------------


def read_cells(
    cells: Sequence[Cell], folder: Path, with_paper: bool = True
) -> list[dict[str, Any]]:
    """The numbers of a table as rows for results.json. folder: that of the table; with_paper: with
    the paper's numbers"""
    rows = []
    for cell in cells:
        value, (low, high) = cell.read(folder / cell.step)
        paper = {"paper": cell.paper, "paper_unit": cell.unit} if with_paper else {}
        numbers = {"here": value, "low": low, "high": high}
        rows.append({"row": cell.row, "number": cell.number, **paper, **numbers})
    return rows


def table_texts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of `read_cells` with texts for people."""
    texts = []
    for row in rows:
        known = {}
        if "paper" in row:
            known["paper"] = (
                "not stated here"
                if row["paper"] is None
                else f"{row['paper']:g} {row['paper_unit']}".strip()
            )
        value = {"here (95 % interval)": value_text(row["here"], row["low"], row["high"])}
        texts.append({"row": row["row"], "number": row["number"], **known, **value})
    return texts


def value_text(value: float, low: float, high: float) -> str:
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    text = f"{value:.{digits}f}"
    return text if math.isnan(low) else f"{text} ({low:.{digits}f} .. {high:.{digits}f})"


def plot_cells(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws one panel per kind of number: ours with intervals, and the paper's as crosses where it
    is known and has the same unit."""
    from matplotlib.figure import Figure  # slow to import

    numbers = list(dict.fromkeys(row["number"] for row in rows))
    height = sum(0.34 * sum(r["number"] == n for r in rows) + 1.1 for n in numbers)
    ratios = [sum(r["number"] == n for r in rows) + 2 for n in numbers]
    figure = Figure(figsize=(9, height), layout="constrained")
    grid = figure.subplots(len(numbers), 1, squeeze=False, height_ratios=ratios)
    for axes, number in zip(grid[:, 0], numbers, strict=True):
        found = [row for row in rows if row["number"] == number]
        places = range(len(found))
        errors = [
            [0.0 if math.isnan(row[side]) else abs(row["here"] - row[side]) for row in found]
            for side in ("low", "high")
        ]
        axes.errorbar(
            [r["here"] for r in found], places, xerr=errors, fmt="o", capsize=3, label="here"
        )
        known = [
            (row["paper"], i)
            for i, row in enumerate(found)
            if row.get("paper") is not None and not row["paper_unit"]
        ]
        if known:
            axes.plot(*zip(*known, strict=True), "x", color="C3", markersize=8, label="paper")
            axes.legend(fontsize=9)
        axes.set_yticks(places, [row["row"] for row in found], fontsize=9)
        axes.set_ylim(len(found) - 0.5, -0.5)  # the first row is at the top
        axes.set_title(number, fontsize=11)
        axes.grid(alpha=0.3, axis="x")
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
