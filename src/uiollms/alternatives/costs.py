"""What a mode costs: its slots, seconds to compress a context, seconds a token and peak memory.

Shapes: R tokens of a row, L layers, H key/value heads, S slots and raw tokens before the row, K
head size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uiollms.alternatives.pooled import pool_context
from uiollms.alternatives.raw_tokens import CHOICES, context_of, question_of
from uiollms.data.sample import Row, Sample
from uiollms.kernels.peak_memory import PeakMemory
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import encode_and_project_all, read_raw
from uiollms.model.state import KVBuffer, KVPrefix

STEPS = 16  # tokens that are decoded one by one, after a first one
# Seconds and memory of mode "shuffled" are those of memory.
MEASURED_MODES = ("memory", "window", "raw", "pooled", *CHOICES)


@dataclass(frozen=True)
class Cost:
    """The cost of one mode, for one context.

    slots:            keys of a head and layer that a row reads before its own tokens, in the mean
    compress_seconds: from the context's token ids to the keys and values that rows read
    token_seconds:    of one token of the row after them, with its logits
    peak_bytes:       how far memory rises above the loaded model meanwhile; on a CPU the resident
                      set, on a GPU what torch has allocated. None for a press that only masks
    context:          tokens of the context
    process:          which program ran, "uiollms" or "kvpress"
    """

    slots: float
    compress_seconds: float
    token_seconds: float
    peak_bytes: int | None
    context: int
    process: str


def measured_row(sample: Sample) -> Row | None:
    """Returns the row whose context is the longest, of those that have more than one token and are
    scored. Returns None if there is no such row."""
    rows = [row for row in sample.rows if len(row.input_ids) > 1 and len(row.scored)]
    return max(rows, key=lambda row: row.num_memories, default=None)


def num_steps(row: Row) -> int:
    """Returns how many tokens of a row are decoded, after a first one."""
    return min(STEPS, len(row.input_ids) - 1)


@torch.no_grad()
def measure_cost(model: MemoryLM, sample: Sample, mode: str) -> Cost | None:
    """Returns the cost of one of MEASURED_MODES for the `measured_row` of a sample, or None if it
    has none. The context is compressed twice; the second time is measured."""
    sample = sample.with_recent(model.memory_config.recent_tokens)
    row = measured_row(sample)
    if row is None:
        return None
    read_context(model, sample, row, mode)
    steps = num_steps(row)
    with PeakMemory(model.device) as peak:
        start = now(model.device)
        prefix, num_slots = read_context(model, sample, row, mode)
        compressed = now(model.device)
        steps_left = Steps(model, prefix, num_slots, steps + 1)
        steps_left.read(row.input_ids[:1])  # makes space for all
        first = now(model.device)
        for i in range(1, steps + 1):
            model.logits(steps_left.read(row.input_ids[i : i + 1]))
        last = now(model.device)
    return Cost(
        slots=float(sum(part.shape[2] for part in prefix.keys[0])),
        compress_seconds=compressed - start,
        token_seconds=(last - first) / steps,
        peak_bytes=peak.bytes,
        context=len(context_of(sample, row)),
        process="uiollms",
    )


def read_context(model: MemoryLM, sample: Sample, row: Row, mode: str) -> tuple[KVPrefix, int]:
    """Returns what a row reads before its own tokens, and how many of its keys and values are slots
    of memory or of the mode "pooled". The others are those of raw tokens."""
    if mode in ("memory", "pooled"):
        read = encode_and_project_all if mode == "memory" else pool_context
        keys, values = read(model, sample.chunks[row.memories.start : row.memories.stop])
        if keys:
            return KVPrefix([[k] for k in keys], [[v] for v in values]), keys[0].shape[2]
    ids = context_of(sample, row)
    slots = row.num_memories * model.memory_config.num_memory
    if mode in CHOICES:
        ids = CHOICES[mode](ids, slots, question_of(ids, row))
    return read_raw(model, ids if mode in CHOICES or mode == "raw" else ids[:0]), 0


class Steps:
    """Decodes the tokens of a row one by one, after a prefix. The first `num_slots` keys of the
    prefix are slots, the others those of raw tokens. There is space for `reserved` tokens."""

    def __init__(self, model: MemoryLM, prefix: KVPrefix, num_slots: int, reserved: int) -> None:
        self.model, self.num_slots, self.reserved = model, num_slots, reserved
        self.keys: Sequence[list[Tensor]] = prefix.keys  # type: ignore[assignment]
        self.values: Sequence[list[Tensor]] = prefix.values  # type: ignore[assignment]
        self.length = sum(part.shape[2] for part in self.keys[0])
        self.buffers: dict[int, KVBuffer] = {}

    def read(self, ids: Tensor) -> Tensor:
        """Returns the normed hidden states [1, R, D] of the next tokens [R]."""
        prefix = KVPrefix(self.keys, self.values, num_reserved=self.reserved, buffers=self.buffers)
        hidden = self.model.decode(
            ids[None], prefix, [self.num_slots], local_past=self.length - self.num_slots
        )
        self.length += len(ids)
        self.buffers = prefix.buffers
        layers = range(len(self.keys))
        self.keys = [[self.buffers[i].keys[:, :, : self.length]] for i in layers]
        self.values = [[self.buffers[i].values[:, :, : self.length]] for i in layers]
        return hidden


def now(device: torch.device) -> float:
    """Returns seconds of a clock, after the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
