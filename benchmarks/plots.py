"""The plots of a benchmark report: time per token, utilisation and peak memory against length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from uiollms.files.atomic import atomic_file

# column of a table -> the title of its panel, with the unit
TITLES = {
    "time / token, / first": "time per token\n(relative to the shortest document)",
    "utilisation": "FLOP/s\n(fraction of this machine's GEMM peak)",
    "peak MiB": "peak memory above the weights (MiB)",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the panels of each model, two in a row, with a line for training and one for scoring.
    Writes no file if neither was measured."""
    tables = {
        name: {t: rows for t, rows in result["tables"].items() if t.endswith("against length")}
        for name, result in report["models"].items()
    }
    tables = {name: found for name, found in tables.items() if found}
    if not tables:
        return
    height = math.ceil(len(TITLES) / 2)  # rows of a model
    figure = Figure(figsize=(11, 0.6 + 4 * height * len(tables)), layout="constrained")
    grid = figure.subplots(height * len(tables), 2, squeeze=False)
    for number, (name, found) in enumerate(tables.items()):
        panels = grid[number * height : (number + 1) * height].flatten()
        for axes in panels[len(TITLES) :]:
            axes.set_axis_off()
        for axes, (column, title) in zip(panels, TITLES.items(), strict=False):
            for (what, rows), marker in zip(found.items(), "os", strict=False):
                lengths, values = [r["tokens"] for r in rows], [r[column] for r in rows]
                axes.plot(lengths, values, marker=marker, label=what.split()[0])
            axes.set_xscale("log")
            axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths], rotation=45, ha="right")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
            axes.set_title(f"{name}: {title}", fontsize=11)
            axes.set_xlabel("tokens of the document", fontsize=11)
            axes.grid(alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=11)
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
