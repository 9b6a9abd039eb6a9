"""Devices: where a module computes, and how tensors are copied there without waiting for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: Any) -> torch.device:
    """Returns the device on which a module with a `weight` computes: the weight's device or, if
    the weight is offloaded, the device to which it will be loaded."""
    hook = getattr(module, "_hf_hook", None)
    return module.weight.device if hook is None else torch.device(hook.execution_device)


def gpus_of(module: nn.Module) -> list[torch.device]:
    """Returns the GPUs on which a module has parameters, in the order of their numbers."""
    gpus = {p.device for p in module.parameters() if p.device.type == "cuda"}
    return sorted(gpus, key=lambda gpu: gpu.index)


def has_offloaded_weights(base: nn.Module) -> bool:
    """Whether some weights of the base are on disk, and loaded for the time of a call only."""
    return any(
        getattr(getattr(module, "_hf_hook", None), "offload", False) for module in base.modules()
    )


# Offloaded weights are loaded into the module that all threads share, so one thread at a time may
# use modules that have them.
_OFFLOAD_LOCK = threading.RLock()


def offload_lock(module: Any) -> AbstractContextManager[Any]:
    """Returns a context in which no other thread loads offloaded weights, if those of `module`
    are offloaded."""
    hook = getattr(module, "_hf_hook", None)
    return _OFFLOAD_LOCK if getattr(hook, "offload", False) else nullcontext()


def locked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that one thread at a time runs it, or any other function wrapped so."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _OFFLOAD_LOCK:
            return function(*args, **kwargs)

    return run


def locked_if_offloaded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method of an object with an attribute `has_offloaded_weights`. Where that is true,
    one thread at a time runs the method."""
    locked_method = locked(method)

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = locked_method if self.has_offloaded_weights else method
        return chosen(self, *args, **kwargs)

    return run


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns `tensor` on `device`.

    A copy from the CPU to a GPU does not wait for the work that is queued there. torch copies
    pageable memory into a staging buffer at once, so the original may change or be freed. Every
    other copy is torch's default. See also `cache_transfers`.
    """
    to_gpu = tensor.device.type == "cpu" and device.type != "cpu"
    cache = _transfer_cache.get()
    if cache is not None and to_gpu:
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        key = device, tensor.dtype, tensor.shape, content
        if key not in cache:
            cache[key] = tensor.to(device)
        return cache[key]
    return tensor.to(device, non_blocking=to_gpu)


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Returns CPU tensors on `device`, those of one dtype copied in one transfer.

    For a GPU they are joined in pinned memory, which the GPU reads while the CPU goes on. torch
    reuses that memory after the copy. The results of one dtype are views of one tensor. On a CPU
    the tensors themselves are returned.
    """
    if device.type == "cpu":
        return [to_device(tensor, device) for tensor in tensors]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    parts: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype, group in by_dtype.items():
        sizes = [tensor.numel() for tensor in group]
        joined = torch.empty(sum(sizes), dtype=dtype, pin_memory=torch.cuda.is_available())
        torch.cat([tensor.flatten() for tensor in group], out=joined)
        parts[dtype] = iter(to_device(joined, device).split(sizes))
    return [next(parts[tensor.dtype]).view(tensor.shape) for tensor in tensors]


_transfer_cache: ContextVar[dict[Any, Tensor] | None] = ContextVar("transfer cache", default=None)


@contextmanager
def cache_transfers(cache: dict[Any, Tensor]) -> Iterator[None]:
    """Inside, `to_device` puts what it copies from the CPU into `cache`, and returns the same
    tensor for equal contents.

    CUDA graphs need this. A graph cannot record a copy from pageable memory, and it reads the
    tensors of its recording whenever it is replayed. So `cache` must live as long as the graph,
    and nobody may write to its tensors.
    """
    token = _transfer_cache.set(cache)
    try:
        yield
    finally:
        _transfer_cache.reset(token)


def disable_cudnn_attention() -> None:
    """Excludes cuDNN's kernel from SDPA in this process. It plans every new shape again, which
    takes 1.2 ms a call on an H200 (docs/benchmarks.md), and nearly every batch of rows has a new
    shape here. Only the commands call this; a program that imports uiollms decides for itself."""
    torch.backends.cuda.enable_cudnn_sdp(False)
