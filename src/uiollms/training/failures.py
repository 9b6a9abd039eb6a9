"""What goes wrong in a training step, as an error of one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from uiollms.config.sections import TrainSection
from uiollms.files.errors import ConfigError
from uiollms.kernels.allocator import is_out_of_memory


@contextmanager
def reporting_step_errors(source: str, train: TrainSection) -> Iterator[None]:
    """Around the training step on the document `source`: too little memory, and a document past
    the capacity."""
    try:
        yield
    except ConfigError:  # not the document's: another process has ended
        raise
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # torch.OutOfMemoryError is a RuntimeError; a CPU's has no class of its own
        if not is_out_of_memory(error):
            raise
        longest = max((entry.truncation or 0 for entry in train.corpus), default=0)
        raise ConfigError(
            f"{source}: out of memory in the training step; lower train.chunk_batch "
            f"({train.chunk_batch}) or set "
            f"train.checkpointing (now {str(train.checkpointing).lower()}), which change no "
            "result; or lower "
            f"train.corpus[].truncation ({longest or 'null'}), or spread the layers over more "
            "devices with model.device_map"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
