"""Gradient estimators: which memory gradients reach the encoder, and with what weight.

Loss t reads memories 0 .. t-1. An estimator replaces the exact encoder gradient, the sum over t
> s of dJ_t/dm_s, by the sum of W[t, s] * dJ_t/dm_s. It is unbiased if E[W[t, s]] = 1 for every s
< t. Every estimator here is one small class with two methods; a new one is a class and a line in
`ESTIMATORS` (see CONTRIBUTING.md).

Shapes: N chunks, W [N, N] float64, row = loss, column = memory, zero on and above the diagonal.
Source: UIO-LLMs section 3.3; reservoir: Vitter 1985, algorithm R; systematic sampling: Madow
1949.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


class Estimator:
    """Base class. `weight_matrix` is drawn before anything is computed; `columns` may look at the
    gradients' norms after the decoder pass and scale whole columns (a column of zeros saves that
    chunk's encoder backward)."""

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        """W [N, N] for one document of N chunks."""
        raise NotImplementedError

    def columns(self, norms: Sequence[float], rng: random.Random) -> list[float] | None:
        """norms [N]: size of every memory's summed gradient -> factor of every column, or None:
        leave all as they are. Estimators that do not override this spare the host
        synchronisation that reading norms costs."""
        return None

    @property
    def reads_norms(self) -> bool:
        return type(self).columns is not Estimator.columns


@dataclass(frozen=True)
class Exact(Estimator):
    """Every gradient, weight 1: no bias, no variance, an encoder backward for every chunk."""

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        return all_pairs(num_chunks)


@dataclass(frozen=True)
class TBPTT(Estimator):
    """Truncated backpropagation through time: loss t reaches the last S memories. Biased: it
    never sees further."""

    S: int

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        return all_pairs(num_chunks).triu(-self.S)


@dataclass(frozen=True)
class UIO(Estimator):
    """The paper's: loss t reaches the memories in a reservoir of S, a uniform sample of chunks 0
    .. t-1. `compensate` multiplies by max(1, t / S), the inverse of the probability of being in
    it; the released program leaves that out and is then biased towards zero by min(1, S / t)."""

    S: int
    compensate: bool = True

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        draws = [rng.randint(0, chunk) for chunk in range(self.S, num_chunks)]
        return window_from_draws(draws, self.S, self.compensate, num_chunks)


@dataclass(frozen=True)
class Importance(Estimator):
    """S chunks chosen after the decoder pass, with inclusion probability growing with the norm
    of their summed memory gradient; all of a chosen chunk's gradients count, times the inverse
    of that probability. Unbiased; on the released adapter it had half the variance of `UIO` at
    four encoder backwards, and more at equal S (docs/results.md).

    floor: share of the probability that is spread evenly, so that no chunk has probability 0.
    """

    S: int
    floor: float = 0.1

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        return all_pairs(num_chunks)

    def columns(self, norms: Sequence[float], rng: random.Random) -> list[float]:
        inclusion = inclusion_probabilities(norms, self.S, self.floor)
        chosen = systematic_sample(inclusion, rng.random())
        return [1 / p if c else 0.0 for p, c in zip(inclusion, chosen, strict=True)]


def inclusion_probabilities(norms: Sequence[float], size: int, floor: float) -> list[float]:
    """pi [N], summing to min(size, N), each in (0, 1]: proportional to (1 - floor) * norm share
    + floor / N, with what would exceed 1 set to 1 and the rest scaled up again."""
    count, total = len(norms), sum(norms)
    share = [(1 - floor) * (n / total if total else 1 / count) + floor / count for n in norms]
    certain: set[int] = set()
    while True:
        rest = [i for i in range(count) if i not in certain]
        left = min(size, count) - len(certain)
        mass = sum(share[i] for i in rest)
        over = {i for i in rest if left * share[i] >= mass}
        if not over:
            break
        certain |= over
    return [1.0 if i in certain else left * share[i] / mass for i in range(count)]


def systematic_sample(inclusion: Sequence[float], u: float) -> list[bool]:
    """One number u in [0, 1) decides: item i, owning the stretch of length pi_i of a line, is
    chosen if one of the points u, u + 1, u + 2, ... falls on it, which happens with probability
    pi_i. The sample's size is the sum of the pi_i, up to the rounding of that sum."""
    chosen, end = [], 0.0
    for p in inclusion:
        start, end = end, end + p
        first_point = u + max(0, -int(-(start - u) // 1))  # the smallest u + k >= start
        chosen.append(p == 1.0 or first_point < end)
    return chosen


def all_pairs(num_chunks: int) -> Tensor:
    """W of the exact gradient: 1 for every s < t."""
    return torch.ones(num_chunks, num_chunks, dtype=torch.float64).tril(-1)


def window_from_draws(
    draws: Sequence[int], S: int, compensate: bool, num_chunks: int | None = None
) -> Tensor:
    """The reservoir estimator's W [N, N] from its random integers: `draws` holds randint(0, c),
    ends included, for every chunk c >= S in order, so N = S + len(draws) unless the document has
    fewer than S chunks (then say `num_chunks`).

    Chunk c enters after its own loss: into slot c while c < S, then into slot j = draw if j < S. As
    in the released program the last chunk is drawn for too, though no loss can read it.

        S 1, draws [1, 0], compensate -> the reservoir is {0} before loss 1 and, because chunk 1
        was rejected, {0} before loss 2

        W = 0 0 0
            1 0 0
            2 0 0
    """
    count = S + len(draws) if num_chunks is None else num_chunks
    weights = torch.zeros(count, count, dtype=torch.float64)
    reservoir: list[int] = []
    for t in range(count):
        weights[t, reservoir] = max(1.0, t / S) if compensate else 1.0
        if t < S:
            reservoir.append(t)
        elif draws[t - S] < S:
            reservoir[draws[t - S]] = t
    return weights


ESTIMATORS: dict[str, Any] = {"exact": Exact, "tbptt": TBPTT, "uio": UIO, "importance": Importance}


def make_estimator(name: str, S: int = 2, compensate: bool = True) -> Estimator:
    """The estimator called `name` in a config's `train.estimator`, with `train.tbptt` = S and
    `train.compensate`."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r} is unknown; known: {', '.join(ESTIMATORS)}")
    given = {"S": S, "compensate": compensate}
    wanted = {field.name for field in fields(ESTIMATORS[name])}
    return ESTIMATORS[name](**{k: v for k, v in given.items() if k in wanted})


def draw_window(
    estimator: Estimator | str,
    num_chunks: int,
    rng: random.Random | int | None = None,
    **settings: int | bool,
) -> Tensor:
    """The weight matrix W [N, N] float64 of one draw. estimator: an object of this module, or a
    name with `S` and `compensate` as settings (S = 2 and compensated by default); rng: a
    `random.Random`, or a seed for a fresh one."""
    if isinstance(estimator, str):
        estimator = make_estimator(estimator, **settings)  # type: ignore[arg-type]
    return estimator.weight_matrix(
        num_chunks, rng if isinstance(rng, random.Random) else random.Random(rng)
    )
