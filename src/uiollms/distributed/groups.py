"""Processes that train together, and their collectives.

A single process is a `Group` of one without a process group; its collectives return their inputs.
Hugging Face Accelerate starts the backend from the launcher's environment, and torch.distributed
sends the messages.

Traffic that one of W processes receives:
    once an optimizer step    gradients of the trained parameters: 2 (W - 1) / W of their size, and
                              a few numbers
    one document over W       for every memory slot and layer 2 H K elements of keys and values, in
      processes (`Division`)  the base's dtype, and 2 H K sums of their gradients, in float32 (twice
                              that where the estimator weights its gradients); (W - 1) / W of each.
                              A token has m / l slots.
Llama-2-7B in bf16 at 32x has one slot of one layer per token, so 16 + 32 (or 64) KiB per token,
times (W - 1) / W; models with grouped heads need less. Keys and values are sent instead of memories
(D elements, fewer if 2 H K > D), so that only the owner of a chunk projects it and goes backward
through the projection, and nothing is computed twice.

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
from accelerate.utils import patch_environment
from torch import Tensor, nn

from uiollms.config.sections import EnvConfig
from uiollms.distributed.device_map import first_device
from uiollms.distributed.launch import check_environment
from uiollms.distributed.watch import LostProcess, Watch
from uiollms.files.errors import ConfigError

log = logging.getLogger("uiollms")

# Time limits for joining at the start, and for a collective, in which processes wait while the
# first one saves and evaluates. watch.py notices an ended process sooner.
JOINING = timedelta(minutes=5)
PATIENCE = timedelta(hours=12)
# torch before 2.12 has these two collectives under older names only, which are deprecated later.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
SIZES = (
    "WORLD_SIZE",
    "SLURM_NTASKS",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
)  # names by which launchers set the number of processes
Value = TypeVar("Value")


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Turns the error of a collective whose peer has ended into LostProcess, in one line."""
    try:
        yield
    except RuntimeError as error:  # gloo's own, and torch.distributed.DistError
        raise LostProcess(" ".join(str(error).split())) from None


class Group:
    """An ordered group of processes, of which this one has number `rank` of `size`. All of them
    must make the same calls."""

    def __init__(
        self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.group, self.device = group, torch.device(device)  # the device of tensors in messages
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums every `.grad` over the group, in one message. A gradient stays None if no process
        has one, so that the optimizer skips the same parameters as in a single process."""
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
        """Sums each number over the group, in float64."""
        return self._reduced(numbers, torch.float64, dist.ReduceOp.SUM)

    def max(self, number: int) -> int:
        return self._reduced([number], torch.int64, dist.ReduceOp.MAX)[0]

    def min(self, number: int) -> int:
        return self._reduced([number], torch.int64, dist.ReduceOp.MIN)[0]

    def _reduced(self, numbers: Sequence[Any], dtype: torch.dtype, operation: Any) -> list[Any]:
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=dtype, device=self.device)
        with reporting_lost_processes():
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor.tolist()

    def barrier(self) -> None:
        """Waits until all processes have made this call."""
        self.sum(0)

    def broadcast(self, value: Value) -> Value:
        """Returns the value of the first process in all processes; tensors must be on the CPU."""
        values = [value]
        if self.size > 1:
            with reporting_lost_processes():
                dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Returns the values of all processes, in their order."""
        values = [value] * self.size
        if self.size > 1:
            with reporting_lost_processes():
                dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, local: Tensor) -> Tensor:
        """Concatenates the [n, ...] of all processes in their order (n is equal): [W n, ...]."""
        if self.size == 1:
            return local
        whole = local.new_empty(self.size * len(local), *local.shape[1:], device=self.device)
        with reporting_lost_processes():
            all_gather(whole, local.to(self.device).contiguous(), group=self.group)
        return whole.to(local.device)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """Sums the [W n, ...] of all processes and returns this process's part, [n, ...]."""
        if self.size == 1:
            return whole
        local = whole.new_empty(len(whole) // self.size, *whole.shape[1:], device=self.device)
        with reporting_lost_processes():
            reduce_scatter(local, whole.to(self.device).contiguous(), group=self.group)
        return local.to(whole.device)


ALONE = Group()


class World(Group):
    """All processes of a run. chunks: the group that divides one document with this process; data:
    the group of one process from each document's group, each at the same rank."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        ranks: int = 1,
    ) -> None:
        """ranks: number of processes that divide one document. Their ranks are consecutive."""
        super().__init__(group, device)
        self.data = self.chunks = ALONE
        self.watch = Watch()
        if group:
            numbers = range(self.size)
            self.chunks = self.part([numbers[i : i + ranks] for i in numbers[::ranks]])
            self.data = self.part([numbers[i::ranks] for i in range(ranks)])

    def part(self, parts: Sequence[Sequence[int]]) -> Group:
        """Creates groups that partition all processes, and returns the one of this process."""
        groups = [dist.new_group(part, timeout=PATIENCE) for part in parts]
        return next(
            Group(g, self.device) for g, p in zip(groups, parts, strict=True) if self.rank in p
        )


@contextmanager
def open_world(config: EnvConfig, watch: Watch) -> Iterator[World]:
    """Joins the processes that a launcher (accelerate launch, torchrun, srun, mpirun) has started;
    without a launcher the world has one process. Raises ConfigError if train.chunk_ranks does not
    divide the number of processes, and LostProcess if not all of them join within JOINING.

    The first GPU that the process may use becomes torch's current device, on which NCCL and
    Accelerate work. Accelerate's own choice, the local rank, may be another process's GPU."""
    device = first_device(config.model.device_map)
    cpu, chosen = device.type == "cpu", {}
    if not cpu and number_of_processes() > 1:
        torch.cuda.set_device(device)
        chosen = {"ACCELERATE_TORCH_DEVICE": str(device)}
    with reporting_lost_processes(), patch_environment(**chosen):
        state = PartialState(cpu=cpu, timeout=JOINING)
    size = state.num_processes
    try:
        warn_if_fewer(size)
        ranks = (config.train.chunk_ranks or size) if config.train.chunk_parallel else 1
        if size % ranks:
            raise ConfigError(
                f"train.chunk_ranks: {ranks} processes per document do not divide the {size} "
                "processes of this run"
            )
        if state.process_index:
            log.setLevel(logging.WARNING)
        world = World()
        if size > 1:
            everyone = dist.new_group(timeout=PATIENCE)
            world = World(everyone, device, ranks)
        world.watch = watch
        with watching_world(world):
            yield world
    finally:
        state.destroy_process_group()
        PartialState._reset_state()  # a later run in this interpreter starts anew


@contextmanager
def watching_world(world: World) -> Iterator[None]:
    """A context in which the processes of a world inform each other of signals and of their ends.
    If a collective fails because a signal stopped the run, this process ends as with the signal."""
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
        world.barrier()  # so that no process ends before the others and looks lost
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
    """The number of processes that the launcher's environment variables set, this one included.
    Raises ConfigError for values that are not numbers."""
    check_environment()
    return max(int(os.environ.get(name) or 1) for name in SIZES)


def warn_if_fewer(size: int) -> None:
    """Warn if fewer processes have joined than were requested. Some launch commands start only one,
    which then trains alone (`accelerate launch --cpu --num_processes 2` sets only MASTER_ADDR)."""
    requested = number_of_processes()
    if size < requested or (
        size == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    ):
        several = str(requested) if requested > size else "several"
        log.warning(
            "%s processes were requested, %d trains here: start them with torchrun "
            "--nproc_per_node N, or on CPUs with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N",
            several,
            size,
        )
