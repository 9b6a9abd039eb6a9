"""Weights of a document's tokens by how much the base gains from the context before their chunk.

Most tokens can be predicted from a few words before them. In a plain mean they decide what memory
learns; with these weights the tokens do that need the context. Which tokens are scored at all is
decided in data/sample.py.

Shapes: T' scored tokens of a sample.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import token_losses
from uiollms.model.memory_lm import MemoryLM


def weigh_tokens(model: MemoryLM, sample: Sample) -> Sample:
    """Multiplies the weight of every scored token by g / mean(g), where

        g = max(0, nll_window - nll_raw)

    nll_window is the token's NLL if the frozen base reads its chunk alone, nll_raw if the base
    reads everything before the token. If no g is above 0, all weights become 0. Raises
    ValueError past the base's positions.
    """
    plain = replace(sample, teachers=(), kl_weight=0.0)
    window, raw = (token_losses(model, plain, mode)[1].double() for mode in ("window", "raw"))
    return scale_token_weights(sample, normalize_gains(window - raw))


def normalize_gains(gains: Tensor) -> Tensor:
    """Scales gains [T'] in nats to a mean of 1. Negative gains count as 0. Returns zeros if none is
    above 0."""
    gains = gains.clamp(min=0)
    mean = gains.mean()
    return gains / mean if mean > 0 else gains


def scale_token_weights(sample: Sample, factors: Tensor) -> Sample:
    """Multiplies the weights of the sample's scored tokens by `factors` [T'], row after row."""
    rows = []
    row_factors = factors.split([len(row.scored) for row in sample.rows])
    for row, token_factors in zip(sample.rows, row_factors, strict=True):
        weights = row.token_weights.clone()
        weights[row.scored] *= token_factors
        rows.append(replace(row, token_weights=weights))
    return replace(sample, rows=tuple(rows))
