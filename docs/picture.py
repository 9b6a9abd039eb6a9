"""Draws docs/how-it-works.png, the README's picture: python docs/picture.py"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

INK, BASE, ENC, DEC, MEM = "#222222", "#dfe3e8", "#f2a65a", "#5a8ff2", "#f7d6a8"


def box(axes, x, y, width, height, text, color, size=9):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes, start, end, text="", color=INK, style="-|>", offset=(0, 0), dashed=False, curve=0.0):
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=10, color=color, linewidth=1.1,
            linestyle="--" if dashed else "-", connectionstyle=f"arc3,rad={curve}",
        )
    )  # fmt: skip
    if text:
        x, y = (start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1]
        axes.text(x, y, text, fontsize=8, color=color, ha="center", va="center")


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
arrow(axes, (49, 41), (68, 30), "both read as a KV cache\nat positions 0 .. 2m-1", offset=(-1.5, -4.5))
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
figure.savefig(Path(__file__).with_name("how-it-works.png"), dpi=110)
