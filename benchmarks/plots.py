"""The plots of a report: time per token, utilisation and peak memory against length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from uiollms.files.atomic import replacing

COLUMNS = {
    "time / token, / first": "time per token, relative",
    "utilisation": "share of GEMM peak",
    "peak MiB": "peak MiB",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """One row of plots a model; training and scoring in each. Nothing where neither was
    measured."""
    tables = {
        name: {t: rows for t, rows in result["tables"].items() if t.endswith("against length")}
        for name, result in report["models"].items()
    }
    tables = {name: found for name, found in tables.items() if found}
    if not tables:
        return
    figure, grid = plt.subplots(
        len(tables), len(COLUMNS), figsize=(4 * len(COLUMNS), 3 * len(tables)), squeeze=False
    )
    for line, (name, found) in zip(grid, tables.items(), strict=True):
        for axis, (column, label) in zip(line, COLUMNS.items(), strict=True):
            for title, rows in found.items():
                axis.plot(
                    [r["tokens"] for r in rows],
                    [r[column] for r in rows],
                    marker="o",
                    label=title.split()[0],
                )
            axis.set(
                xscale="log",
                xlabel="tokens",
                ylabel=label,
                title=name,
                ylim=(0, 1.1 * axis.dataLim.ymax),
            )
            axis.legend()
    figure.tight_layout()
    with replacing(path) as work:
        figure.savefig(work, dpi=120)
    plt.close(figure)
