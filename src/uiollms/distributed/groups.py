"""Processes that train together: who they are, and all that they tell each other.

A process alone is a `Group` of one: every call gives back what it was given, and there is no
process group behind it. Start-up (backend, launcher's environment) is Hugging Face Accelerate's,
messages are torch.distributed's.

What is sent, counting what one process receives, for W processes:
    once an optimizer step    gradients of the trained parameters: 2 (W - 1) / W of their size, and
                              a few numbers
    one document over W       for every memory slot and layer 2 H K elements of keys and values, in
      processes (`Division`)  the base's dtype, and 2 H K sums of their gradients, in float32 (twice
                              that where the estimator weights its gradients); (W - 1) / W of each.
                              A token has m / l slots.
Llama-2-7B in bf16, 32x: one slot of one layer a token, so 16 + 32 (or 64) KiB a token, times
(W - 1) / W; with grouped heads less. Keys and values are sent rather than memories (D elements,
fewer where 2 H K > D) because then only its owner projects a chunk and goes backward through the
projection: nothing is computed twice.

Shapes: C chunks, W processes, n = ceil(C / W) chunks of one process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from uiollms.config.sections import EnvConfig
from uiollms.distributed.launch import check_environment
from uiollms.distributed.watch import LostProcess, Watch
from uiollms.files.errors import ConfigError

log = logging.getLogger("uiollms")

# How long processes wait for each other at the start, and in a message for another that lives: the
# first one saves and evaluates while the others wait. That one is gone shows sooner: watch.py.
JOINING = timedelta(minutes=5)
PATIENCE = timedelta(hours=12)
# torch before 2.12 has these two collectives under their older names only, which newer ones warn
# of.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
SIZES = (
    "WORLD_SIZE",
    "SLURM_NTASKS",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
)  # what launchers call the number of processes
Value = TypeVar("Value")


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Around every message: the error of a process whose partner is gone, in one line."""
    try:
        yield
    except RuntimeError as error:  # gloo's own, and torch.distributed.DistError
        raise LostProcess(" ".join(str(error).split())) from None


class Group:
    """Some processes in their order, this one number `rank` of `size`; all of them must make the
    same calls."""

    def __init__(
        self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.group, self.device = group, torch.device(device)  # the device of messages
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every `.grad` the sum over the group, in one message; it stays None where no
        process has one, so that the optimizer leaves the same parameters alone as it would in
        one process."""
        if self.size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        held = torch.tensor([p.grad is not None for p in parameters])
        flat = torch.cat(
            [part.flatten().to(self.device, grads[0].dtype) for part in (*grads, held)]
        )
        with reporting_lost_processes():
            dist.all_reduce(flat, group=self.group)
        *sums, holders = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, total, count in zip(parameters, sums, holders.tolist(), strict=True):
            parameter.grad = (
                total.view_as(parameter).to(parameter.device, parameter.dtype) if count else None
            )

    def sum(self, *numbers: float) -> list[float]:
        """The sum of each number over the group, in float64."""
        return self._reduced(numbers, torch.float64, dist.ReduceOp.SUM)

    def max(self, number: int) -> int:
        return self._reduced([number], torch.int64, dist.ReduceOp.MAX)[0]

    def _reduced(self, numbers: Sequence[Any], dtype: torch.dtype, operation: Any) -> list[Any]:
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=dtype, device=self.device)
        with reporting_lost_processes():
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor.tolist()

    def barrier(self) -> None:
        """Until all processes are here."""
        self.sum(0)

    def broadcast(self, value: Value) -> Value:
        """What the first process has, tensors on the CPU, in all of them."""
        values = [value]
        if self.size > 1:
            with reporting_lost_processes():
                dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all processes, in their order."""
        values = [value] * self.size
        if self.size > 1:
            with reporting_lost_processes():
                dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, own: Tensor) -> Tensor:
        """[n, ...] of every process, the same n in all -> [W n, ...], in their order"""
        if self.size == 1:
            return own
        whole = own.new_empty(self.size * len(own), *own.shape[1:], device=self.device)
        with reporting_lost_processes():
            all_gather(whole, own.to(self.device).contiguous(), group=self.group)
        return whole.to(own.device)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """[W n, ...] of every process -> the sum over the group of this process's part, [n, ...]"""
        if self.size == 1:
            return whole
        own = whole.new_empty(len(whole) // self.size, *whole.shape[1:], device=self.device)
        with reporting_lost_processes():
            reduce_scatter(own, whole.to(self.device).contiguous(), group=self.group)
        return own.to(whole.device)


ALONE = Group()


class World(Group):
    """All processes of a run. chunks: those that share a document with this one; data: those
    that each have another document (of every document's processes the one at the same place)."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        ranks: int = 1,
    ) -> None:
        """ranks: processes of one document. They are neighbours: the others are as far apart."""
        super().__init__(group, device)
        self.data = self.chunks = ALONE
        self.watch = Watch()
        if group:
            numbers = range(self.size)
            self.chunks = self.part([numbers[i : i + ranks] for i in numbers[::ranks]])
            self.data = self.part([numbers[i::ranks] for i in range(ranks)])

    def part(self, parts: Sequence[Sequence[int]]) -> Group:
        """Of several groups that share out all processes the one that this process is in."""
        groups = [dist.new_group(part, timeout=PATIENCE) for part in parts]  # all make all of them
        return next(
            Group(g, self.device) for g, p in zip(groups, parts, strict=True) if self.rank in p
        )


@contextmanager
def open_world(config: EnvConfig, watch: Watch) -> Iterator[World]:
    """Join the processes that a launcher has started with this one (accelerate launch, torchrun,
    srun, mpirun); without any, a world of one. Raises ConfigError if train.chunk_ranks does not
    divide their number, LostProcess where not all come within JOINING."""
    cpu = config.model.device_map == "cpu" or not torch.cuda.is_available()
    with reporting_lost_processes():
        state = PartialState(cpu=cpu, timeout=JOINING)
    size = state.num_processes
    try:
        warn_if_fewer(size)
        ranks = (config.train.chunk_ranks or size) if config.train.chunk_parallel else 1
        if size % ranks:
            raise ConfigError(
                f"train.chunk_ranks: {ranks} processes a document do not divide the {size} "
                "processes of this run"
            )
        if state.process_index:
            log.setLevel(logging.WARNING)
        world = World()
        if size > 1:
            everyone = dist.new_group(timeout=PATIENCE)
            world = World(everyone, "cpu" if cpu else state.device, ranks)
        world.watch = watch
        with has_forward_hooks(world):
            yield world
    finally:
        state.destroy_process_group()
        PartialState._reset_state()  # a later run in this interpreter asks its launcher anew


@contextmanager
def has_forward_hooks(world: World) -> Iterator[None]:
    """While the processes of a world know of each other's signals and ends. A message that fails
    because all were asked to stop ends this process as the signal would have."""
    watch = world.watch
    if world.size == 1:
        yield
        return
    host = os.environ.get("MASTER_ADDR", "localhost")
    with reporting_lost_processes():
        port = world.broadcast(watch.host(host) if world.is_main_process else 0)
        watch.join(host, port, world.rank, world.size)
    try:
        yield
        world.barrier()  # so that nobody's end looks like a loss
        watch.leaving = True
    except LostProcess:
        watch.wait_for_reason()
        watch.leaving = True
        if watch.stop_signal is None:
            raise
        raise watch.exit_exception() from None
    finally:
        watch.leaving = True
        if world.is_main_process:
            watch.wait_until_heard()


def number_of_processes() -> int:
    """How many processes a launcher says that there are, this one included. Raises ConfigError for
    what is no number."""
    check_environment()
    return max(int(os.environ.get(name) or 1) for name in SIZES)


def warn_if_fewer(size: int) -> None:
    """Some ways to ask for several processes start one, which then trains alone (`accelerate
    launch --cpu --num_processes 2` leaves nothing but the address for the others to meet at)."""
    asked = number_of_processes()
    if size < asked or (
        size == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    ):
        several = str(asked) if asked > size else "several"
        log.warning(
            "%s processes were asked for, %d trains here: start them with torchrun "
            "--nproc_per_node N, or on CPUs with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N",
            several,
            size,
        )
