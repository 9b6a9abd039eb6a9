"""Plots of an evaluation (perplexity by position and by length, accuracy by depth, bars) and of
the attention to memory."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from uiollms.evaluation.attention_mass import AttentionMass
from uiollms.evaluation.results import TaskScores, TaskSummary
from uiollms.evaluation.statistics import by_length
from uiollms.files.atomic import atomic_file
from uiollms.reports.tables import interval_of, names_of, short, sizes_of

COLORS = {
    "window": "tab:red",
    "shuffled": "tab:orange",
    "recent": "tab:purple",
    "streaming": "tab:pink",
    "bm25": "tab:brown",
    "pooled": "tab:olive",
    "memory": "tab:blue",
    "raw": "tab:green",
    "snapkv": "tab:cyan",
    "knorm": "tab:gray",
    "expected_attention": "navy",
    "kvzip": "gold",
}
OTHER_COLOR = "black"  # of presses that a config names


def plot_results(results: Sequence[TaskSummary], path: Path) -> Path | None:
    """One panel per result, with one line or bar per mode. Text tasks show perplexity by position,
    retrieval tasks accuracy by depth, other tasks bars of the main number. If no result is
    `drawable`, the file of an earlier evaluation is removed, and None is returned."""

    def draw(result: TaskSummary, axes: Any) -> None:
        plot_of(result)(result, axes)

    if shown := drawable(results):
        return plot_panels(shown, draw, path)
    path.unlink(missing_ok=True)
    return None


def drawable(results: Sequence[TaskSummary]) -> list[TaskSummary]:
    """The results that have more to show than a table: all but those whose plot would be one bar,
    a number that needs no picture."""
    return [
        result for result in results if plot_of(result) is not plot_bars or len(result.modes) > 1
    ]


def plot_of(result: TaskSummary) -> Callable[[TaskSummary, Any], None]:
    """The function that draws a result. Trials of one depth have bars instead of a curve."""
    if result.task.kind == "text":
        return plot_positions
    depths = [len(numbers.get("by_depth", [])) for numbers in result.modes.values()]
    return plot_depths if max(depths, default=0) > 1 else plot_bars


def plot_lengths(results: Sequence[TaskScores], path: Path) -> Path:
    """One panel per text result: the perplexity of documents cut to their first tokens, one line
    per mode."""
    return plot_panels(results, plot_length, path)


Result = TypeVar("Result", TaskSummary, TaskScores)


def plot_panels(results: Sequence[Result], draw: Callable[[Result, Any], None], path: Path) -> Path:
    """One panel per result, up to two in a row. `draw` draws a result into matplotlib axes."""
    from matplotlib.figure import Figure  # slow to import, and only runs that plot need it

    columns = min(2, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(6.6 * columns, 4.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for result, axes in zip(results, panels, strict=False):
        draw(result, axes)
        title = textwrap.fill(result.task.title, 60)
        axes.set_title(title, fontsize=11, fontweight="bold", pad=24, parse_math=False)
        axes.text(
            0.5,
            1.02,
            sizes_of(result.task),
            transform=axes.transAxes,
            ha="center",
            va="bottom",
            fontsize=9,
            color="0.35",
        )
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
    return path


def legend_below(axes: Any) -> None:
    """A legend under the axes, where it covers no point. Long labels, such as those with the path
    of a corpus, are broken into lines."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        [textwrap.fill(label, 40) for label in labels],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
        fontsize=9,
    )


def style(mode: str) -> dict[str, Any]:
    """Line style of a mode. Controls are dashed and drawn last, because their line often coincides
    with another."""
    solid = mode in ("memory", "raw")
    line = dict(linestyle="-", marker="o") if solid else dict(linestyle="--", marker="s", zorder=3)
    return line | dict(color=COLORS.get(mode, OTHER_COLOR), label=names_of([mode])[mode])


def plot_positions(result: TaskSummary, axes: Any) -> None:
    for mode in names_of(result.modes):
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
    axes.set_ylabel("perplexity")
    legend_below(axes)


def perplexities(buckets: Sequence[dict[str, Any]]) -> list[float]:
    """The perplexities of buckets. One past float64 becomes NaN, which leaves a gap in a line."""
    return [
        b["perplexity"]
        if b["perplexity"] is not None and math.isfinite(b["perplexity"])
        else math.nan
        for b in buckets
    ]


def plot_length(result: TaskScores, axes: Any) -> None:
    for mode in names_of(mode for mode, scores in result.scores.items() if scores):
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
    axes.set_ylabel("perplexity of these tokens")
    legend_below(axes)


def plot_depths(result: TaskSummary, axes: Any) -> None:
    for mode in names_of(result.modes):
        points = sorted((d["depth"], d["accuracy"]) for d in result.modes[mode]["by_depth"])
        axes.plot(*zip(*points, strict=True), **style(mode))
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("depth of the hidden sentence (0 = start)")
    axes.set_ylabel("fraction of right answers")
    legend_below(axes)


def plot_bars(result: TaskSummary, axes: Any) -> None:
    key, interval, measure = result.task.main_number
    modes = [*names_of(result.modes)]
    names = [
        textwrap.fill(name, 12) for name in names_of(result.modes).values()
    ]  # narrow enough to fit side by side
    values = [result.modes[mode][key] for mode in modes]
    bars = axes.bar(names, values)
    for mode, bar in zip(modes, bars, strict=True):
        bar.set_color(COLORS.get(mode, OTHER_COLOR))
    intervals = [interval_of(result.modes[mode], interval) for mode in modes]
    for name, value, ends in zip(names, values, intervals, strict=True):
        low, high = ends or (None, None)
        if low is not None and high is not None:
            # Rounding can put a mean outside its interval by the last digit.
            sides = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(name, value, sides, color="0.2", capsize=4, linewidth=1)
        above = value if high is None else max(value, high)
        axes.annotate(
            short(value), (name, above), (0, 3), textcoords="offset points", ha="center", fontsize=9
        )
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
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
