"""The results of a training step: losses, scored tokens and NLL.

Shapes: N rows, N' scored tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uiollms.data.sample import Sample
from uiollms.model.passes import RowBatch


class StepResult(NamedTuple):
    """losses [N]: every row's part of the sample's loss; scored [N] int64: its number of scored
    tokens; reencoded: the chunks that were encoded with a graph; nll: the unweighted sum of the
    scored tokens' NLL in nats (a tensor, because reading it waits for the device). In a group of
    several processes the values are those of this process's rows and chunks, with zeros
    elsewhere."""

    losses: Tensor
    scored: Tensor
    reencoded: tuple[int, ...]
    nll: Tensor


class LossTally:
    """Adds up losses, scored tokens and NLL of a step's rows on the device, without waiting for
    it."""

    def __init__(self, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
        self.sample = sample
        self.losses = torch.zeros(len(sample.rows), dtype=dtype, device=device)
        self.scored = torch.zeros(len(sample.rows), dtype=torch.int64)
        self.nll = torch.zeros(len(sample.rows), dtype=dtype, device=device)

    def add(self, rows: RowBatch, loss: Tensor, nll: Tensor) -> Tensor:
        """Adds loss and NLL [N'] of a batch's scored tokens. Returns the batch's part of the
        sample's loss, with its graph."""
        weighted = loss * rows.weights.to(loss.dtype)
        for total, values in ((self.losses, weighted), (self.nll, nll)):
            total.index_add_(0, rows.row_numbers, values.detach().to(total))
        for t in rows.numbers:
            self.scored[t] = len(self.sample.rows[t].scored)
        return weighted.sum()

    def results(self, samples: Sequence[Sample], reencoded: Sequence[int]) -> list[StepResult]:
        """Splits the totals into one result for each of the joined samples."""
        parts = [
            column.split([len(each.rows) for each in samples])
            for column in (self.losses, self.scored, self.nll)
        ]
        results, first = [], 0
        for each, losses, scored, nll in zip(samples, *parts, strict=True):
            chunks = range(first, first := first + len(each.chunks))
            numbers = tuple(c - chunks.start for c in reencoded if c in chunks)
            results.append(StepResult(losses, scored, numbers, nll.sum()))
        return results
