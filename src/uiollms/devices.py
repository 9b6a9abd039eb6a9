"""Where a module computes, and how tensors get there without waiting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def device_of(module: Any) -> torch.device:
    """Where a module with a `weight` computes: where the weight is, or, if it rests on disk, where it will be loaded."""
    hook = getattr(module, "_hf_hook", None)
    return module.weight.device if hook is None else torch.device(hook.execution_device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy from the CPU to a GPU does not wait for the GPU's queue (torch stages pageable memory at
    once, so the original may change or go); every other copy is torch's default."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type != "cpu")
