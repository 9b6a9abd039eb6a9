"""Weights of a document's tokens by what raw context is worth for each: most tokens are guessed
from a few words before them, and a plain mean lets them decide what memory learns.

Shapes: T' scored tokens of a sample.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import token_losses
from uiollms.model.memory_lm import MemoryLM


def weigh_tokens(model: MemoryLM, sample: Sample) -> Sample:
    """The sample with every scored token's weight times g / mean(g), where

        g = max(0, nll_window - nll_raw)

    is what the frozen base gains by reading everything before the token in place of its chunk
    alone. Where it gains nothing all weights are 0. Raises ValueError past the base's positions."""
    plain = replace(sample, teachers=(), kl_weight=0.0)
    window, raw = (token_losses(model, plain, mode)[1].double() for mode in ("window", "raw"))
    return multiplied(sample, relative(window - raw))


def relative(gain: Tensor) -> Tensor:
    """[T'] nats -> [T'] with a mean of 1, or 0 where no gain is above 0."""
    gain = gain.clamp(min=0)
    mean = gain.mean()
    return gain / mean if mean > 0 else gain


def multiplied(sample: Sample, factors: Tensor) -> Sample:
    """The sample with its scored tokens' weights times `factors` [T'], row after row."""
    rows = []
    for row, own in zip(
        sample.rows, factors.split([len(row.scored) for row in sample.rows]), strict=True
    ):
        weights = row.token_weights.clone()
        weights[row.scored] *= own
        rows.append(replace(row, token_weights=weights))
    return replace(sample, rows=tuple(rows))
