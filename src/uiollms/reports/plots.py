"""Pictures of an evaluation: by position, by length, by depth, bars; and of the attention that
memory gets."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uiollms.evaluation.attention_mass import AttentionMass
from uiollms.evaluation.results import TaskResult, by_length
from uiollms.files.atomic import replacing
from uiollms.reports.tables import NAMES, short, worth

COLORS = {
    "window": "tab:red",
    "shuffled": "tab:orange",
    "recent": "tab:purple",
    "memory": "tab:blue",
    "raw": "tab:green",
}


def plot_results(results: Sequence[TaskResult], path: Path) -> Path:
    """One panel a result: perplexity by position, accuracy by depth, else bars of the main
    number; a line or bar a mode."""

    def draw(result: TaskResult, axes: Any) -> None:
        {"text": plot_positions, "retrieval": plot_depths}.get(result.kind, plot_bars)(result, axes)

    return plot_each(results, draw, path)


def plot_lengths(results: Sequence[TaskResult], path: Path) -> Path:
    """One panel a text result (with its documents' scores): perplexity of the first so many
    tokens; a line a mode."""
    return plot_each(results, plot_length, path)


def plot_each(
    results: Sequence[TaskResult], draw: Callable[[TaskResult, Any], None], path: Path
) -> Path:
    """A panel a result, three beside each other."""
    from matplotlib.figure import Figure  # slow to import, and only runs that plot need it

    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for result, axes in zip(results, panels, strict=False):
        draw(result, axes)
        axes.set_title("\n".join(heading(result)), fontsize=9, parse_math=False)
        axes.grid(alpha=0.3)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    with replacing(path) as work:
        figure.savefig(work, dpi=110)
    return path


def heading(result: TaskResult) -> list[str]:
    """Its name, its sizes, and what memory is worth against its controls."""
    sizes = f"{result.truncation or 'all'} tokens in chunks of {result.size}"
    return [result.title, sizes, *worth(result)]


def style(mode: str) -> dict[str, Any]:
    """What memory is compared with lies on top, dashed: it is often the same line."""
    own = mode in ("memory", "raw")
    line = dict(linestyle="-", marker="o") if own else dict(linestyle="--", marker="s", zorder=3)
    return line | dict(color=COLORS[mode], label=NAMES[mode])


def plot_positions(result: TaskResult, axes: Any) -> None:
    shown, first = [], float(result.chunk_size)
    for mode in (mode for mode in NAMES if mode in result.modes):
        buckets = result.modes[mode]["by_position"]
        middles = [math.sqrt(b["start"] * (b["stop"] - 1)) for b in buckets]
        axes.plot(middles, numbers_of(buckets), markersize=4, **style(mode))
        wanted = [b for b in buckets if b["stop"] > result.chunk_size // 4]
        shown += [value for value in numbers_of(wanted) if math.isfinite(value)]
        first = min([first, *(b["start"] for b in wanted)])
    # A document's first tokens, a bucket of one or two each, would press everything else flat: they
    # are outside the panel.
    if shown:
        margin = 0.1 * (max(shown) - min(shown)) or 1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xscale("log", base=2)
    axes.set_xlim(left=first)
    axes.axvline(result.chunk_size, color="0.6", linestyle=":", label="first memory")
    axes.set_xlabel("token position (buckets between powers of two)")
    axes.set_ylabel(f"perplexity ({result.protocol} protocol)")
    axes.legend(fontsize=7)


def numbers_of(buckets: Sequence[dict[str, Any]]) -> list[float]:
    """Their perplexities, NaN (which leaves a gap in a line) for those that no float holds."""
    return [
        b["perplexity"]
        if b["perplexity"] is not None and math.isfinite(b["perplexity"])
        else math.nan
        for b in buckets
    ]


def plot_length(result: TaskResult, axes: Any) -> None:
    for mode in (mode for mode in NAMES if result.scores.get(mode)):
        points = [
            (p["length"], p["perplexity"]) for p in by_length(list(result.scores[mode].values()))
        ]
        # The first few tokens are the same in all modes, and so high that the rest would be flat.
        points = [point for point in points if point[0] >= result.chunk_size // 4] or points
        axes.plot(*zip(*points, strict=True), markersize=4, **style(mode))
    axes.set_xscale("log", base=2)
    axes.axvline(result.chunk_size, color="0.6", linestyle=":", label="first memory")
    axes.set_xlabel("tokens of a document, from its start")
    axes.set_ylabel(f"perplexity of all of them ({result.protocol} protocol)")
    axes.legend(fontsize=7)


def plot_depths(result: TaskResult, axes: Any) -> None:
    for mode in (mode for mode in NAMES if mode in result.modes):
        points = sorted((d["depth"], d["accuracy"]) for d in result.modes[mode]["by_depth"])
        axes.plot(*zip(*points, strict=True), **style(mode))
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("depth of the hidden sentence (0 = start)")
    axes.set_ylabel("share of right answers")
    axes.legend(fontsize=8)


def plot_bars(result: TaskResult, axes: Any) -> None:
    key, _, measure = result.main
    modes = [mode for mode in NAMES if mode in result.modes]
    names = [textwrap.fill(NAMES[mode], 12) for mode in modes]  # side by side
    bars = axes.bar(names, [result.modes[mode][key] for mode in modes])
    for mode, bar in zip(modes, bars, strict=True):
        bar.set_color(COLORS[mode])
    axes.bar_label(bars, fmt=short, fontsize=8)
    axes.set_ylim(0, 1.15 * max(result.modes[m][key] for m in modes) or 1)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel(f"{measure}, nats per scored token" if result.kind == "loss" else measure)


def plot_attention(mass: AttentionMass, path: Path) -> Path:
    """A heat map, layers x age of memory in chunks, its colours logarithmic because layers
    differ by orders of magnitude; beside it what all memories get together, by how many a chunk
    reads."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = 100 * mass.by_age.max().item()
    by_age = (
        "to a memory, by its age",
        "age in chunks (1 = the chunk before)",
        LogNorm(most / 1000, most, clip=True),
    )
    together = ("to all memories together", "memories that the chunk reads", Normalize(vmin=0))
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
        figure.colorbar(image, ax=axes, label="% of the layer's attention")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(label)
        axes.set_ylabel("layer")
        axes.set_title(title, fontsize=10)
    with replacing(path) as work:
        figure.savefig(work, dpi=110)
    return path
