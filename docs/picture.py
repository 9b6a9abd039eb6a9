"""Draws the pictures of the documents by the program's own functions: those of the README and of
docs/concepts.md, and those of docs/results/ from the numbers beside them.

python docs/picture.py
python docs/picture.py --out /tmp/x   # elsewhere, to compare
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from uiollms.files.atomic import atomic_file
from uiollms.model.attention import decoder_mask, encoder_mask
from uiollms.model.positions import decoder_positions, encoder_positions
from uiollms.reports.curves import plot_training
from uiollms.reports.plots import style
from uiollms.study.budget import plot_budget
from uiollms.study.experiments import plot_cells
from uiollms.study.learning import plot_curves
from uiollms.study.recall import VALUES as RECALL_VALUES
from uiollms.study.savings import plot_savings
from uiollms.study.tables import TITLES, plot
from uiollms.training.estimators import ESTIMATORS, Estimator, make_estimator

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # benchmarks/ is not installed with the package
from benchmarks.plots import draw  # noqa: E402

INK, RED = "#222222", "#b03030"
FROZEN, TRAINED, VALUES = "#d5dae1", "#f2a65a", "white"
SEEN_TOKEN, SEEN_MEMORY = "#5a8ff2", "#f2a65a"


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=INK)


FORWARD: dict[str, Any] = dict(color=INK, linestyle="-", linewidth=1.4)
GRADIENT: dict[str, Any] = dict(color=RED, linestyle=(0, (4, 2)), linewidth=1.4)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **look: Any) -> None:
    """An arrow from `start`, whose head touches `end`."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, shrinkA=0, shrinkB=0, **look
        )
    )


def note(axes: Any, x: float, y: float, text: str, size: int = 10) -> None:
    axes.text(x, y, text, ha="left", va="center", fontsize=size, color=RED)


def how_it_works() -> Figure:
    """Two chunks become memories that a third chunk reads; the gradient of its loss goes back to
    both memories, and into the encoder of one chunk."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 100)
    axes.set_ylim(1, 79)
    axes.axis("off")

    for i, x in enumerate((1, 31)):
        box(axes, x, 2, 18, 6, f"chunk {i}: l tokens", VALUES)
        box(axes, x + 18, 2, 10, 6, "m slots", TRAINED)
        box(axes, x, 15, 28, 6, "encoder: the base", FROZEN)
        box(axes, x, 21, 28, 4.5, "LoRA on its q and v", TRAINED)
        box(axes, x, 33, 28, 6, f"memory {i}: m vectors a layer", VALUES)
        box(axes, x, 46, 28, 6, "k and v projections of the base", FROZEN)
        box(axes, x, 52, 28, 4.5, "decoder LoRA on them", TRAINED)
        positions = ("0 .. m-1", "m .. 2m-1")[i]
        label = f"keys, values of memory {i}\nat positions {positions}"
        box(axes, x - i, 63, 29 + i, 8, label, VALUES)
        for low, high in ((8, 15), (25.5, 33), (39, 46), (56.5, 63)):
            arrow(axes, (x + 7, low), (x + 7, high), **FORWARD)
        for high, low in ((63, 56.5), (46, 39)):
            arrow(axes, (x + 20, high), (x + 20, low), **GRADIENT)

    axes.plot([21, 21], [33, 29.7], **GRADIENT)
    axes.plot([21], [29.5], marker="x", color=RED, markersize=10, markeredgewidth=2.5)
    note(axes, 23, 29.5, "the estimator\nskips chunk 0")
    arrow(axes, (51, 33), (51, 25.5), **GRADIENT)
    note(axes, 52, 29.5, "the estimator\nchose chunk 1")

    box(axes, 73, 2, 26, 6, "chunk 2: l tokens", VALUES)
    box(axes, 73, 60, 26, 11, "decoder: the base,\nreads memories and chunk", FROZEN)
    box(axes, 73, 74.5, 26, 4, "logits, loss", VALUES)
    arrow(axes, (81, 8), (81, 60), **FORWARD)
    arrow(axes, (81, 71), (81, 74.5), **FORWARD)
    arrow(axes, (93, 74.5), (93, 71), **GRADIENT)
    arrow(axes, (60, 69), (73, 69), **FORWARD)
    arrow(axes, (73, 65), (60, 65), **GRADIENT)
    axes.text(66.5, 70, "KV cache", ha="center", va="bottom", fontsize=10)

    handles = [
        Patch(facecolor=FROZEN, edgecolor=INK, label="frozen weights: one base for all"),
        Patch(facecolor=TRAINED, edgecolor=INK, label="trained weights"),
        Patch(facecolor=VALUES, edgecolor=INK, label="values"),
        Line2D([], [], **FORWARD, label="forward"),
        Line2D([], [], **GRADIENT, label="gradient of chunk 2's loss"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=10, frameon=False)
    return figure


CPU = torch.device("cpu")


def masks(l: int = 8, m: int = 2, earlier: int = 2) -> Figure:
    """Which key each query reads, in the encoder and in a decoder that reads the memories of
    `earlier` chunks: chunks of l tokens, m slots."""
    figure = Figure(figsize=(12.5, 6), layout="constrained")
    encoder, decoder = figure.subplots(1, 2, width_ratios=(l + m, m * earlier + l))
    names = [f"token {i}" for i in range(l)] + [f"slot {i}" for i in range(m)]
    positions = encoder_positions(l, m, CPU)[0].tolist()
    show_mask(encoder, encoder_mask(l, m, CPU), names, positions, names, slots=range(l, l + m))
    encoder.set_title(f"Encoder: a chunk of {l} tokens, then its {m} slots", fontsize=12)

    slots = m * earlier
    mask = decoder_mask([slots], 0, l, CPU)
    assert mask is not None
    positions = decoder_positions([slots], 0, l, CPU)[0].tolist()
    keys = [f"memory {i // m}, slot {i % m}" for i in range(slots)] + names[:l]
    show_mask(decoder, mask, names[:l], positions, keys, slots=range(slots))
    decoder.set_title(
        f"Decoder: chunk {earlier} reads the memories of chunks 0 to {earlier - 1}", fontsize=12
    )
    handles = [
        Patch(facecolor=color, edgecolor="0.6", label=label)
        for color, label in (
            (SEEN_TOKEN, "query attends to a token"),
            (SEEN_MEMORY, "query attends to a memory slot"),
            ("white", "masked"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=11, frameon=False)
    return figure


def show_mask(
    axes: Any,
    mask: torch.Tensor,
    queries: list[str],
    positions: list[int],
    keys: list[str],
    slots: range,
) -> None:
    """mask [1, 1, queries, keys]: a key that a query attends to is coloured, by whether it is a
    token or a memory slot."""
    attended = mask[0, 0].int()
    attended[:, list(slots)] *= 2
    colors = ListedColormap(["white", SEEN_TOKEN, SEEN_MEMORY])
    axes.imshow(attended.numpy(), cmap=colors, vmin=0, vmax=2)
    axes.set_anchor("N")
    rows = [f"{name} ({position})" for name, position in zip(queries, positions, strict=True)]
    axes.set_xticks(range(len(keys)), keys, rotation=90, fontsize=10)
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.set_xticks([x + 0.5 for x in range(len(keys))], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], minor=True)
    axes.grid(which="minor", color="0.85")
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("key", fontsize=12)
    axes.set_ylabel("query (position)", fontsize=12)


def weights(num_chunks: int = 8, S: int = 2, draws: int = 20_000) -> Figure:
    """W of every estimator: one draw above, the mean over `draws` below."""
    shown = [("exact", True), ("tbptt", True), ("uio", True), ("uio", False), ("importance", True)]
    assert {name for name, _ in shown} == set(ESTIMATORS)
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    panels = figure.subplots(2, len(shown), sharex=True, sharey=True)
    for column, (name, compensate) in enumerate(shown):
        estimator = make_estimator(name, S=S, compensate=compensate)
        rng = random.Random(3)
        drawn = [weights_of(estimator, num_chunks, rng) for _ in range(draws)]
        for axes, matrix in zip(
            panels[:, column], (drawn[0], torch.stack(drawn).mean(0)), strict=True
        ):
            image = show_weights(axes, matrix, "{:.2g}" if axes is panels[0, column] else "{:.1f}")
        title = name if compensate else f"{name}, compensate: false"
        panels[0, column].set_title(title, fontsize=13)
        panels[1, column].set_xlabel("memory s", fontsize=11)
    panels[0, 0].set_ylabel("one draw\nloss t", fontsize=11)
    panels[1, 0].set_ylabel(f"mean of {draws:,} draws\nloss t", fontsize=11)
    figure.suptitle(
        f"Weight of loss t in the gradient that memory s passes to the encoder: {num_chunks} "
        f"chunks, S = {S}",
        fontsize=13,
    )
    figure.colorbar(image, ax=panels, label="weight (exact gradient: 1)", pad=0.01)
    return figure


def weights_of(estimator: Estimator, num_chunks: int, rng: random.Random) -> torch.Tensor:
    """[N, N]: one draw of W, for memories whose gradients are as large as the losses that read
    them are many."""
    window = estimator.weight_matrix(num_chunks, rng)
    factors = estimator.columns([float(num_chunks - 1 - s) for s in range(num_chunks)], rng)
    return window if factors is None else window * torch.tensor(factors, dtype=window.dtype)


def show_weights(axes: Any, matrix: torch.Tensor, form: str) -> Any:
    """The matrix as an image with its numbers -> the image."""
    image = axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=4)
    for t, s in matrix.nonzero().tolist():
        value = matrix[t, s].item()
        color = "white" if value > 2.2 else INK
        axes.text(s, t, form.format(value), ha="center", va="center", fontsize=9, color=color)
    axes.plot([-0.5, len(matrix) - 0.5], [-0.5, len(matrix) - 0.5], color="0.7", linewidth=0.8)
    axes.set_xticks(range(len(matrix)))
    axes.set_yticks(range(len(matrix)))
    axes.tick_params(length=0, labelsize=10)
    return image


PICTURES = {"how-it-works.png": how_it_works, "masks.png": masks, "weights.png": weights}


RESULTS = ROOT / "docs" / "results"


def draw_study(path: Path) -> None:
    """The plot of `uiollms study gradients` or `cost`, from its results.json."""
    rows = json.loads((RESULTS / path.parent.name / "results.json").read_text())["rows"]
    plot(rows, [column for column in TITLES if column in rows[0]], path)


def draw_learning(path: Path) -> None:
    """The plot of `uiollms study learning` or `recall`, from its curves.jsonl."""
    folder = RESULTS / path.parent.name
    lines = (folder / "curves.jsonl").read_text().splitlines()
    curves = [json.loads(line) for line in lines[1:]]
    results = json.loads((folder / "results.json").read_text())
    if "references" in results["setting"]:
        nll = results["setting"]["references"]
        references = {"no memory": nll["window"], "raw context": nll["raw"]}
        plot_curves({"": curves}, references, path)
    else:
        panel = f"distance {results['rows'][0]['distance']}"
        plot_curves({panel: curves}, {"guessing": math.log(RECALL_VALUES)}, path)


def draw_training(path: Path) -> None:
    """The curve.png of the run whose metrics are committed."""
    lines = (RESULTS / "smollm2-8x-metrics.jsonl").read_text().splitlines()
    plot_training([json.loads(line) for line in lines], path)


def draw_bench(path: Path) -> None:
    """The plot of `python -m benchmarks --what length`."""
    draw(json.loads((RESULTS / "bench/zen4-length.json").read_text()), path)


def draw_paper_table(path: Path) -> None:
    """The numbers of a table of several commands. In JSON a missing end of an interval is null."""
    ends = ("low", "high")
    rows = [row | {e: math.nan for e in ends if row[e] is None} for row in rows_of(path)]
    plot_cells(rows, path)


def draw_budget(path: Path) -> None:
    """The numbers of `uiollms study budget`."""
    plot_budget(rows_of(path), style, path)


def draw_savings(path: Path) -> None:
    """The numbers of `uiollms study savings`."""
    plot_savings(rows_of(path), style, path)


# the folder of a run -> million tokens that its weights had read before
RUNS = {"gpu-2026-11-26": 0.0, "gpu-2026-11-27": 15.1, "gpu-2026-11-27-h100": 48.5}
LOSSES = ("text", "answers about facts", "copies of chunks")
SMOOTHED = 10  # records of 20 steps


def draw_long_run(path: Path) -> None:
    """Training losses and bounds of the shipped adapter's trainings over all tokens read so far."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, bounds = figure.subplots(1, 2)
    for run, before in RUNS.items():
        lines = (RESULTS / run / "train.jsonl").read_text().splitlines()
        steps = [step for step in map(json.loads, lines) if len(step["losses"]) == len(LOSSES)]
        for number, (name, color) in enumerate(zip(LOSSES, ("C0", "C1", "C2"), strict=True)):
            found = torch.tensor([step["losses"][number] for step in steps])
            middles = found.unfold(0, min(SMOOTHED, len(found)), 1).median(-1).values
            tokens = [before + step["tokens"] / 1e6 for step in steps[-len(middles) :]]
            label = None if before else name
            losses.plot(tokens, middles.tolist(), color=color, label=label)
    losses.set_title("training losses, running medians (nats)", fontsize=12)
    points = json.loads((RESULTS / path.parent.name / "points.json").read_text())
    for corpus, color in (("stdlib", "C0"), ("novels", "C3")):
        rows = [row for row in points if row["corpus"] == corpus]
        bound = [row["bound"] for row in rows]
        ends = [
            [row["bound"] - row["low"] for row in rows],
            [row["high"] - row["bound"] for row in rows],
        ]
        label = f"{corpus}, {rows[0]['documents']} documents"
        tokens = [row["tokens"] / 1e6 for row in rows]
        bounds.errorbar(tokens, bound, ends, color=color, marker="o", capsize=4, label=label)
    bounds.set_title("bound of held-out text, 256 / 32 (nats)", fontsize=12)
    for axes in (losses, bounds):
        axes.set(xlabel="million tokens", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of the study whose plot this is."""
    return json.loads((RESULTS / path.parent.name / "results.json").read_text())["rows"]


# path below docs/results -> the function that draws it
RESULT_PICTURES: dict[str, Callable[[Path], None]] = {
    "ablation-design/plot.png": draw_paper_table,
    "ablation-estimators/plot.png": draw_paper_table,
    "bench/zen4-length.png": draw_bench,
    "budget-code/plot.png": draw_budget,
    "budget-length/plot.png": draw_budget,
    "budget-novels/plot.png": draw_budget,
    "long-run/plot.png": draw_long_run,
    "paper-figure7/plot.png": draw_paper_table,
    "paper-table1/plot.png": draw_paper_table,
    "paper-table2/plot.png": draw_paper_table,
    "paper-table4/plot.png": draw_paper_table,
    "paper-table5/plot.png": draw_paper_table,
    "paper-table6/plot.png": draw_paper_table,
    "savings/plot.png": draw_savings,
    "smollm2-8x-curve.png": draw_training,
    "study-config/plot.png": draw_study,
    "study-cost/plot.png": draw_study,
    "study-figure7/plot.png": draw_study,
    "study-learning/plot.png": draw_learning,
    "study-recall-1/plot.png": draw_learning,
    "study-recall-4/plot.png": draw_learning,
    "study-table4/plot.png": draw_study,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs",
        metavar="FOLDER",
        help="the folder to draw into; default: docs/",
    )
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        with atomic_file(out / name) as work:
            picture().savefig(work, dpi=110)
    for name, draw_result in RESULT_PICTURES.items():
        path = out / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_result(path)


if __name__ == "__main__":
    main()
