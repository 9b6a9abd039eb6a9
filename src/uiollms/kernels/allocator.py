"""What becomes of a CPU's memory that tensors give back, and how one notices that there is none
left."""

from __future__ import annotations

import ctypes
import os

import torch


def trim_heap(device: torch.device) -> None:
    """Give the system back what lies free between tensors on a CPU, where the C library is
    glibc. Its holes are not always of use: a tensor's place, aligned, does not fit the next
    tensor of its size once a small object has taken a splinter of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if device.type == "cpu" and trim:
        trim(0)


# Of glibc's malloc.h; another C library has no `mallopt`, and is left alone.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 2**25
_ALWAYS = 2**30


def keep_freed_memory() -> None:
    """Let the C library keep, for the tensors to come, what tensors give back. By itself it
    returns much to the system after every batch, and has it again page by page, zeroed: some 10
    % of a step, 20 % of scoring. For processes that are all ours, as the commands are; a program
    that imports uiollms decides for itself, and so does a user who sets a threshold in the
    environment."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = "_threshold" in tunables or os.environ.keys() & {
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
    }
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not chosen:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, _ALWAYS)


# What a CPU's allocator says, and oneDNN where it has no room for the code of a product.
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in NO_MEMORY)
