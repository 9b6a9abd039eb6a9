"""The GEMM peak: how fast the machine multiplies matrices of the model's own shapes, measured in the same run."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure import interleaved
from uiollms.flops import Flops, gemm_shapes


def gemm_peak(flops: Flops, rows: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """FLOP/s of every product of the model for `rows` tokens at once, and `peak`: of all of them together, each as often as
    the model needs it (FLOPs over seconds). The best of the repeats counts: a peak is what is possible."""
    shapes = gemm_shapes(flops, rows)
    calls = {}
    for (n, inputs, outputs), _ in shapes:
        x, weight = torch.randn(n, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        calls[n, inputs, outputs] = lambda x=x, weight=weight: torch.nn.functional.linear(x, weight)
    seconds = {shape: min(times) for shape, times in interleaved(calls, 3 * repeats).items()}
    work = {(n, i, o): 2 * n * i * o for n, i, o in seconds}
    total = sum(times * work[shape] for shape, times in shapes)
    return {
        "peak": total / sum(times * seconds[shape] for shape, times in shapes),
        "shapes": {"x".join(map(str, shape)): work[shape] / seconds[shape] for shape in seconds},
    }
