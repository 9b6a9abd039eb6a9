"""The C library's heap, where tensors on a CPU are allocated, and the errors of a full memory."""

from __future__ import annotations

import ctypes
import os

import torch


def trim_heap(device: torch.device) -> None:
    """Returns free memory between tensors to the system, if `device` is a CPU and the C library
    is glibc. Some of that memory could not be used again: once a small object has taken a part of
    a freed block, the next aligned tensor of the same size does not fit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if device.type == "cpu" and trim:
        trim(0)


# Constants of glibc's malloc.h. Other C libraries have no `mallopt` and are not configured.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 2**25
_LARGEST_TRIM_THRESHOLD = 2**30


def keep_freed_memory() -> None:
    """Configures glibc to reuse the memory of freed tensors for new ones.

    By default it returns most of it to the system after every batch and gets it back page by
    page, filled with zeros, which takes some 10 % of a training step and 20 % of scoring. Only
    the commands call this; a program that imports uiollms decides for itself. A threshold that
    the user sets in the environment has precedence.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = "_threshold" in tunables or os.environ.keys() & {
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
    }
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not chosen:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)


# Messages of the CPU's allocator, and of oneDNN where it cannot allocate the code of a product.
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in NO_MEMORY)
