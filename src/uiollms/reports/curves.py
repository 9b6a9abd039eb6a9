"""Plots of a training run: its loss, and the gradients, speed and memory of its steps."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uiollms.evaluation.summaries import checked_estimate
from uiollms.files.atomic import atomic_file, reporting_write_errors
from uiollms.reports.plots import COLORS, legend_below, style
from uiollms.reports.tables import NAMES
from uiollms.runs.metrics import read_metrics


def plot_run(run: Path, loss: str, counted: str) -> None:
    """Draws curve.png in a run folder, see `plot_training`. Raises ConfigError if it cannot be
    written."""
    with reporting_write_errors(run / "curve.png"):
        plot_training(read_metrics(run), run / "curve.png", loss, counted)


def plot_training(
    metrics: Sequence[dict[str, Any]], path: Path, loss: str = "paper", counted: str = "documents"
) -> Path:
    """Draws training NLL per token and held-out NLL against iterations.

    If the evaluation scores other tokens than the training loss, held-out NLL has its own panel.
    If evaluations shuffle memories, the last panel shows the bound (evaluation/statistics.py).

    loss:    protocol of the training loss, "paper" or "document"
    counted: what an iteration is, "documents" or "steps"
    """
    from matplotlib.figure import Figure  # slow to import, and few commands plot

    steps = [m for m in metrics if m.get("nll") is not None]
    evaluations = [(m["iteration"], curve_task(loss, m["eval"])) for m in metrics if m.get("eval")]
    own_panel = bool(evaluations) and evaluations[0][1].get("protocol", "paper") != loss
    bounds = bound_lines(metrics)
    count = 1 + own_panel + bool(bounds)
    figure = Figure(figsize=(8.5, 1 + 4.2 * count), layout="constrained")
    all_panels = figure.subplots(count, squeeze=False).flatten()
    panels = all_panels[: 1 + own_panel]
    if bounds:
        plot_bounds(bounds, all_panels[-1])
    x, y = [m["iteration"] for m in steps], [m["nll"] for m in steps]
    panels[0].plot(x, y, ".", color="0.75", markersize=4, label="training batch")
    width = max(1, len(y) // 20)
    panels[0].plot(
        x,
        smoothed(y, width),
        color="0.3",
        label=f"mean of the last {width} batches" if width > 1 else "training",
    )
    for mode in COLORS:
        points = [
            (iteration, nll_of(task[mode])) for iteration, task in evaluations if mode in task
        ]
        if points:
            line_style = style(mode) | dict(label=f"held out, {NAMES[mode]}")
            panels[-1].plot(*zip(*points, strict=True), markersize=6, **line_style)
    held_out = f"Held-out loss{task_words(evaluations[0][1])}" if evaluations else ""
    for axes, title in zip(panels, ("Training loss", held_out), strict=False):
        both = f"Training loss. {held_out}" if held_out else "Training loss"
        shown = textwrap.fill(title if own_panel else both, 70)
        axes.set_title(shown, fontsize=11, parse_math=False)
        axes.set_ylabel("NLL (nats per scored token)")
    last = max((line["iteration"] for line in metrics), default=1)
    for axes in all_panels:
        mark_stages(axes, metrics)
        # All panels have the same axis, with space for the points at both ends.
        axes.set_xlim(-0.03 * last, 1.03 * last)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(f"training {counted}")
        legend_below(axes)
        axes.grid(alpha=0.3)
    # The loss of the first steps is often several times that of the others. A logarithmic axis
    # shows both.
    if y and 0 < 1.5 * statistics.median(y) < max(y) and min(y) > 0:
        panels[0].set_yscale("log")
        panels[0].grid(alpha=0.3, which="minor")
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_formatter("{x:g}")
    with atomic_file(path) as work:
        figure.savefig(work, dpi=120)
    return path


def mark_stages(axes: Any, metrics: Sequence[dict[str, Any]]) -> None:
    """Draws a vertical line at the start of every stage, with the stage's number."""
    for stage, start in stage_starts(metrics).items():
        axes.axvline(start, color="0.6", linewidth=0.8, linestyle="--")
        axes.annotate(
            f" stage {stage}",
            (start, 0.01),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color="0.4",
        )


def stage_starts(metrics: Sequence[dict[str, Any]]) -> dict[int, int]:
    """Stage -> the iteration after its first step. Empty for a run without stages."""
    starts: dict[int, int] = {}
    for line in metrics:
        if "stage" in line:
            starts.setdefault(line["stage"], line["iteration"])
    return starts


Bound = tuple[int, float, float, float]  # iteration, value, interval


def bound_lines(metrics: Sequence[dict[str, Any]]) -> dict[str, list[Bound]]:
    """Task -> its bound at every evaluation that computed one."""
    lines: dict[str, list[Bound]] = {}
    for line in metrics:
        for i, task in enumerate(line.get("eval") or []):
            if found := checked_estimate(task, "bound"):
                label = f"task {i + 1}: {task['task_type']} of {task['task']}"
                point = line["iteration"], found.value, *found.interval_95
                lines.setdefault(label, []).append(point)
    return lines


def plot_bounds(lines: dict[str, list[Bound]], axes: Any) -> None:
    """Draws one line per task, with its interval."""
    for label, points in lines.items():
        iterations, values, low, high = zip(*points, strict=True)
        (line,) = axes.plot(iterations, values, "o-", label=label)
        axes.fill_between(iterations, low, high, alpha=0.2, color=line.get_color())
        # A band of one point has no width, so every interval has ends of its own too.
        axes.vlines(iterations, low, high, color=line.get_color(), linewidth=1)
        axes.plot(iterations * 2, low + high, "_", color=line.get_color(), markersize=8)
    axes.axhline(0, color="0.3", linestyle=":", label="another document's memory serves as well")
    axes.set_title("What a document's memory gains over another document's", fontsize=11)
    axes.set_ylabel("bound (nats per scored token)")


def nll_of(numbers: dict[str, Any]) -> float:
    """A mode's mean NLL. It is NaN, which plots leave out, if the number is missing. Early versions
    logged the perplexity only."""
    nll = (
        numbers["nll"]
        if "nll" in numbers
        else numbers["perplexity"] and math.log(numbers["perplexity"])
    )
    return math.nan if nll is None else nll


def curve_task(loss: str, tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The task of an evaluation that the curve shows: the first that scores the same tokens as the
    training loss, or else the first. (Early versions logged perplexities under the paper's
    protocol and named no protocol.)"""
    return next((task for task in tasks if task.get("protocol", "paper") == loss), tasks[0])


def task_words(task: dict[str, Any]) -> str:
    """Such as ": perplexity of stdlib.test". Early versions named no task_type."""
    return f": {task['task_type']} of {task['task']}" if "task_type" in task else ""


def smoothed(y: Sequence[float], width: int) -> list[float]:
    """Running means: every number becomes the mean of the last `width`, or of all so far."""
    return [sum(y[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(y))]


GRADIENTS = {
    "encoder_lora": "encoder LoRA",
    "decoder_lora": "decoder LoRA",
    "token_embeddings": "token embeddings",
}


def plot_steps(metrics: Sequence[dict[str, Any]], counted: str, path: Path) -> Path:
    """Draws learning rate, gradient norms before clipping, tokens per second and peak memory
    against iterations, one panel each. Panels without numbers are left out.

    counted: what an iteration is, "documents" or "steps"
    """
    from matplotlib.figure import Figure

    steps = [m for m in metrics if "lr" in m]
    norms = {"all": column(steps, "grad_norm")} | {
        GRADIENTS[part]: column(steps, "grad_norms", part) for part in GRADIENTS
    }
    memory = {
        "resident": column(steps, "machine", "resident_gib"),
        "on the GPU": column(steps, "machine", "gpu_gib"),
    }
    panels = {
        "learning rate": {"": column(steps, "lr")},
        "gradient norm before clipping": norms,
        "tokens read per second": {"": column(steps, "machine", "tokens_per_second")},
        "peak memory so far (GiB)": memory,
    }
    panels = {label: lines for label, lines in panels.items() if any(lines.values())}
    figure = Figure(figsize=(11, 3.2 * math.ceil(len(panels) / 2)), layout="constrained")
    for i, (label, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(math.ceil(len(panels) / 2), 2, i + 1)
        for name, points in lines.items():
            if points:
                line_style: dict[str, Any] = dict(linewidth=1, marker=".", markersize=4)
                if name == "all":  # it nearly coincides with the largest part
                    line_style = dict(color="0.8", linewidth=3)
                axes.plot(*zip(*points, strict=True), label=name, **line_style)
        mark_stages(axes, metrics)
        if "norm" in label:
            axes.set_yscale("log")
        else:
            most = max(number for points in lines.values() for _, number in points) or 1
            axes.set_ylim(-0.03 * most, 1.1 * most)
        if len([points for points in lines.values() if points]) > 1:
            axes.legend(fontsize=8)
        axes.set_xlabel(counted)
        axes.set_title(label)
        axes.grid(alpha=0.3)
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
    return path


def column(steps: Sequence[dict[str, Any]], *keys: str) -> list[tuple[int, float]]:
    """(iteration, number) of every step that logged the number under these nested keys."""
    points = []
    for step in steps:
        value: Any = step
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            points.append((step["iteration"], value))
    return points
