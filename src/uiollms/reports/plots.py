"""Plots of an evaluation (perplexity by position and by length, accuracy by depth, bars) and of
the attention to memory."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from uiollms.evaluation.attention_mass import AttentionMass
from uiollms.evaluation.results import Comparison, ScoredTask, TaskScores, TaskSummary
from uiollms.evaluation.statistics import by_length
from uiollms.files.atomic import atomic_file
from uiollms.reports.tables import NAMES, comparison_words, short

COLORS = {
    "window": "tab:red",
    "shuffled": "tab:orange",
    "recent": "tab:purple",
    "memory": "tab:blue",
    "raw": "tab:green",
}


def plot_results(results: Sequence[TaskSummary], path: Path) -> Path:
    """One panel per result, with one line or bar per mode. Text tasks show perplexity by position,
    retrieval tasks accuracy by depth, other tasks bars of the main number."""

    def draw(result: TaskSummary, axes: Any) -> None:
        plot = {"text": plot_positions, "retrieval": plot_depths}.get(result.task.kind, plot_bars)
        plot(result, axes)

    return plot_panels(results, draw, path)


def plot_lengths(results: Sequence[TaskScores], path: Path) -> Path:
    """One panel per text result: the perplexity of documents cut to their first tokens, one line
    per mode."""
    return plot_panels(results, plot_length, path)


Result = TypeVar("Result", TaskSummary, TaskScores)


def plot_panels(results: Sequence[Result], draw: Callable[[Result, Any], None], path: Path) -> Path:
    """One panel per result, up to three in a row. `draw` draws a result into matplotlib axes."""
    from matplotlib.figure import Figure  # slow to import, and only runs that plot need it

    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(5.4 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for result, axes in zip(results, panels, strict=False):
        draw(result, axes)
        axes.set_title(
            "\n".join(heading(result.task, result.comparison)), fontsize=10, parse_math=False
        )
        axes.grid(alpha=0.3)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
    return path


def heading(task: ScoredTask, comparison: Comparison) -> list[str]:
    """Lines of a panel's title: the task, its sizes, and memory compared with its controls."""
    sizes = f"{task.truncation or 'all'} tokens in chunks of {task.size}"
    return [task.title, sizes, *comparison_words(comparison)]


def style(mode: str) -> dict[str, Any]:
    """Line style of a mode. Controls are dashed and drawn last, because their line often coincides
    with another."""
    solid = mode in ("memory", "raw")
    line = dict(linestyle="-", marker="o") if solid else dict(linestyle="--", marker="s", zorder=3)
    return line | dict(color=COLORS[mode], label=NAMES[mode])


def plot_positions(result: TaskSummary, axes: Any) -> None:
    for mode in (mode for mode in NAMES if mode in result.modes):
        buckets = result.modes[mode]["by_position"]
        # The first tokens of a document have buckets of one or two tokens, whose perplexity would
        # flatten all other values. They are left out.
        buckets = [b for b in buckets if b["stop"] > result.task.chunk_size // 4] or buckets
        middles = [math.sqrt(b["start"] * (b["stop"] - 1)) for b in buckets]
        axes.plot(middles, perplexities(buckets), markersize=5, **style(mode))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.axvline(result.task.chunk_size, color="0.6", linestyle=":", label="first memory")
    axes.set_xlabel("token position (buckets between powers of two)")
    axes.set_ylabel(f"perplexity ({result.task.protocol} protocol)")
    axes.legend(fontsize=8)


def perplexities(buckets: Sequence[dict[str, Any]]) -> list[float]:
    """The perplexities of buckets. One past float64 becomes NaN, which leaves a gap in a line."""
    return [
        b["perplexity"]
        if b["perplexity"] is not None and math.isfinite(b["perplexity"])
        else math.nan
        for b in buckets
    ]


def plot_length(result: TaskScores, axes: Any) -> None:
    for mode in (mode for mode in NAMES if result.scores.get(mode)):
        points = [
            (p["length"], p["perplexity"]) for p in by_length(list(result.scores[mode].values()))
        ]
        # The first few tokens are the same in all modes, and their perplexity would flatten the
        # rest.
        least = result.task.chunk_size // 4
        points = [point for point in points if point[0] >= least] or points
        axes.plot(*zip(*points, strict=True), markersize=4, **style(mode))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.axvline(result.task.chunk_size, color="0.6", linestyle=":", label="first memory")
    axes.set_xlabel("tokens of a document, from its start")
    axes.set_ylabel(f"perplexity of these tokens ({result.task.protocol} protocol)")
    axes.legend(fontsize=8)


def plot_depths(result: TaskSummary, axes: Any) -> None:
    for mode in (mode for mode in NAMES if mode in result.modes):
        points = sorted((d["depth"], d["accuracy"]) for d in result.modes[mode]["by_depth"])
        axes.plot(*zip(*points, strict=True), **style(mode))
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("depth of the hidden sentence (0 = start)")
    axes.set_ylabel("fraction of right answers")
    axes.legend(fontsize=8)


def plot_bars(result: TaskSummary, axes: Any) -> None:
    key, _, measure = result.task.main_number
    modes = [mode for mode in NAMES if mode in result.modes]
    names = [textwrap.fill(NAMES[mode], 12) for mode in modes]  # narrow enough to fit side by side
    bars = axes.bar(names, [result.modes[mode][key] for mode in modes])
    for mode, bar in zip(modes, bars, strict=True):
        bar.set_color(COLORS[mode])
    axes.bar_label(bars, fmt=short, fontsize=9)
    axes.set_ylim(0, 1.15 * max(result.modes[m][key] for m in modes) or 1)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel(f"{measure} (nats per scored token)" if result.task.kind == "loss" else measure)


def plot_attention(mass: AttentionMass, path: Path) -> Path:
    """Two heat maps. The left one shows layers by age of memory in chunks, with logarithmic
    colours because layers differ by orders of magnitude. The right one shows the attention to all
    memories together, by layer and number of memories that the chunk reads."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = 100 * mass.by_age.max().item()
    by_age = (
        "attention to one memory, by its age",
        "age in chunks (1 = the chunk before)",
        LogNorm(most / 1000, most, clip=True),
    )
    together = (
        "attention to all memories together",
        "memories that the chunk reads",
        Normalize(vmin=0),
    )
    for axes, values, (title, label, norm) in (
        (left, mass.by_age, by_age),
        (right, mass.on_memory, together),
    ):
        layers, columns = values.shape
        extent = (0.5, columns + 0.5, -0.5, layers - 0.5)
        percent = (100 * values).numpy()
        image = axes.imshow(
            percent,
            origin="lower",
            aspect="auto",
            extent=extent,
            norm=norm,
            interpolation="nearest",
        )
        figure.colorbar(image, ax=axes, label="attention (% of the layer's sum)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(label)
        axes.set_ylabel("layer")
        axes.set_title(title, fontsize=12)
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
    return path
