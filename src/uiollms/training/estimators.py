"""Gradient estimators: which gradients at memories reach the encoder, and with what weight.

Loss t reads the memories 0 .. t-1. The exact encoder gradient at memory s is the sum of dJ_t/dm_s
over all t > s. An estimator replaces it by the sum of W[t, s] * dJ_t/dm_s, where the weight matrix
W is drawn at random. It is unbiased if E[W[t, s]] = 1 for every s < t. Every estimator is a small
class with one or two methods. A new one is a class and a line in `ESTIMATORS` (see
docs/extending.md).

In `draw_window` and `window_from_draws`, names that are kept for compatibility, "window" is W.

Shapes: N chunks with a loss, the last one complete or not; C of them that have a memory; W [N, N]
float64, row = loss, column = memory, zero on and above the diagonal.
Source: UIO-LLMs section 3.3; reservoir: Vitter 1985, algorithm R; systematic sampling: Madow
1949.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from uiollms.config.sections import TrainSection
from uiollms.files.errors import ConfigError
from uiollms.plugins import EstimatorPlugin, is_plugin, make_plugin


class Estimator:
    """The base class. `weight_matrix` is drawn before anything is computed. `columns` is called
    after the decoder pass; it may read the norms of the gradients and scale whole columns. A
    column of zeros saves the encoder's backward pass of that chunk."""

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        """Draws W [N, N] for one document of N chunks."""
        raise NotImplementedError

    def columns(self, norms: Sequence[float], rng: random.Random) -> list[float] | None:
        """Returns a factor for every memory, given the norms [C] of their summed gradients,
        or None to leave the columns as they are. Reading norms makes the step wait for the
        device, so a step reads them only for estimators that override this method."""
        return None

    @property
    def reads_norms(self) -> bool:
        return type(self).columns is not Estimator.columns


@dataclass(frozen=True)
class Exact(Estimator):
    """Every gradient with weight 1. There is no bias and no variance, and every chunk is encoded
    with a graph."""

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        return all_pairs(num_chunks)


@dataclass(frozen=True)
class TBPTT(Estimator):
    """Truncated backpropagation through time: loss t reaches the last S memories. It is biased,
    because it never reaches earlier ones."""

    S: int

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        return all_pairs(num_chunks).triu(-self.S)


@dataclass(frozen=True)
class UIO(Estimator):
    """The paper's estimator: loss t reaches the memories in a reservoir of size S, a uniform sample
    of the chunks 0 .. t-1. `compensate` multiplies by max(1, t / S), the inverse of the probability
    that a chunk is in the reservoir. The released program omits this factor, which biases its
    gradients towards zero by min(1, S / t)."""

    S: int
    compensate: bool = True

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        draws = [rng.randint(0, chunk) for chunk in range(self.S, num_chunks)]
        return window_from_draws(draws, self.S, self.compensate, num_chunks)


@dataclass(frozen=True)
class Importance(Estimator):
    """Chooses S chunks after the decoder pass. The probability of a chunk grows with the norm of
    its summed memory gradient. All gradients of a chosen chunk count, times the inverse of its
    probability. This is unbiased. On the released adapter its variance was half that of `UIO` at
    four encoder backward passes, and larger at equal S (docs/results.md).

    floor: the part of the probability that is spread evenly, so that no chunk has probability 0.
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
    """Returns the probabilities pi [N] that chunks are chosen. Each is in (0, 1], and their sum is
    min(size, N). They are proportional to (1 - floor) * norm / sum(norms) + floor / N, but those
    that would exceed 1 are set to 1, and the others are scaled up to the same sum."""
    count, total = len(norms), sum(norms)
    portions = [(1 - floor) * (n / total if total else 1 / count) + floor / count for n in norms]
    certain: set[int] = set()
    while True:
        uncertain = [i for i in range(count) if i not in certain]
        left = min(size, count) - len(certain)
        mass = sum(portions[i] for i in uncertain)
        over = {i for i in uncertain if left * portions[i] >= mass}
        if not over:
            break
        certain |= over
    return [1.0 if i in certain else left * portions[i] / mass for i in range(count)]


def systematic_sample(inclusion: Sequence[float], u: float) -> list[bool]:
    """Chooses items with probabilities pi from one random number u in [0, 1). The items are
    stretches of lengths pi_i, laid end to end on a line. Item i is chosen if one of the points u,
    u + 1, u + 2, ... is on its stretch. The probability of that is pi_i. The size of the sample is
    the sum of the pi_i, except for the rounding of that sum."""
    chosen, end = [], 0.0
    for p in inclusion:
        start, end = end, end + p
        first_point = u + max(0, -int(-(start - u) // 1))  # the smallest u + k >= start
        chosen.append(p == 1.0 or first_point < end)
    return chosen


def all_pairs(num_chunks: int) -> Tensor:
    """Returns the W of the exact gradient: 1 for every s < t."""
    return torch.ones(num_chunks, num_chunks, dtype=torch.float64).tril(-1)


def window_from_draws(
    draws: Sequence[int], S: int, compensate: bool, num_chunks: int | None = None
) -> Tensor:
    """Returns the W [N, N] of the reservoir estimator for its random integers. `draws` contains
    randint(0, c), both ends included, for every chunk c >= S in order. So N = S + len(draws),
    unless the document has fewer than S chunks; then `num_chunks` is needed.

    Chunk c enters the reservoir after its own loss: at index c while c < S, else at index j = draw
    if j < S. As in the released program the last chunk has a draw too, though no loss can read it.
    S 1, draws [1, 0], compensate -> reservoir before loss 1: {0}, before loss 2: {0} (1 was
    rejected); W = 0 0 0
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


def make_estimator(
    name: str, S: int = 2, compensate: bool = True, options: Mapping[str, Any] | None = None
) -> Estimator:
    """Returns the estimator with this name in `train.estimator`, with S = `train.tbptt`,
    `train.compensate`, and `options` = `train.estimator_options`, those of a plugin. Raises
    ValueError for an unknown name."""
    if is_plugin(name):
        plugin = make_plugin(EstimatorPlugin, name, options, ESTIMATORS.keys())
        return checked(plugin.make_estimator(S), name)
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r} is unknown; known: {', '.join(ESTIMATORS)}")
    settings = {"S": S, "compensate": compensate}
    names = {field.name for field in fields(ESTIMATORS[name])}
    return ESTIMATORS[name](**{name: settings[name] for name in names & settings.keys()})


def configured_estimator(train: TrainSection) -> Estimator:
    """Returns the estimator of a training run. Raises ConfigError for a faulty plugin."""
    return make_estimator(train.estimator, train.tbptt, train.compensate, train.estimator_options)


def checked(estimator: Estimator, name: str) -> Estimator:
    """Returns the estimator of a plugin. Raises ConfigError if it is none, or if the weights that
    it draws for 4 chunks do not have the form that the training step needs."""
    if not isinstance(estimator, Estimator):
        found = type(estimator).__name__
        raise ConfigError(f"{name}: make_estimator returned {found}, expected an Estimator")
    weights = estimator.weight_matrix(4, random.Random(0))
    if not isinstance(weights, Tensor):
        raise ConfigError(f"{name}: weight_matrix returned {type(weights).__name__}, not a Tensor")
    form = f"{weights.dtype} {list(weights.shape)}".removeprefix("torch.")
    if form != "float64 [4, 4]":
        raise ConfigError(f"{name}: weights of 4 chunks are {form}, expected float64 [4, 4]")
    if not weights.isfinite().all() or weights.triu().any():
        raise ConfigError(
            f"{name}: weights must be finite, and zero on and above the diagonal, because loss t "
            f"reads the memories before t; found {weights.tolist()}"
        )
    return estimator


def draw_window(
    estimator: Estimator | str,
    num_chunks: int,
    rng: random.Random | int | None = None,
    **settings: int | bool,
) -> Tensor:
    """Draws the weight matrix W [N, N] float64 once. estimator: an object of this module, or a name
    with the settings `S` and `compensate` (by default S = 2, compensated); rng: a
    `random.Random`, or the seed of a new one."""
    if isinstance(estimator, str):
        estimator = make_estimator(estimator, **settings)  # type: ignore[arg-type]
    return estimator.weight_matrix(
        num_chunks, rng if isinstance(rng, random.Random) else random.Random(rng)
    )
