"""Records the kernels of a training step once and replays them. This makes small models faster on a
GPU, where Python launches kernels more slowly than the GPU computes them.

Source: PyTorch's notes on CUDA graphs (whole-network capture).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uiollms.kernels.devices import cache_transfers


class Recorded(NamedTuple):
    """A recorded function. It is called with tensors of the shapes and dtypes that it was recorded
    with. The next call of any function of the same recorder may overwrite its result."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.result


class Recorder:
    """Records functions. They share one memory pool, so they must not run at the same time."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.constants: dict[Any, Tensor] = {}

    def record(self, function: Callable[..., Tensor], *inputs: Tensor) -> Recorded:
        """Records a function of tensors that does not synchronise with the device and whose kernels
        depend on the shapes alone. It runs twice before it is recorded, so that nothing is compiled
        or allocated for the first time while recording. Gradients that it adds to must be zeroed
        afterwards."""
        buffers = [tensor.clone() for tensor in inputs]
        self.stream.wait_stream(torch.cuda.current_stream())
        with cache_transfers(self.constants), torch.cuda.stream(self.stream):
            for _ in range(2):
                function(*buffers)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            cache_transfers(self.constants),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
        ):
            result = function(*buffers)
        return Recorded(graph, buffers, result)
