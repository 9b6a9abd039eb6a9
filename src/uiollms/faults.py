"""Faults from outside the program (disk, memory, one document) as a ConfigError of one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from uiollms.config import ConfigError, TrainSection


@contextmanager
def writing(path: str | Path, remedy: str = "") -> Iterator[None]:
    """Around whatever writes at `path`: a full disk, a folder without permission, a name that no file can have."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: a name with a zero byte or half a surrogate pair
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be written ({reason}){remedy}") from None


@contextmanager
def training_on(source: str, train: TrainSection) -> Iterator[None]:
    """Around the training step on the document `source`: too little memory, and a document past the capacity."""
    try:
        yield
    except ConfigError:  # not the document's: another process has ended
        raise
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; a CPU's has no class of its own
        if not is_out_of_memory(error):
            raise
        longest = max((entry.truncation or 0 for entry in train.corpus), default=0)
        raise ConfigError(
            f"{source}: out of memory in the training step; lower train.chunk_batch ({train.chunk_batch}) or set "
            f"train.checkpointing (now {str(train.checkpointing).lower()}), which change no result; or lower "
            f"train.corpus[].truncation ({longest or 'null'}), or spread the layers over more devices with model.device_map"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


# What a CPU's allocator says, and oneDNN where it has no room for the code of a product.
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in NO_MEMORY)
