"""A study's rows as a markdown table and as a plot against S."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uiollms.files.atomic import atomic_file
from uiollms.study.gradients import INFINITE


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a markdown table; an infinite window is written as inf."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(shown(column, row[column]) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def shown(column: str, value: Any) -> str:
    if column == "S" and value == INFINITE:
        return "inf"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# column -> the title of its panel, with the unit; columns without a title are shown by their names
TITLES = {
    "bias": "bias: error of the mean gradient\n(relative to the exact norm)",
    "variance": "variance of the gradient\n(relative to the exact norm squared)",
    "norm_ratio": "norm of the gradient\n(relative to the exact norm)",
    "cosine": "cosine with the exact gradient",
    "relative_error": "error of one gradient\n(relative to the exact norm)",
    "encoder_backwards": "encoder backwards a document\n(chunks)",
    "seconds": "time of a step (s)",
    "peak_mib": "peak memory of a step (MiB)",
}
MARKERS = "os^Dv"


def plot(rows: Sequence[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    """One panel for each column: the number against S, a line for every estimator, and a
    horizontal line for the exact gradient, which has no S."""
    from matplotlib.figure import Figure  # slow to import

    height = math.ceil(len(columns) / 3)
    figure = Figure(figsize=(13, 0.6 + 3.9 * height), layout="constrained")
    windows = sorted({row["S"] for row in rows if row["estimator"] != "exact"})
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    for number, column in enumerate(columns):
        axes = figure.add_subplot(height, min(3, len(columns)), number + 1)
        for name, marker in zip(names, MARKERS, strict=False):
            found = {row["S"]: row[column] for row in rows if row["estimator"] == name}
            if name == "exact":
                axes.axhline(found[INFINITE], color="0.3", linestyle=":", label=name)
                continue
            # Lines that lie on each other stay visible: each is thinner than the one below it.
            width = 4 - 0.8 * names.index(name)
            look: dict[str, Any] = dict(marker=marker, markersize=4 + width, linewidth=width)
            values = [found[S] for S in windows]
            axes.plot(range(len(windows)), values, label=name, alpha=0.8, **look)
        axes.set_xticks(
            range(len(windows)), ["\u221e" if S == INFINITE else str(S) for S in windows]
        )
        axes.set_xlabel("S (memories that a loss reaches at most)", fontsize=10)
        axes.set_title(TITLES.get(column, column), fontsize=12)
        low, high = axes.dataLim.intervaly
        axes.set_ylim(min(0, low) - 0.05 * high, 1.08 * high or 1)
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=11)
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
