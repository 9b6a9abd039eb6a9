"""A training step's kernels recorded once and replayed: for small models on a GPU, where Python
launches kernels more slowly than the GPU computes them.

Source: PyTorch's notes on CUDA graphs (whole-network capture).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uiollms.kernels.devices import cache_transfers


class Recorded(NamedTuple):
    """A recorded function: called with tensors like those it was recorded with, it returns its
    result, which the next call of any function of the recorder may overwrite."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.result


class Recorder:
    """Records functions one after the other; they share their memory, so no two run at once."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.constants: dict[Any, Tensor] = {}

    def record(self, function: Callable[..., Tensor], *inputs: Tensor) -> Recorded:
        """function: of tensors; it waits for nothing, and its kernels depend on the shapes alone.
        It runs twice before it is recorded, so that nothing is compiled or made for the first time
        then; gradients that it adds to must be zeroed afterwards."""
        own = [tensor.clone() for tensor in inputs]
        self.stream.wait_stream(torch.cuda.current_stream())
        with cache_transfers(self.constants), torch.cuda.stream(self.stream):
            for _ in range(2):
                function(*own)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            cache_transfers(self.constants),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
        ):
            result = function(*own)
        return Recorded(graph, own, result)
