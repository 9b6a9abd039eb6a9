"""Writes the rows of a study as a markdown table and as a plot against S."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

from uiollms.files.atomic import atomic_file
from uiollms.study.gradients import INFINITE

LEFT = ("estimator", "sweep", "mode")
ROW_NAMES = ("distance", "estimator", "S", "sweep", "tokens", "ratio", "mode")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a markdown table. An infinite S is written as inf."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(column, row[column]) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def print_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints rows as tables that fit the console: the columns that name a row, and as many others
    as there is space for. The remaining columns follow in further tables, with the names again."""
    cells = {name: [cell(name, row[name]) for row in rows] for name in rows[0]}
    widths = {
        name: max([*map(len, name.split()), *map(len, column)]) for name, column in cells.items()
    }
    names = [name for name in cells if name in ROW_NAMES]
    groups: list[list[str]] = [[]]
    for name in (name for name in cells if name not in ROW_NAMES):
        shown = [*names, *groups[-1], name]
        if groups[-1] and sum(widths[n] + 2 for n in shown) > console.width:
            groups.append([])
        groups[-1].append(name)
    for group in groups:
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
        for name in (*names, *group):
            justify: JustifyMethod = "left" if name in LEFT else "right"
            table.add_column(name, justify=justify, min_width=widths[name])
        for row in zip(*(cells[name] for name in (*names, *group)), strict=True):
            table.add_row(*row)
        console.print(table)
        console.print()


def print_texts(rows: Sequence[dict[str, str]], console: Console) -> None:
    """Prints rows of words as one table, whose cells are wrapped to fit the console."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def cell(column: str, value: Any) -> str:
    if column == "S" and value == INFINITE:
        return "inf"
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# column -> the title of its panel, with the unit; columns without a title are shown by their names
TITLES = {
    "bias": "bias: error of the mean gradient\n(relative to the exact norm)",
    "variance": "variance of the gradient\n(relative to the exact norm squared)",
    "norm_ratio": "norm of the gradient\n(relative to the exact norm)",
    "cosine": "cosine with the exact gradient",
    "relative_error": "error of one gradient\n(relative to the exact norm)",
    "encoder_backwards": "encoder backwards per document\n(chunks)",
    "seconds": "time of a step (s)",
    "peak_mib": "peak memory of a step (MiB)",
}
MARKERS = "os^Dv"


def plot(rows: Sequence[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    """Draws one panel per column: the number against S, one line per estimator, and a horizontal
    line for the exact gradient, which has no S."""
    from matplotlib.figure import Figure  # slow to import

    height = math.ceil(len(columns) / 2)
    figure = Figure(figsize=(11, 0.6 + 3.9 * height), layout="constrained")
    sizes = sorted({row["S"] for row in rows if row["estimator"] != "exact"})
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    for number, column in enumerate(columns):
        axes = figure.add_subplot(height, min(2, len(columns)), number + 1)
        for name, marker in zip(names, MARKERS, strict=False):
            found = {row["S"]: row[column] for row in rows if row["estimator"] == name}
            if name == "exact":
                axes.axhline(found[INFINITE], color="0.3", linestyle=":", label=name)
                continue
            # Each line is thinner than the one below it, so that lines on each other stay visible.
            width = 4 - 0.8 * names.index(name)
            line_style: dict[str, Any] = dict(marker=marker, markersize=4 + width, linewidth=width)
            values = [found[S] for S in sizes]
            axes.plot(range(len(sizes)), values, label=name, alpha=0.8, **line_style)
        axes.set_xticks(range(len(sizes)), ["\u221e" if S == INFINITE else str(S) for S in sizes])
        axes.set_xlabel("S (memories that a loss reaches at most)", fontsize=10)
        axes.set_title(TITLES.get(column, column), fontsize=12)
        low, high = axes.dataLim.intervaly
        axes.set_ylim(min(0, low) - 0.05 * high, 1.08 * high or 1)
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=11)
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
