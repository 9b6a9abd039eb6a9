"""What a person looks at: the table and the plots of an evaluation, the curve of a training run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from uiollms.metrics import read_metrics
from uiollms.results import TaskResult

COLORS = {"window": "tab:red", "shuffled": "tab:orange", "memory": "tab:blue", "raw": "tab:green"}
NAMES = {
    "window": "no memory (window only)",
    "shuffled": "memory of another document",
    "memory": "with memory",
    "raw": "raw context",
}


def print_results(results: Sequence[TaskResult], console: Console | None = None) -> None:
    """One table of all tasks, a row a mode: the task's main number with its 95 % interval, and what else says something."""
    table = Table(title="evaluation", title_justify="left")
    for column in ("task", "documents", "tokens", "mode", "result (95 % interval)", "also"):
        table.add_column(column, justify="right" if column == "tokens" else "left", no_wrap=column not in ("task", "also"))
    for result in results:
        key, interval, name = result.main
        for i, mode in enumerate(mode for mode in NAMES if mode in result.modes):
            numbers = result.modes[mode]
            table.add_row(
                result.title if i == 0 else "",
                str(numbers["documents"]),
                str(result.truncation or "all"),
                NAMES[mode],
                f"{name} {short(numbers[key])}{between(numbers.get(interval))}",
                also(result, mode),
            )
        table.add_section()
    (console or Console(width=170)).print(table)


def short(value: float) -> str:
    """Two decimals, three for what is below 10."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def between(interval: tuple[float, float] | None) -> str:
    return f" ({short(interval[0])} .. {short(interval[1])})" if interval else ""


def also(result: TaskResult, mode: str) -> str:
    """The second column of numbers, in words."""
    numbers = result.modes[mode]
    parts = []
    if result.task_type == "perplexity":
        parts.append(f"document mean {short(numbers['document_mean'])}{between(numbers['document_mean_interval_95'])}")
        if mode == "memory" and result.recovered is not None:
            parts.append(f"{result.recovered:.0%} recovered")
    if result.kind == "retrieval":
        parts.append("by depth " + ", ".join(f"{d['depth']:g}: {d['accuracy']:.0%}" for d in numbers["by_depth"]))
    if "rouge_l" in numbers:
        parts.append(f"ROUGE-L {numbers['rouge_l']:.3f}")
    if result.kind == "copy":
        parts.append(f"tokens right {numbers['token_accuracy']:.1%}")
    if result.task_type == "language modeling":
        parts.append(f"perplexity {short(numbers['perplexity'])}")
    if result.kind != "text":
        parts.append(f"NLL {numbers['nll']:.3f}")
    return ", ".join(parts)


def plot_results(results: Sequence[TaskResult], path: Path) -> Path:
    """One panel a result: perplexity by position, accuracy by depth, else bars of the main number; a line or bar a mode."""
    from matplotlib.figure import Figure  # slow to import, and only runs that plot need it

    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for result, axes in zip(results, panels, strict=False):
        {"text": plot_positions, "retrieval": plot_depths}.get(result.kind, plot_bars)(result, axes)
        axes.set_title(f"{result.title}\n{result.truncation or 'all'} tokens", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    return path


def style(mode: str) -> dict[str, Any]:
    """What memory is compared with lies on top, dashed: it is often the same line."""
    own = mode in ("memory", "raw")
    line = dict(linestyle="-", marker="o") if own else dict(linestyle="--", marker="s", zorder=3)
    return line | dict(color=COLORS[mode], label=NAMES[mode])


def plot_positions(result: TaskResult, axes: Any) -> None:
    shown = []
    for mode in (mode for mode in NAMES if mode in result.modes):
        buckets = result.modes[mode]["by_position"]
        middles = [math.sqrt(b["start"] * (b["stop"] - 1)) for b in buckets]
        axes.plot(middles, [b["perplexity"] for b in buckets], markersize=4, **style(mode))
        shown += [b["perplexity"] for b in buckets if b["stop"] > result.chunk_size // 4]
    # A document's first tokens, a bucket of one or two each, would press everything else flat: they may leave the panel.
    margin = 0.1 * (max(shown) - min(shown)) or 1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xscale("log", base=2)
    axes.axvline(result.chunk_size, color="0.6", linestyle=":", label="first memory")
    axes.set_xlabel("token position (buckets between powers of two)")
    axes.set_ylabel(f"perplexity ({result.protocol} protocol)")
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
    bars = axes.bar([NAMES[m].replace(" (", "\n(") for m in modes], [result.modes[m][key] for m in modes])
    for mode, bar in zip(modes, bars, strict=True):
        bar.set_color(COLORS[mode])
    axes.bar_label(bars, fmt=short, fontsize=8)
    axes.set_ylim(0, 1.15 * max(result.modes[m][key] for m in modes) or 1)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel(f"{measure}, nats per scored token" if result.kind == "loss" else measure)


def plot_training(run: Path) -> Path:
    """`curve.png` in the run folder: training NLL per token, and an evaluation, against iterations; in a panel of its own
    where it scores other tokens than the training loss."""
    from matplotlib.figure import Figure  # slow to import, and only runs that plot need it

    metrics = read_metrics(run)
    steps = [m for m in metrics if "nll" in m]
    evaluations = [(m["iteration"], curve_task(run, m["eval"])) for m in metrics if m.get("eval")]
    apart = bool(evaluations) and evaluations[0][1].get("protocol", "paper") != loss_of(run)
    figure = Figure(figsize=(8, 8 if apart else 4.5), layout="constrained")
    panels = figure.subplots(1 + apart, squeeze=False).flatten()
    x, y = [m["iteration"] for m in steps], [m["nll"] for m in steps]
    panels[0].plot(x, y, ".", color="0.75", markersize=4, label="training batch")
    width = max(1, len(y) // 20)
    smooth = [sum(y[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(y))]
    panels[0].plot(x, smooth, color="0.3", label=f"mean of the last {width}")
    for mode, color in COLORS.items():
        points = [(iteration, math.log(task[mode]["perplexity"])) for iteration, task in evaluations if mode in task]
        if points:
            panels[-1].plot(*zip(*points, strict=True), "o-", color=color, label=f"held out, {NAMES[mode]}")
    for axes in panels:
        axes.set_xlabel("iteration")
        axes.set_ylabel("NLL, nats per scored token")
        axes.legend()
        axes.grid(alpha=0.3)
    if y:
        panels[0].set_ylim(min(y) - 0.2, sorted(y)[int(len(y) * 0.9)] + 1)
    path = run / "curve.png"
    figure.savefig(path, dpi=120)
    return path


def loss_of(run: Path) -> str:
    """Which tokens the run's training loss scores: "paper" or "document"."""
    config = run / "config.json"
    return json.loads(config.read_text())["train"]["loss"] if config.exists() else "paper"


def curve_task(run: Path, tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of an evaluation's tasks the one that the curve shows: the first that scores the same tokens as the training loss, else
    the first. (Metrics that name no protocol are perplexities under the paper's.)"""
    return next((task for task in tasks if task.get("protocol", "paper") == loss_of(run)), tasks[0])
