"""Draws the pictures of the README and of docs/concepts.md, by the program's own functions.

python docs/picture.py
python docs/picture.py --out /tmp/x   # elsewhere, to compare
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from uiollms.files.atomic import replacing
from uiollms.model.attention import decoder_mask, decoder_positions, encoder_mask, encoder_positions
from uiollms.training.estimators import ESTIMATORS, Estimator, make_estimator

INK, BASE, ENC, DEC, MEM = "#222222", "#dfe3e8", "#f2a65a", "#5a8ff2", "#f7d6a8"


def box(axes, x, y, width, height, text, color, size=9):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.8))
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK
    )


def arrow(
    axes, start, end, text="", color=INK, style="-|>", offset=(0, 0), dashed=False, curve=0.0
):
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=10, color=color, linewidth=1.1,
            linestyle="--" if dashed else "-", connectionstyle=f"arc3,rad={curve}",
        )
    )  # fmt: skip
    if text:
        x, y = (start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1]
        axes.text(x, y, text, fontsize=8, color=color, ha="center", va="center")


def how_it_works() -> Figure:
    """Two chunks become memories that a third reads."""
    figure = Figure(figsize=(10, 4.9), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 52)
    axes.axis("off")

    for i, x in enumerate((4, 29)):
        box(axes, x, 2, 14, 5, f"chunk {i}: l tokens", "white")
        box(axes, x + 14, 2, 6, 5, "m slots", MEM)
        box(axes, x, 13, 20, 8, "encoder\nfrozen base + LoRA on q, v", ENC)
        arrow(axes, (x + 10, 7), (x + 10, 13))
        box(axes, x, 27, 20, 5, f"memory {i}: m vectors a layer", MEM, 8.5)
        arrow(axes, (x + 10, 21), (x + 10, 27))
        box(axes, x, 38, 20, 6, "keys and values\nfrozen k, v + decoder LoRA", DEC, 8)
        arrow(axes, (x + 10, 32), (x + 10, 38))

    box(axes, 68, 2, 22, 5, "chunk 2: l tokens, raw", "white")
    box(axes, 68, 23, 22, 10, "decoder\nthe frozen base itself", BASE)
    arrow(axes, (79, 7), (79, 23))
    box(axes, 68, 43, 22, 5, "logits, loss", "white")
    arrow(axes, (79, 33), (79, 43))
    arrow(
        axes,
        (49, 41),
        (68, 30),
        "both read as a KV cache\nat positions 0 .. 2m-1",
        offset=(-1.5, -4.5),
    )
    arrow(axes, (24, 44), (68, 32), curve=-0.25)
    arrow(
        axes,
        (67, 24.5),
        (50.5, 16),
        "gradient to the encoder:\nchunks chosen by the estimator",
        color="#b03030",
        dashed=True,
        offset=(6.5, -4.5),
    )
    return figure


CPU = torch.device("cpu")


def masks(l: int = 8, m: int = 2, earlier: int = 2) -> Figure:
    """Who sees whom in the encoder, and in a decoder behind the memories of `earlier` chunks:
    chunks of l tokens, m slots."""
    figure = Figure(figsize=(10, 4.9), layout="constrained")
    encoder, decoder = figure.subplots(1, 2, width_ratios=(l + m, m * earlier + l))
    names = [f"token {i}" for i in range(l)] + [f"slot {i}" for i in range(m)]
    positions = encoder_positions(l, m, CPU)[0].tolist()
    rows = [f"{name}, at {position}" for name, position in zip(names, positions, strict=True)]
    show_mask(encoder, encoder_mask(l, m, CPU), rows, names, slots=range(l, l + m))
    encoder.set_title("encoder: one chunk, then its memory slots", fontsize=10)

    slots = m * earlier
    mask = decoder_mask([slots], 0, l, CPU)
    assert mask is not None
    positions = decoder_positions([slots], l, CPU)[0].tolist()
    rows = [f"token {i}, at {position}" for i, position in enumerate(positions)]
    columns = [f"memory {i // m}, slot {i % m}" for i in range(slots)] + [
        f"token {i}" for i in range(l)
    ]
    show_mask(decoder, mask, rows, columns, slots=range(slots))
    decoder.set_title(
        f"decoder: chunk {earlier} behind the memories of chunks 0 .. {earlier - 1}", fontsize=10
    )
    return figure


def show_mask(
    axes: Any, mask: torch.Tensor, rows: list[str], columns: list[str], slots: range
) -> None:
    """mask [1, 1, queries, keys]: what a row may see is coloured, by whether a token or a memory
    slot is seen."""
    seen = mask[0, 0].int()
    seen[:, list(slots)] *= 2
    axes.imshow(seen.numpy(), cmap=ListedColormap(["white", DEC, ENC]), vmin=0, vmax=2)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], minor=True)
    axes.grid(which="minor", color="0.85")
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("is seen")
    axes.set_ylabel("sees")


def weights(num_chunks: int = 8, S: int = 2, draws: int = 20_000) -> Figure:
    """W of every estimator: one draw above, the mean over `draws` below."""
    shown = [("exact", True), ("tbptt", True), ("uio", True), ("uio", False), ("importance", True)]
    assert {name for name, _ in shown} == set(ESTIMATORS)
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    panels = figure.subplots(2, len(shown))
    for column, (name, compensate) in enumerate(shown):
        estimator = make_estimator(name, S=S, compensate=compensate)
        rng = random.Random(3)
        drawn = [weights_of(estimator, num_chunks, rng) for _ in range(draws)]
        for axes, matrix in zip(
            panels[:, column], (drawn[0], torch.stack(drawn).mean(0)), strict=True
        ):
            show_weights(axes, matrix, "{:.2g}" if axes is panels[0, column] else "{:.1f}")
        panels[0, column].set_title(
            f"{name}{'' if compensate else ', compensate: false'}", fontsize=10
        )
    panels[0, 0].set_ylabel("one draw\nloss t")
    panels[1, 0].set_ylabel(f"mean of {draws:,} draws\nloss t")
    figure.supxlabel("memory s", fontsize=10)
    return figure


def weights_of(estimator: Estimator, num_chunks: int, rng: random.Random) -> torch.Tensor:
    """[N, N]: one draw of W, for memories whose gradients are as large as the losses that read
    them are many."""
    window = estimator.weight_matrix(num_chunks, rng)
    factors = estimator.columns([float(num_chunks - 1 - s) for s in range(num_chunks)], rng)
    return window if factors is None else window * torch.tensor(factors, dtype=window.dtype)


def show_weights(axes: Any, matrix: torch.Tensor, form: str) -> None:
    axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=4)
    for t, s in matrix.nonzero().tolist():
        value = matrix[t, s].item()
        axes.text(
            s,
            t,
            form.format(value),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if value > 2.5 else INK,
        )
    axes.plot([-0.5, len(matrix) - 0.5], [-0.5, len(matrix) - 0.5], color="0.7", linewidth=0.8)
    axes.set_xticks(range(len(matrix)))
    axes.set_yticks(range(len(matrix)))
    axes.tick_params(length=0, labelsize=8)


PICTURES = {"how-it-works.png": how_it_works, "masks.png": masks, "weights.png": weights}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="FOLDER",
        help="where they go (docs/)",
    )
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        with replacing(out / name) as work:
            draw().savefig(work, dpi=110)


if __name__ == "__main__":
    main()
