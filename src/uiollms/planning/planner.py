"""Plans a run before any machine is rented: the memory that a training step takes on every device
(`train.py --dry_run`), and the largest chunk batch that fits.

The real training step, gradient clipping and AdamW run on simulated devices at the configured
shapes (step_simulation.py). So the figures are measured on the program, not modelled: every tensor
of every kernel is counted from its allocation until it is freed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from uiollms.build import check_env
from uiollms.config.sections import EnvConfig
from uiollms.distributed.groups import ALONE, Group
from uiollms.planning.step_simulation import Needs, StepSimulation

# The part of a device's free memory that `"auto"` fills. Kernels and allocators take memory too.
MEMORY_FRACTION = 0.8


@dataclass(frozen=True)
class Plan:
    """The memory that a run takes, and the limits that it leaves.

    length:      tokens of the run's longest document
    capacity:    tokens of the longest document that the base's positions allow
    need:        device -> bytes of one training step
    available:   device -> free bytes, 0 if this machine lacks the device
    longest:     tokens of the longest document that fits with this chunk_batch, None if none does
    most_chunks: the largest chunk_batch that fits at this length, at most all chunks of a step,
                 None if none does
    flops:       useful FLOPs of the step on one document (flops.py)
    documents:   number of documents that go through encoder and decoder together
    pipeline:    whether the devices of a process work at the same time
    speedup:     how much faster a step is expected to be if they do, than if they work in turn
    """

    length: int
    chunk_batch: int
    capacity: int
    need: Needs
    available: dict[torch.device, int]
    longest: int | None = None
    most_chunks: int | None = None
    flops: int = 0
    documents: int = 1
    pipeline: bool = False
    speedup: float = 1.0

    @property
    def fits(self) -> bool:
        return all(need.total <= self.available[device] for device, need in self.need.items())


def make_plan(
    config: EnvConfig, path: str | Path, machine: dict[torch.device, int] | None = None
) -> Plan:
    """The plan of a config. It needs no weights, and no hub for the models of the shipped configs.
    Raises ConfigError.

    path:    of the config, for error messages
    machine: device -> bytes. The default is the free memory of this machine; a GPU that the
             device_map names and this machine lacks has 0.
    """
    check_env(config, path)
    simulation = StepSimulation(config, path, machine)
    chunk_size, length = simulation.memory.chunk_size, simulation.longest_document()
    chunks = chunks_in_memory(length, chunk_size)
    batch = (
        config.train.chunk_batch
        if config.train.chunk_batch != "auto"
        else largest_batch(simulation, chunks)
    )
    max_chunks = chunks_in_memory(simulation.capacity, chunk_size)
    need = simulation.need(chunks, batch)
    available = {device: simulation.machine[device] for device in need}
    plan = Plan(
        length,
        batch,
        simulation.capacity,
        need,
        available,
        flops=simulation.flops(chunks),
        documents=len(simulation.packed(chunks, batch)),
        pipeline=config.train.pipeline,
        speedup=simulation.pipeline_speedup(chunks, batch),
    )
    if not all(available.values()):
        return plan

    def used_fraction(chunks: int, batch: int) -> float:
        """The fraction of its memory that the fullest device needs; 1 just fits."""
        return max(n.total / available[d] for d, n in simulation.need(chunks, batch).items())

    fitting = largest_fitting(lambda chunks: used_fraction(chunks, batch), chunks, max_chunks)
    longest = (
        None
        if fitting is None
        else simulation.capacity
        if fitting == max_chunks
        else (fitting + 1) * chunk_size
    )
    return replace(
        plan,
        longest=longest,
        most_chunks=largest_fitting(
            lambda b: used_fraction(chunks, b), batch, chunks * config.train.accum_grad
        ),
    )


def choose_chunk_batch(config: EnvConfig, path: str | Path, group: Group = ALONE) -> EnvConfig:
    """The config with a number for `"chunk_batch": "auto"`. It is the largest power of two with
    which a step fits into this machine's free memory, and 1 if none fits. A number that holds all
    chunks of a step's documents is the last that is tried. The processes of `group` take the
    smallest of their numbers, because those that divide documents must pack the same documents
    together."""
    if config.train.chunk_batch != "auto":
        return config
    simulation = StepSimulation(config, path)
    batch = largest_batch(
        simulation, chunks_in_memory(simulation.longest_document(), simulation.memory.chunk_size)
    )
    return config.model_copy(
        update={"train": config.train.model_copy(update={"chunk_batch": group.min(batch)})}
    )


def largest_batch(simulation: StepSimulation, chunks: int) -> int:
    """The largest power of two that fits, see `choose_chunk_batch`. chunks: of the longest
    document"""

    def fits(batch: int) -> bool:
        return all(
            need.total <= MEMORY_FRACTION * simulation.machine[device]
            for device, need in simulation.need(chunks, batch).items()
        )

    batch, chunks_of_step = 1, chunks * simulation.config.train.accum_grad
    while batch < chunks_of_step and fits(2 * batch):
        batch *= 2
    return batch


def chunks_in_memory(length: int, chunk_size: int) -> int:
    """The number of chunks that become memory: all of a document but the last, and at least 1."""
    return max(1, -(-length // chunk_size) - 1)


def largest_fitting(used_fraction: Callable[[int], float], start: int, top: int) -> int | None:
    """The largest n in 1 .. top with used_fraction(n) <= 1, or None if there is none.

    used_fraction must grow with n. It does so nearly linearly, so the next n to try is where the
    line through the two ends of the interval crosses 1. start: the first n to try
    """
    if used_fraction(top) <= 1:
        return top
    if not used_fraction(1) <= 1:
        return None
    low, high, n = 1, top, start
    while high - low > 1:
        n = min(max(n, low + 1), high - 1)
        low, high = (n, high) if used_fraction(n) <= 1 else (low, n)
        slope = (used_fraction(high) - used_fraction(low)) / (high - low)
        n = low + int((1 - used_fraction(low)) / slope)
    return low
