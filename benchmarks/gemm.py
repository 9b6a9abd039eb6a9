"""The GEMM peak: the speed at which the machine multiplies matrices of the model's shapes."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.measure import interleaved
from uiollms.kernels.frozen_linear import linear
from uiollms.planning.flops import Flops, gemm_shapes

WAYS = {"torch": F.linear, "uiollms": linear}
SQUARE = 8192  # rows and columns of the square product that a GPU is measured with


def gemm_peak(
    flops: Flops, rows: int, dtype: torch.dtype, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Measures the matrix products of the model for `rows` tokens. The fastest repeat counts.

    shapes: FLOP/s of each product, by the faster of torch's `linear` and `frozen_linear.linear`
    ways:   seconds of torch's `linear` divided by those of `frozen_linear.linear`
    peak:   FLOP/s of all products together, each as often as one pass computes it; on a GPU, where
            small products are limited by their launches, at least the rate of a square product
    """
    shapes = gemm_shapes(flops, rows)
    calls = {}
    for (n, inputs, outputs), _ in shapes:
        x, weight = (
            torch.randn(shape, inputs, dtype=dtype, device=device) for shape in (n, outputs)
        )
        for way, product in WAYS.items():
            calls[(n, inputs, outputs), way] = lambda product=product, x=x, weight=weight: product(
                x, weight
            )
    best = {
        key: min(turns) for key, turns in interleaved(calls, 3 * repeats, device=device).items()
    }
    seconds = {shape: min(best[shape, way] for way in WAYS) for shape, _ in shapes}
    work = {(n, i, o): 2 * n * i * o for n, i, o in seconds}
    peak = sum(times * work[shape] for shape, times in shapes) / sum(
        times * seconds[shape] for shape, times in shapes
    )
    if device.type == "cuda":
        peak = max(peak, square_rate(SQUARE, dtype, device))
    return {
        "peak": peak,
        "shapes": {"x".join(map(str, shape)): work[shape] / seconds[shape] for shape in seconds},
        "ways": {
            "x".join(map(str, shape)): best[shape, "torch"] / best[shape, "uiollms"]
            for shape in seconds
        },
    }


def square_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Returns the FLOP/s of a square product of random numbers, the median of ten."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    turns = interleaved({"square": lambda: a @ b}, 10, device=device)["square"]
    return 2 * size**3 / statistics.median(turns)
