"""What memory is worth, against its controls, on the same documents: differences with intervals.

    bound      nll_shuffled - nll_own: nats a scored token that the own memory is better by than
               another document's; 0: what was learned is a prefix, whoever's memory it is
    recovered  (nll_window - nll_own) / (nll_window - nll_raw): the share of what the raw context
               wins that memory wins too

All are of sums over tokens, as the reported NLL is. Intervals are of documents drawn again with
replacement, in all modes the same: what makes a document hard is in both of a pair.

Shapes: D documents, K modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
DRAWS, SEED, LEVEL = 2000, 0, 0.95
BLOCK = 2**20  # documents drawn at once


class Estimate(NamedTuple):
    """A number of the documents, and its 95 % interval."""

    value: float
    interval_95: tuple[float, float]


Nlls = Mapping[int, Tensor]  # number of a document -> nats of every scored token


def difference(minuend: Nlls, subtrahend: Nlls) -> Estimate | None:
    """Mean NLL of one mode less that of another, in nats a token, over the documents that both
    have; None without one."""
    return estimate([minuend, subtrahend], lambda s: (s[..., 0] - s[..., 1], s[..., -1]))


def share_recovered(window: Nlls, own: Nlls, raw: Nlls) -> Estimate | None:
    """`recovered`. None without a document in all three modes, and where it has no finite value or
    interval: raw context wins nothing."""
    return estimate([window, own, raw], lambda s: (s[..., 0] - s[..., 1], s[..., 0] - s[..., 2]))


def estimate(
    modes: Sequence[Nlls], ratio: Callable[[Array], tuple[Array, Array]]
) -> Estimate | None:
    """A ratio of sums over the documents that all modes have. `ratio`: from sums [..., K + 1], the
    modes' NLL and then the tokens, to numerator and denominator [...]."""
    shared = sorted(set.intersection(*(set(nlls) for nlls in modes)))
    if not shared:
        return None
    sums = np.array([[total(nlls[d]) for nlls in modes] + [len(modes[0][d])] for d in shared])
    rng = np.random.default_rng(SEED)
    drawn = []
    for start in range(0, DRAWS, size := max(1, BLOCK // len(shared))):
        picks = rng.integers(0, len(shared), (min(size, DRAWS - start), len(shared)))
        drawn.append(sums[picks].sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        value, values = (np.divide(*ratio(s)) for s in (sums.sum(0), np.concatenate(drawn)))
    if not (np.isfinite(value) and np.isfinite(values).all()):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), (float(low), float(high)))


def total(nll: Tensor) -> float:
    return float(nll.sum(dtype=torch.float64))
