"""How the modules of one pass over the layers are executed.

A pass chooses an `Execution` once, before its loop over the layers. The choice affects speed and
memory. It does not affect the results, except for the rounding of float32 products on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uiollms.kernels.devices import locked
from uiollms.kernels.frozen_linear import use_onednn
from uiollms.kernels.recompute import checkpointed, compact_graph


@dataclass(frozen=True)
class Execution:
    """The settings of one pass.

    onednn: modules on a CPU multiply frozen float32 weights with oneDNN, see
    kernels/frozen_linear.py; checkpointing: graphs save the inputs of modules alone, see
    kernels/recompute.py; locked: one thread at a time runs a module, for weights that are loaded
    from disk for the time of a call.
    """

    onednn: bool = False
    checkpointing: bool = False
    locked: bool = False

    def run(self, module: Any, function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Returns function(hidden). The function must run `module` and no other module. A graph is
        built where grad is enabled."""
        if self.onednn and hidden.device.type == "cpu":
            function = use_onednn(function, module)
        if self.locked:  # inside a checkpoint, because the backward pass runs the function again
            function = locked(function)
        if not torch.is_grad_enabled():
            return function(hidden)
        return (checkpointed if self.checkpointing else compact_graph)(function, hidden)
