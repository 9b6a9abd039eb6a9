"""The GEMM peak: the speed at which the machine multiplies matrices of the model's shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.measure import interleaved
from uiollms.kernels.frozen_linear import linear
from uiollms.planning.flops import Flops, gemm_shapes

WAYS = {"torch": F.linear, "uiollms": linear}


def gemm_peak(flops: Flops, rows: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Measures the matrix products of the model for `rows` tokens. The fastest repeat counts.

    shapes: FLOP/s of each product, by the faster of torch's `linear` and `frozen_linear.linear`
    ways:   seconds of torch's `linear` divided by those of `frozen_linear.linear`
    peak:   FLOP/s of all products together, each as often as one pass computes it
    """
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
        "shapes": {"x".join(map(str, shape)): work[shape] / seconds[shape] for shape in seconds},
        "ways": {
            "x".join(map(str, shape)): best[shape, "torch"] / best[shape, "uiollms"]
            for shape in seconds
        },
    }
