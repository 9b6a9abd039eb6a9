"""Pictures of a training run: losses, and what each step did and took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uiollms.evaluation.summaries import checked_estimate
from uiollms.files.atomic import replacing, reporting_write_errors
from uiollms.reports.plots import COLORS
from uiollms.reports.tables import NAMES
from uiollms.runs.metrics import read_metrics


def plot_run(run: Path, loss: str, counted: str) -> None:
    """Draw a run folder's curve.png; see `plot_training`. Raises ConfigError where it cannot be
    written."""
    with reporting_write_errors(run / "curve.png"):
        plot_training(read_metrics(run), run / "curve.png", loss, counted)


def plot_training(
    metrics: Sequence[dict[str, Any]], path: Path, loss: str = "paper", counted: str = "documents"
) -> Path:
    """Training NLL per token, and an evaluation, against iterations, which are `counted`
    documents or steps; in a panel of its own where it scores other tokens than the training
    loss, `loss`: paper or document. Below, where evaluations shuffle memories, what the own are
    worth."""
    from matplotlib.figure import Figure  # slow to import, and only runs that plot need it

    steps = [m for m in metrics if m.get("nll") is not None]
    evaluations = [(m["iteration"], curve_task(loss, m["eval"])) for m in metrics if m.get("eval")]
    apart = bool(evaluations) and evaluations[0][1].get("protocol", "paper") != loss
    bounds = bound_lines(metrics)
    count = 1 + apart + bool(bounds)
    figure = Figure(figsize=(8, 1 + 3.5 * count), layout="constrained")
    all_panels = figure.subplots(count, squeeze=False).flatten()
    panels = all_panels[: 1 + apart]
    if bounds:
        plot_bounds(bounds, all_panels[-1])
    x, y = [m["iteration"] for m in steps], [m["nll"] for m in steps]
    panels[0].plot(x, y, ".", color="0.75", markersize=4, label="training batch")
    width = max(1, len(y) // 20)
    panels[0].plot(
        x,
        smoothed(y, width),
        color="0.3",
        label=f"mean of the last {width}" if width > 1 else "training",
    )
    for mode, color in COLORS.items():
        points = [
            (iteration, nll_of(task[mode])) for iteration, task in evaluations if mode in task
        ]
        if points:
            panels[-1].plot(
                *zip(*points, strict=True), "o-", color=color, label=f"held out, {NAMES[mode]}"
            )
    for axes in panels:
        axes.set_ylabel("NLL, nats per scored token")
    for axes in all_panels:
        mark_stages(axes, metrics)
        axes.set_xlabel(counted)
        axes.legend()
        axes.grid(alpha=0.3)
    if y:
        panels[0].set_ylim(min(y) - 0.2, sorted(y)[int(len(y) * 0.9)] + 1)
    with replacing(path) as work:
        figure.savefig(work, dpi=120)
    return path


def mark_stages(axes: Any, metrics: Sequence[dict[str, Any]]) -> None:
    """A line where a stage of the run begins, with its number."""
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
    """The iteration that the first step of each stage ended with; of a run without stages none."""
    starts: dict[int, int] = {}
    for line in metrics:
        if "stage" in line:
            starts.setdefault(line["stage"], line["iteration"])
    return starts


Bound = tuple[int, float, float, float]  # iteration, value, interval


def bound_lines(metrics: Sequence[dict[str, Any]]) -> dict[str, list[Bound]]:
    """The bound of each task at every evaluation that has one, with its interval, by the task."""
    lines: dict[str, list[Bound]] = {}
    for line in metrics:
        for i, task in enumerate(line.get("eval") or []):
            if found := checked_estimate(task, "bound"):
                label = f"{i}: {task['task_type']} of {task['task']}"
                point = line["iteration"], found.value, *found.interval_95
                lines.setdefault(label, []).append(point)
    return lines


def plot_bounds(lines: dict[str, list[Bound]], axes: Any) -> None:
    """A line with its interval for each task; at 0 another document's memory serves as well."""
    for label, points in lines.items():
        iterations, values, low, high = zip(*points, strict=True)
        (line,) = axes.plot(iterations, values, "o-", label=label)
        axes.fill_between(iterations, low, high, alpha=0.2, color=line.get_color())
    axes.axhline(0, color="0.3", linestyle=":", label="another document's memory serves as well")
    axes.set_ylabel("bound, nats per scored token")


def nll_of(numbers: dict[str, Any]) -> float:
    """A mode's mean NLL, which older metrics hold as a perplexity alone; NaN, which no line
    shows, where it was no number."""
    nll = (
        numbers["nll"]
        if "nll" in numbers
        else numbers["perplexity"] and math.log(numbers["perplexity"])
    )
    return math.nan if nll is None else nll


def curve_task(loss: str, tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of an evaluation's tasks the one that the curve shows: the first that scores the same
    tokens as the training loss, else the first. (Metrics that name no protocol are perplexities
    under the paper's.)"""
    return next((task for task in tasks if task.get("protocol", "paper") == loss), tasks[0])


def smoothed(y: Sequence[float], width: int) -> list[float]:
    """Every number as the mean of the last `width`, or of as many as there are."""
    return [sum(y[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(y))]


GRADIENTS = {
    "encoder_lora": "encoder LoRA",
    "decoder_lora": "decoder LoRA",
    "token_embeddings": "token embeddings",
}


def plot_steps(metrics: Sequence[dict[str, Any]], counted: str, path: Path) -> Path:
    """Panels against iterations, which are `counted` documents or steps: learning rate, gradient
    norms before clipping, tokens a second, peak memory; each where the metrics have it."""
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
        "tokens read a second": {"": column(steps, "machine", "tokens_per_second")},
        "peak memory so far, GiB": memory,
    }
    panels = {label: lines for label, lines in panels.items() if any(lines.values())}
    figure = Figure(figsize=(11, 3.2 * math.ceil(len(panels) / 2)), layout="constrained")
    for i, (label, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(math.ceil(len(panels) / 2), 2, i + 1)
        for name, points in lines.items():
            if points:
                look: dict[str, Any] = dict(linewidth=0.9, marker=".", markersize=3)
                if name == "all":  # often within a hair of the largest part
                    look = dict(color="0.8", linewidth=3)
                axes.plot(*zip(*points, strict=True), label=name, **look)
        mark_stages(axes, metrics)
        if "norm" in label:
            axes.set_yscale("log")
        else:
            axes.set_ylim(
                0, 1.1 * max(number for points in lines.values() for _, number in points) or 1
            )
        if len([points for points in lines.values() if points]) > 1:
            axes.legend(fontsize=8)
        axes.set_xlabel(counted)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    with replacing(path) as work:
        figure.savefig(work, dpi=110)
    return path


def column(steps: Sequence[dict[str, Any]], *keys: str) -> list[tuple[int, float]]:
    """(iteration, number) of every step that has the number."""
    points = []
    for step in steps:
        value: Any = step
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            points.append((step["iteration"], value))
    return points
