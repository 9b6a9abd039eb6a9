"""What a run would take on every device, before anything is rented: `train.py --dry_run`.

The real training step, gradient clipping and AdamW run on simulated devices at the configured
shapes (step_simulation.py), so the figures are measured on the program itself, not modelled
beside it: every tensor of every kernel is counted from its birth to its death.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from uiollms.build import check_env
from uiollms.config.sections import EnvConfig
from uiollms.distributed.device_map import CPU
from uiollms.planning.step_simulation import Needs, StepSimulation

BATCHES = (
    16,
    8,
    4,
    2,
)  # that `"chunk_batch": "auto"` tries; a larger one gains no time (docs/benchmarks.md)
SHARE = 0.8  # of a device's free memory that it fills: kernels and allocators take some themselves


@dataclass(frozen=True)
class Plan:
    """need: of one training step, by device; have: bytes free there (0: no such device here);
    capacity: tokens; longest: tokens of the longest document that fits with this chunk_batch;
    most_chunks: the largest chunk_batch that fits at this length (None: none does); flops:
    useful ones of a document (see flops.py)."""

    length: int
    chunk_batch: int
    capacity: int
    need: Needs
    have: dict[torch.device, int]
    longest: int | None = None
    most_chunks: int | None = None
    flops: int = 0

    @property
    def fits(self) -> bool:
        return all(need.total <= self.have[device] for device, need in self.need.items())


def make_plan(
    config: EnvConfig, path: str | Path, machine: dict[torch.device, int] | None = None
) -> Plan:
    """machine: bytes of every device (default: what is free on this machine; a GPU that the map
    names and that is not here counts as 0). Needs no weights, and no hub for the models of the
    shipped configs. Raises ConfigError."""
    check_env(config, path)
    rehearsal = StepSimulation(config, path, machine)
    chunk_size, length = rehearsal.memory.chunk_size, rehearsal.longest_document()
    chunks = chunks_in_memory(length, chunk_size)
    batch = (
        config.train.chunk_batch
        if config.train.chunk_batch != "auto"
        else largest_batch(rehearsal, chunks)
    )
    most = chunks_in_memory(rehearsal.capacity, chunk_size)
    need = rehearsal.need(chunks, batch)
    have = {device: rehearsal.machine[device] for device in need}

    plan = Plan(length, batch, rehearsal.capacity, need, have, flops=rehearsal.flops(chunks))
    if not all(have.values()):
        return plan

    def share(chunks: int, batch: int) -> float:
        """The fullest device's share of its memory; 1 just fits."""
        return max(n.total / have[d] for d, n in rehearsal.need(chunks, batch).items())

    fitting = largest(lambda chunks: share(chunks, batch), chunks, most)
    longest = (
        None
        if fitting is None
        else rehearsal.capacity
        if fitting == most
        else (fitting + 1) * chunk_size
    )
    return replace(
        plan, longest=longest, most_chunks=largest(lambda b: share(chunks, b), batch, chunks)
    )


def choose_chunk_batch(config: EnvConfig, path: str | Path) -> EnvConfig:
    """The config with a number for `"chunk_batch": "auto"`: the largest power of two, up to 16,
    that this machine's free memory allows for its longest document; one that does not fit at all
    gets 1."""
    if config.train.chunk_batch != "auto":
        return config
    rehearsal = StepSimulation(config, path)
    batch = largest_batch(
        rehearsal, chunks_in_memory(rehearsal.longest_document(), rehearsal.memory.chunk_size)
    )
    return config.model_copy(
        update={"train": config.train.model_copy(update={"chunk_batch": batch})}
    )


def largest_batch(rehearsal: StepSimulation, chunks: int) -> int:
    processes = int(
        os.environ.get("LOCAL_WORLD_SIZE", 1)
    )  # torchrun's; those on one CPU share its memory
    have = {d: size / processes if d == CPU else size for d, size in rehearsal.machine.items()}

    def fits(batch: int) -> bool:
        return all(
            need.total <= SHARE * have[device]
            for device, need in rehearsal.need(chunks, batch).items()
        )

    return next((batch for batch in BATCHES if batch < 2 * chunks and fits(batch)), 1)


def chunks_in_memory(length: int, chunk_size: int) -> int:
    """All chunks of a document but its last, and at least one."""
    return max(1, -(-length // chunk_size) - 1)


def largest(share: Callable[[int], float], start: int, top: int) -> int | None:
    """The largest n in 1 .. top with share(n) <= 1, None if there is none. share must grow with
    n; as it does so nearly linearly, the next n to ask is where the line through the two ends
    crosses 1."""
    if share(top) <= 1:
        return top
    if not share(1) <= 1:
        return None
    low, high, ask = 1, top, start
    while high - low > 1:
        ask = min(max(ask, low + 1), high - 1)
        low, high = (ask, high) if share(ask) <= 1 else (low, ask)
        ask = low + int((high - low) * (1 - share(low)) / (share(high) - share(low)))
    return low
