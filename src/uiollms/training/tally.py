"""What a training step reports: losses, scored tokens and NLL of every row.

Shapes: N rows, N' scored tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uiollms.data.sample import Sample
from uiollms.kernels.devices import to_device


class StepResult(NamedTuple):
    """losses [N]: every row's share of the sample's loss; scored [N] int64: its scored tokens;
    reencoded: the chunks that went through the encoder with a graph; nll: the sum of the scored
    tokens' NLL, in nats, unweighted (a tensor: reading it waits for the device). In a group of
    several processes: of this one's rows and chunks, zero elsewhere."""

    losses: Tensor
    scored: Tensor
    reencoded: tuple[int, ...]
    nll: Tensor


class LossTally:
    """Losses, scored tokens and NLL of a step's rows, added up on the device without waiting for
    it."""

    def __init__(self, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
        self.sample = sample
        self.losses = torch.zeros(len(sample.rows), dtype=dtype, device=device)
        self.scored = torch.zeros(len(sample.rows), dtype=torch.int64)
        self.nll = torch.zeros(len(sample.rows), dtype=dtype, device=device)

    def add(self, batch: Sequence[int], loss: Tensor, nll: Tensor, row_of: Tensor) -> Tensor:
        """Book loss and NLL [N'] of a batch's scored tokens; return the batch's share of the
        sample's loss."""
        rows = [self.sample.rows[t] for t in batch]
        weighted = loss * torch.cat([row.token_weights[row.scored] for row in rows]).to(
            loss, non_blocking=True
        )
        numbers = torch.tensor(batch)[row_of]
        for booked, arrived in ((self.losses, weighted), (self.nll, nll)):
            booked.index_add_(0, to_device(numbers, booked.device), arrived.detach().to(booked))
        self.scored += torch.bincount(numbers, minlength=len(self.scored))
        return weighted.sum()

    def results(self, samples: Sequence[Sample], reencoded: Sequence[int]) -> list[StepResult]:
        """For each of the samples that were joined, its own rows and chunks."""
        parts = [
            column.split([len(one.rows) for one in samples])
            for column in (self.losses, self.scored, self.nll)
        ]
        results, first = [], 0
        for one, losses, scored, nll in zip(samples, *parts, strict=True):
            own = range(first, first := first + len(one.chunks))
            results.append(
                StepResult(
                    losses, scored, tuple(c - own.start for c in reencoded if c in own), nll.sum()
                )
            )
        return results
