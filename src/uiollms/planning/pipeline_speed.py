"""Estimates how much faster a step is when the devices of one process work at the same time
(training/pipeline.py), from the number of layers on every device alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from uiollms.training.pipeline import estimate_seconds, list_tasks


def estimate_speedup(
    layer_devices: Sequence[torch.device], encoded: int, decoded: int, encoded_again: int
) -> float:
    """Returns the time of a step in which one device works at a time, divided by its time with a
    pipeline.

    layer_devices: of every layer. encoded, decoded, encoded_again: the numbers of batches of chunks
    that are encoded without a graph, of rows that are decoded, and of chunks that are encoded with
    a graph. Every layer counts the same. A backward pass counts as much as a forward pass, since
    the base is frozen and only the gradients of hidden states are computed.
    """
    segments = [(device, len(list(layers))) for device, layers in groupby(layer_devices)]
    devices, layers = [device for device, _ in segments], [count for _, count in segments]
    alone, together = 0.0, 0.0
    for num_batches, has_backward in ((encoded, False), (decoded, True), (encoded_again, True)):
        if num_batches:
            order = [
                task
                for task in list_tasks(num_batches, len(segments))
                if has_backward or task.forward
            ]
            together += estimate_seconds(order, devices, layers, layers)
            alone += sum(layers[segment] for _, segment, _ in order)
    return alone / together
