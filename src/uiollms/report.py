"""What a person looks at: the table of an evaluation, the curve of a training run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from uiollms.evaluate import PerplexityResult

COLORS = {"window": "tab:red", "memory": "tab:blue", "raw": "tab:green"}
NAMES = {"window": "no memory (window only)", "memory": "with memory", "raw": "raw context"}


def print_results(results: Sequence[PerplexityResult], console: Console | None = None) -> None:
    """One table: perplexity of every task, token-weighted with its 95 % interval, and the documents' mean."""
    table = Table(title="perplexity", title_justify="left")
    for column in ("documents", "tokens", "mode", "perplexity", "95 % interval", "mean", "max", "min", "recovered"):
        table.add_column(column, justify="left" if column in ("documents", "mode") else "right")
    for result in results:
        summary = result.summary()
        for mode in (mode for mode in NAMES if mode in result.per_document):
            low, high = result.interval(mode)
            own = mode == "memory"
            table.add_row(
                f"{summary['documents']} of {result.name}",
                str(result.truncation or "all"),
                NAMES[mode],
                f"{result.perplexity(mode):.2f}",
                f"{low:.2f} .. {high:.2f}",
                *(f"{summary[k]:.2f}" if own else "" for k in ("mean", "max", "min")),
                f"{result.recovered:.0%}" if own and result.recovered is not None else "",
            )
        table.add_section()
    (console or Console(width=130)).print(table)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for a last one that a killed process left without its end."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def plot_training(run: Path) -> Path:
    """`curve.png` in the run folder: training NLL per token, and the evaluations, against iterations."""
    from matplotlib.figure import Figure  # slow to import, and only runs that plot need it

    metrics = read_metrics(run)
    steps = [m for m in metrics if "nll" in m]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    x, y = [m["iteration"] for m in steps], [m["nll"] for m in steps]
    axes.plot(x, y, ".", color="0.75", markersize=4, label="training batch")
    width = max(1, len(y) // 20)
    smooth = [sum(y[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(y))]
    axes.plot(x, smooth, color="0.3", label=f"mean of the last {width}")
    for mode, color in COLORS.items():
        points = [
            (m["iteration"], math.log(m["eval"][0][mode]["perplexity"]))
            for m in metrics
            if m.get("eval") and mode in m["eval"][0]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=f"held out, {NAMES[mode]}")
    axes.set_xlabel("iteration")
    axes.set_ylabel("NLL, nats per scored token")
    if y:
        axes.set_ylim(min(y) - 0.2, sorted(y)[int(len(y) * 0.9)] + 1)
    axes.legend()
    axes.grid(alpha=0.3)
    path = run / "curve.png"
    figure.savefig(path, dpi=120)
    return path
