"""The GEMM peak: how fast the machine multiplies matrices of the model's own shapes, measured in
the same run."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.measure import interleaved
from uiollms.kernels.frozen_linear import linear
from uiollms.planning.flops import Flops, gemm_shapes

WAYS = {"torch": F.linear, "uiollms": linear}


def gemm_peak(flops: Flops, rows: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """FLOP/s of every product of the model for `rows` tokens at once, the faster of torch's way
    and of `products.linear`, and `peak`: of all of them together, each as often as the model
    needs it (FLOPs over seconds). The best of the repeats counts: a peak is what is possible.
    ways: seconds of torch's way over those of `products.linear`."""
    shapes = gemm_shapes(flops, rows)
    calls = {}
    for (n, inputs, outputs), _ in shapes:
        x, weight = torch.randn(n, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        for way, product in WAYS.items():
            calls[(n, inputs, outputs), way] = lambda product=product, x=x, weight=weight: product(
                x, weight
            )
    best = {key: min(turns) for key, turns in interleaved(calls, 3 * repeats).items()}
    seconds = {shape: min(best[shape, way] for way in WAYS) for shape, _ in shapes}
    work = {(n, i, o): 2 * n * i * o for n, i, o in seconds}
    return {
        "peak": sum(times * work[shape] for shape, times in shapes)
        / sum(times * seconds[shape] for shape, times in shapes),
        "shapes": {named(shape): work[shape] / seconds[shape] for shape in seconds},
        "ways": {named(shape): best[shape, "torch"] / best[shape, "uiollms"] for shape in seconds},
    }


def named(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
