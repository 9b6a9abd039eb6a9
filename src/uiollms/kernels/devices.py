"""Where a module computes, how tensors get there without waiting, and what becomes of a CPU's
memory that tensors give back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: Any) -> torch.device:
    """Where a module with a `weight` computes: where the weight is, or, if it rests on disk,
    where it will be loaded."""
    hook = getattr(module, "_hf_hook", None)
    return module.weight.device if hook is None else torch.device(hook.execution_device)


def has_offloaded_weights(base: nn.Module) -> bool:
    """Whether weights of the base are loaded for the time of a call only, into the module that
    all threads share."""
    return any(
        getattr(getattr(module, "_hf_hook", None), "offload", False) for module in base.modules()
    )


_LOADING = threading.RLock()


def loading(module: Any) -> AbstractContextManager[Any]:
    """While open, no other thread loads weights that are offloaded, if those of `module` are:
    they are put into the one module that all threads share, for the time of a call."""
    hook = getattr(module, "_hf_hook", None)
    return _LOADING if getattr(hook, "offload", False) else nullcontext()


def locked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, in one thread at a time, of all functions that are made so."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _LOADING:
            return function(*args, **kwargs)

    return run


def locked_if_offloaded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method of an object with an attribute `has_offloaded_weights`. Where that is true,
    only one thread at a time runs the method."""
    alone = locked(method)

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (alone if self.has_offloaded_weights else method)(self, *args, **kwargs)

    return run


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy from the CPU to a GPU does not wait for the GPU's queue
    (torch stages pageable memory at once, so the original may change or go); every other copy is
    torch's default. See `cache_transfers`."""
    kept = _kept.get()
    if kept is not None and tensor.device.type == "cpu" and device.type != "cpu":
        numbers = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        key = device, tensor.dtype, tensor.shape, numbers
        if key not in kept:
            kept[key] = tensor.to(device)
        return kept[key]
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type != "cpu")


_kept: ContextVar[dict[Any, Tensor] | None] = ContextVar("what was moved once", default=None)


@contextmanager
def cache_transfers(kept: dict[Any, Tensor]) -> Iterator[None]:
    """Inside, `to_device` keeps in `kept` what it copies from the CPU, and hands the same tensor
    out where the same numbers are to be moved again. A CUDA graph needs this: it cannot hold a
    copy from pageable memory, and reads its constants again whenever it is replayed, so `kept`
    must live as long as the graph, and nobody may write into what is handed out."""
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


def disable_cudnn_attention() -> None:
    """Keep SDPA from cuDNN's kernel, which plans every new shape anew: 1.2 ms a call on an H200
    (docs/benchmarks.md), and nearly every batch of rows has a shape of its own here. For processes
    that are all ours, as the commands are."""
    torch.backends.cuda.enable_cudnn_sdp(False)
