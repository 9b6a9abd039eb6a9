"""A study's rows as a markdown table and as a plot against S."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uiollms.files.atomic import replacing
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


def plot(rows: Sequence[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    """One panel a column: the figure against S, a line for every estimator."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.2 * len(columns), 3.6), layout="constrained")
    windows = sorted({row["S"] for row in rows if row["estimator"] != "exact"})
    for axes, column in zip(
        figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True
    ):
        for name in dict.fromkeys(row["estimator"] for row in rows):
            found = {row["S"]: row[column] for row in rows if row["estimator"] == name}
            if name == "exact":
                axes.axhline(next(iter(found.values())), color="0.5", linestyle=":", label=name)
            else:
                axes.plot(
                    range(len(windows)), [found[S] for S in windows], "o-", label=name, alpha=0.8
                )
        axes.set_xticks(range(len(windows)), ["inf" if S == INFINITE else str(S) for S in windows])
        axes.set_xlabel("S")
        axes.set_title(column)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(path) as work:
        figure.savefig(work, dpi=110)
