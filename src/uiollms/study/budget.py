"""Quality against the number of slots, and against the length of the context, for memory and for
what a user would pick instead (docs/alternatives.md).

Every point is the NLL of a document's last chunk, without its first token, after all tokens before
it. So all points of a length score the same tokens.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import TaskEntry
from uiollms.evaluation.evaluator import Evaluation
from uiollms.evaluation.instances import Instance
from uiollms.evaluation.results import TaskScores
from uiollms.evaluation.statistics import difference
from uiollms.files.atomic import atomic_file
from uiollms.files.errors import ConfigError
from uiollms.model.memory_lm import MemoryLM

Bar = Callable[..., Iterable[Any]]
WITHOUT_SLOTS = ("window", "raw")  # modes whose results do not depend on the number of slots


class Point(NamedTuple):
    """sweep: "slots" or "length"; slots: memory slots of a chunk; length: tokens of a document"""

    sweep: str
    slots: int
    length: int


def make_points(
    chunk_size: int, tokens: int, ratios: Sequence[int], lengths: Sequence[int], ratio: int
) -> list[Point]:
    """Returns the points of both sweeps.

    ratios:  chunk_size / num_memory of the sweep "slots", whose documents have `tokens` tokens
    lengths: tokens of a document of the sweep "length", which has the ratio `ratio`

    Raises ConfigError for numbers that do not fit the chunk size.
    """
    for option, numbers in (("--ratios", ratios), ("--ratio", [ratio])):
        for number in numbers:
            if chunk_size % number:
                raise ConfigError(f"{option}: {number} does not divide the chunk size {chunk_size}")
    for length in (tokens, *lengths):
        if length % chunk_size or length < 2 * chunk_size:
            raise ConfigError(
                f"--tokens and --lengths: {length} is not a multiple of the chunk size "
                f"{chunk_size}, or has fewer than 2 chunks"
            )
    points = [Point("slots", chunk_size // number, tokens) for number in ratios]
    return points + [Point("length", chunk_size // ratio, length) for length in lengths]


def study_budget(
    model: MemoryLM,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskEntry,
    points: Sequence[Point],
    bar: Bar,
) -> list[dict[str, Any]]:
    """Returns one row per point and mode.

    task: the documents and modes; its chunk_size is that of the points

    Raises ConfigError, before anything is scored, for a point that does not fit the model or the
    corpus.
    """
    chunk_size = task.chunk_size
    assert chunk_size
    evaluations = {
        (slots, length): evaluation_of(model, tokenizer, task, slots, length)
        for _, slots, length in points
    }
    found: dict[tuple[int, int], TaskScores] = {}
    shared: dict[int, TaskScores] = {}  # by length, a point with all modes
    rows = []
    for sweep, slots, length in points:
        if (slots, length) not in found:
            evaluation, known = evaluations[slots, length], shared.get(length)
            measurement = evaluation.measurements[0]
            if known:
                rest = tuple(mode for mode in task.compare if mode not in WITHOUT_SLOTS)
                entry = measurement.task.model_copy(update={"compare": rest})
                evaluation.measurements[0] = replace(measurement, task=entry)
            name = f"{chunk_size // slots}x, {length} tokens"
            scores = evaluation.run(partial(bar, desc=name))[0]
            if known:
                scores = with_modes(scores, known, WITHOUT_SLOTS)
            found[slots, length] = scores
            shared.setdefault(length, scores)
        modes = ("memory", *task.compare)
        rows += rows_of(sweep, found[slots, length], chunk_size // slots, modes)
    return rows


def evaluation_of(
    model: MemoryLM,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskEntry,
    num_memory: int,
    length: int,
) -> Evaluation:
    """Returns the evaluation of one point. Raises ConfigError if `length` exceeds the capacity, and
    if no document has as many tokens."""
    changes = dict(
        truncation=length,
        num_memory=num_memory,
        documents="full",
        protocols=(f"last.{(task.chunk_size or 0) - 1}",),
        costs=True,
    )
    entry = TaskEntry.model_validate(task.model_dump() | changes)
    evaluation = Evaluation(model, tokenizer, [entry])
    (measurement,) = evaluation.measurements
    with model.sized(measurement.size):
        capacity = model.capacity
    if length > capacity:
        raise ConfigError(
            f"a document of {length} tokens exceeds the capacity {capacity} with {num_memory} "
            "slots per chunk; choose a smaller length or a larger ratio"
        )

    def is_full(instance: Instance) -> bool:
        return instance.samples[0].num_tokens == length

    full = [instance for instance in measurement.instances if is_full(instance)]
    least = 2 if "shuffled" in task.compare else 1
    if len(full) < least:
        raise ConfigError(
            f"corpus {task.task_name!r} has {len(full)} documents of {length} tokens, {least} are "
            "needed; choose a smaller length or another --corpus"
        )
    evaluation.measurements[0] = replace(measurement, instances=full)
    return evaluation


def with_modes(scores: TaskScores, other: TaskScores, modes: Sequence[str]) -> TaskScores:
    """Adds what another task has of some modes."""

    def chosen(of: Mapping[str, Any]) -> dict[str, Any]:
        return {mode: of[mode] for mode in modes if mode in of}

    return replace(
        scores,
        scores={**scores.scores, **chosen(other.scores)},
        costs={**scores.costs, **chosen(other.costs)},
        failures={**scores.failures, **chosen(other.failures)},
    )


def rows_of(
    sweep: str, scores: TaskScores, ratio: int, modes: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the rows of one point. `above_memory` is the NLL minus that of memory on the same
    documents. Numbers of a mode that was not scored are None, and `note` is the reason."""
    rows, summary = [], scores.summarize()
    nll = {
        mode: {number: found.nll for number, found in documents.items()}
        for mode, documents in scores.scores.items()
    }
    for mode in modes:
        numbers = summary.modes.get(mode, {})
        cost = numbers.get("cost") or {}
        low, high = numbers.get("nll_interval_95", (None, None))
        paired = mode in nll and mode != "memory" and difference(nll[mode], nll["memory"])
        above, (above_low, above_high) = paired or (None, (None, None))
        peak, token = cost.get("peak_bytes"), cost.get("token_seconds")
        rows.append(
            {
                "sweep": sweep,
                "tokens": summary.task.truncation,
                "ratio": ratio,
                "mode": mode,
                "documents": numbers.get("documents", 0),
                "nll": numbers.get("nll"),
                "low": low,
                "high": high,
                "above_memory": above,
                "above_low": above_low,
                "above_high": above_high,
                "slots": cost.get("slots"),
                "peak_mib": None if peak is None else peak / 2**20,
                "compress_s": cost.get("compress_seconds"),
                "token_ms": None if token is None else 1000 * token,
                "process": cost.get("process"),
                "note": summary.failures.get(mode, ""),
            }
        )
    return rows


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


AXES = {
    "slots": ("ratio", "tokens of the context per slot", "NLL against the number of slots"),
    "length": ("tokens", "tokens of the document", "NLL against the length of the context"),
}


def plot_budget(
    rows: Sequence[dict[str, Any]], style: Callable[[str], dict[str, Any]], path: Path
) -> None:
    """Draws one panel per sweep: the NLL of the last chunk, one line per mode. style: the line
    style of a mode. A mode that was not scored has no point."""
    from matplotlib.figure import Figure  # slow to import

    sweeps = [sweep for sweep in AXES if any(row["sweep"] == sweep for row in rows)]
    figure = Figure(figsize=(max(8, 6.5 * len(sweeps)), 8 - len(sweeps)), layout="constrained")
    for number, sweep in enumerate(sweeps):
        key, label, title = AXES[sweep]
        axes = figure.add_subplot(1, len(sweeps), number + 1)
        for mode in dict.fromkeys(row["mode"] for row in rows):
            points = [
                (row[key], row["nll"])
                for row in rows
                if (row["sweep"], row["mode"]) == (sweep, mode) and row["nll"] is not None
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), markersize=5, **style(mode))
        ticks = sorted({row[key] for row in rows if row["sweep"] == sweep})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel(label)
        axes.set_ylabel("NLL of the last chunk (nats a token)")
        axes.set_title(title, fontsize=12)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 + len(sweeps), fontsize=9)
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
