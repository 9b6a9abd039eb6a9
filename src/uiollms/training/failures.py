"""Errors of a training step, in one line with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from uiollms.config.sections import TrainSection
from uiollms.files.errors import ConfigError
from uiollms.kernels.allocator import is_out_of_memory


@contextmanager
def reporting_step_errors(source: str, train: TrainSection) -> Iterator[None]:
    """Runs the training step on the document `source` inside. Where memory is not enough, or the
    document exceeds the capacity, it raises ConfigError instead of the original error."""
    try:
        yield
    except ConfigError:  # it concerns another process, not this document
        raise
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator raises a plain one.
        if not is_out_of_memory(error):
            raise
        longest = max((entry.truncation or 0 for entry in train.corpus), default=0)
        raise ConfigError(
            f"{source}: out of memory in the training step; lower train.chunk_batch "
            f"({train.chunk_batch}) or set train.checkpointing (now "
            f"{str(train.checkpointing).lower()}), which do not change the results; or lower "
            f"train.corpus[].truncation ({longest or 'null'}), or spread the layers over more "
            "devices with model.device_map"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
