"""Runs the batches of a training step so that the devices of a model work at the same time.

The layers of a model on p devices form p segments. A batch passes forward through all of them, and
back. If one batch followed another, one device would work while the others wait. So the graph of a
batch is cut where its hidden states change devices, and the segments of successive batches take
turns (F forward, B backward, the number is the segment's; p = 2):

    F0(0) F1(0) | F0(1) B1(0) F1(1) | B0(0) F0(2) B1(1) F1(2) | B0(1) F0(3) B1(2) F1(3) | ...

No line of Python waits for a device, so this order of calls becomes the order of each device's
queue: device 0 computes F0(2), then B0(1), while device 1 computes B1(1), then F1(2). Each
parameter and each sum still receives its gradients in the order of the batches, so the gradients
are the same bit for bit. Segment s holds the graphs of up to p - s batches. A map may return to a
device, which then has several segments.

Source of the order (1F1B): Narayanan et al. 2019 (PipeDream) and 2021 (arXiv 2104.04473, section
2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from uiollms.kernels.devices import to_device


class Output(NamedTuple):
    """A result of a forward pass: the number of the segment that computed it, the tensor, and the
    gradient at it. None stands for a gradient of 1."""

    segment: int
    tensor: Tensor
    gradient: Tensor | None = None


Backward = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]


class SegmentedGraph:
    """The graph of one batch, cut where its hidden states change devices.

    The forward pass calls `move` where it would call `to_device`. `before_segment` is called with
    the number of a segment before it runs. cut: false for a graph of one segment, which extends
    over all devices.
    """

    def __init__(
        self, before_segment: Callable[[int], None], backward: Backward, cut: bool
    ) -> None:
        self.before_segment, self._backward, self.cut = before_segment, backward, cut
        # The last hidden states of every segment but the last, and the same on the next device,
        # where they are leaves of the next segment's graph.
        self.sent: list[Tensor] = []
        self.received: list[Tensor] = []
        self.segments: list[int] = []  # the segment after every call of `move`
        self.outputs: list[Output] = []  # set after the forward pass

    @property
    def segment(self) -> int:
        """The number of the segment that runs now."""
        return len(self.sent)

    def move(self, hidden: Tensor, device: torch.device) -> Tensor:
        """Returns the hidden states on `device`. If they come from another one, the graph is cut
        there, and the next segment begins."""
        if not self.cut:
            hidden = to_device(hidden, device)
        elif hidden.device != device:
            hidden = self.begin_segment(hidden, device)
        self.segments.append(self.segment)
        return hidden

    def begin_segment(self, hidden: Tensor, device: torch.device) -> Tensor:
        """Cuts the graph, and returns the hidden states on `device` as a leaf of the next one."""
        # The copy is queued before the passes that are due, so that it does not wait for them.
        received = to_device(hidden.detach(), device).requires_grad_(hidden.requires_grad)
        self.sent.append(hidden)
        self.received.append(received)
        self.before_segment(self.segment)
        return received

    def backward(self, segment: int) -> None:
        """Backpropagates through one segment and frees its graph. The segments after it must have
        been done."""
        found = [
            (output.tensor, output.gradient)
            for output in self.outputs
            if output.segment == segment and output.tensor.requires_grad
        ]
        self.outputs = [output for output in self.outputs if output.segment != segment]
        if found:
            self._backward(*zip(*found, strict=True))
        if self.sent:
            sent, received = self.sent.pop(), self.received.pop()
            if received.grad is not None:
                gradient = to_device(received.grad, sent.device)
                self.outputs.append(Output(segment - 1, sent, gradient))


class Pipeline:
    """Runs batches one after another, each forward and backward, in the order of `list_tasks`. The
    number of segments is that of the first batch; all batches must have as many.

    backward: called with outputs and their gradients, as `torch.autograd.backward` is. cut: see
    `SegmentedGraph`; without cuts, a batch is done before the next one begins.
    """

    def __init__(self, backward: Backward, cut: bool) -> None:
        self.backward, self.cut = backward, cut
        self.graphs: dict[int, SegmentedGraph] = {}  # of the batches that are not done
        self.num_batches = self.num_segments = 0

    def run(self, forward: Callable[[SegmentedGraph], list[Output]]) -> None:
        """Runs the forward pass of the next batch, and the backward passes that are due before its
        segments. `forward` returns everything that has a gradient besides the moved hidden
        states."""
        batch = self.num_batches
        self.num_batches += 1
        self._run_due(batch, 0)
        graph = SegmentedGraph(partial(self._run_due, batch), self.backward, self.cut)
        with torch.enable_grad():
            graph.outputs = forward(graph)
        self.graphs[batch] = graph
        self.num_segments = graph.segment + 1

    def finish(self) -> None:
        """Runs the backward passes that are left."""
        for batch in range(self.num_batches, self.num_batches + self.num_segments):
            for segment in range(self.num_segments):
                self._run_due(batch, segment)

    def _run_due(self, batch: int, segment: int) -> None:
        """Runs the backward pass that is due before `batch` goes forward through `segment`."""
        due = batch_due(batch, segment, self.num_segments)
        if self.num_segments and 0 <= due < self.num_batches:
            self.graphs[due].backward(segment)
            if segment == 0:
                del self.graphs[due]


class Task(NamedTuple):
    """The pass of one batch through one segment, forward or backward."""

    forward: bool
    segment: int
    batch: int


def batch_due(batch: int, segment: int, num_segments: int) -> int:
    """Returns the batch that goes backward through a segment right before `batch` goes forward
    through it. It is negative where there is none."""
    return batch - (num_segments - segment)


def list_tasks(num_batches: int, num_segments: int) -> Iterator[Task]:
    """Yields the passes of all batches in their order. After the last batch the backward passes
    continue as if more batches came."""
    for batch in range(num_batches + num_segments):
        for segment in range(num_segments):
            done = batch_due(batch, segment, num_segments)
            if 0 <= done < num_batches:
                yield Task(False, segment, done)
            if batch < num_batches:
                yield Task(True, segment, batch)


def estimate_seconds(
    order: Iterable[Task],
    devices: Sequence[Hashable],
    forward: Sequence[float],
    backward: Sequence[float],
) -> float:
    """Returns how long devices take that compute tasks in this order, each as soon as the tasks
    that it needs are done. devices: of every segment; forward, backward: the seconds of one batch
    in every segment. Copies between devices take no time."""
    free: dict[Hashable, float] = dict.fromkeys(devices, 0.0)
    done: dict[Task, float] = {}
    last = len(devices) - 1
    for task in order:
        is_forward, segment, batch = task
        if is_forward:
            needed = Task(True, segment - 1, batch)
        else:
            needed = Task(segment == last, min(segment + 1, last), batch)
        start = max(free[devices[segment]], done.get(needed, 0.0))
        done[task] = start + (forward if is_forward else backward)[segment]
        free[devices[segment]] = done[task]
    return max(free.values())
