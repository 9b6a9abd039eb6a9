"""Measures bias, variance and angle of every estimator against the exact encoder gradient, on real
documents.

The encoder's gradient is linear in the weight matrix W. It is the sum over pairs s < t of W[t, s] *
g[t, s], where g[t, s] is the encoder gradient of loss t through memory s. So all g[t, s] of a
document are computed once. Their Gram matrix gives norm, angle and error of any estimator for any
number of draws, without another backward.

Shapes: N rows, C chunks, n pairs (t, s) with s < t, P encoder parameters, R draws.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from uiollms.data.sample import Sample
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import decode_rows, prepare_rows
from uiollms.model.state import KVPrefix, join_slots
from uiollms.training.estimators import Estimator, Exact, make_estimator

INFINITE = 10**6  # an S that is larger than the number of chunks of any document
NAMES = ("tbptt", "uio", "uio, no factor", "importance", "exact")


def estimators_of(sizes: Sequence[int]) -> list[tuple[str, int, Estimator]]:
    """(name, S, estimator) of every row of the table. The exact estimator has no S."""
    rows = [
        (
            name,
            S,
            make_estimator(
                "uio" if name.startswith("uio") else name, S, compensate=name != "uio, no factor"
            ),
        )
        for S in sizes
        for name in NAMES
        if name != "exact"
    ]
    return [*rows, ("exact", INFINITE, Exact())]


def pair_gradients(
    model: MemoryLM, sample: Sample
) -> tuple[list[tuple[int, int]], Tensor, list[float]]:
    """All pairs (t, s), their encoder gradients g[t, s] as rows [n, P], and the norms of the
    memories' summed gradients [C], which the importance estimator reads."""
    count = len(sample.chunks)
    with torch.no_grad():
        memory = [
            [layer.detach() for layer in model.encode_layers(chunk[None])]
            for chunk in sample.chunks
        ]
    received: dict[tuple[int, int], list[Tensor]] = {}
    for t, row in enumerate(sample.rows):
        if t == 0 or not len(row.scored):
            continue
        leaves = [
            torch.cat([memory[s][i] for s in range(t)]).requires_grad_()
            for i in range(len(memory[0]))
        ]
        keys, values = model.project(leaves, range(t))
        prefix = KVPrefix([[join_slots(k, 1)] for k in keys], [[join_slots(v, 1)] for v in values])
        (prepared,) = prepare_rows(model, sample, [[t]])
        loss, _ = decode_rows(model, sample, prepared, prefix)
        grads = torch.autograd.grad((loss * row.token_weights[row.scored].to(loss)).sum(), leaves)
        for s in range(t):
            received[t, s] = [g[s : s + 1] for g in grads]
    parameters = [
        p
        for name, p in model.encoder.named_parameters()
        if f"layers.{len(memory[0]) - 1}." not in name
    ]
    pairs, rows = [], []
    for s in range(count):
        graph = model.encode_layers(sample.chunks[s : s + 1])
        # With slot_input "last" the first layer's memory is made of frozen embeddings.
        trained = [i for i, layer in enumerate(graph) if layer.requires_grad]
        outputs = [graph[i] for i in trained]
        for t in (t for t in range(s + 1, len(sample.rows)) if (t, s) in received):
            arrived = [received[t, s][i] for i in trained]
            grads = torch.autograd.grad(outputs, parameters, arrived, retain_graph=True)
            pairs.append((t, s))
            rows.append(torch.cat([g.flatten() for g in grads]))
    squares = [0.0] * count
    for s in range(count):
        for layer in range(len(memory[0])):
            total = sum(
                received[t, s][layer].double()
                for t in range(s + 1, len(sample.rows))
                if (t, s) in received
            )
            squares[s] += total.pow(2).sum().item() if isinstance(total, Tensor) else 0.0
    return pairs, torch.stack(rows), [square**0.5 for square in squares]


def gram(vectors: Tensor, block: int = 1 << 18) -> Tensor:
    """Vectors [n, P] -> their inner products [n, n], summed in float64."""
    result = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for start in range(0, vectors.shape[1], block):
        part = vectors[:, start : start + block].double()
        result += part @ part.T
    return result


def draw_weights(
    estimator: Estimator,
    pairs: Sequence[tuple[int, int]],
    num_rows: int,
    norms: Sequence[float],
    draws: int,
    seed: int,
) -> Tensor:
    """The weight of every pair in every draw, [R, n] float64."""
    rng = random.Random(seed)
    t, s = (torch.tensor(side) for side in zip(*pairs, strict=True))
    rows = []
    for _ in range(draws):
        weights = estimator.weight_matrix(num_rows, rng)[t, s]
        columns = estimator.columns(norms, rng)
        rows.append(
            weights if columns is None else weights * torch.tensor(columns, dtype=torch.float64)[s]
        )
    return torch.stack(rows)


def statistics_of(
    weights: Tensor, products: Tensor, pairs: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Compares R estimates with the exact gradient g.

    weights: [R, n], products: [n, n] inner products of the pairs' gradients

    `bias` is the relative error of the draws' mean, `bias_noise` the part of it that chance
    explains, `variance` is E||estimate - mean||^2 / ||g||^2.
    """
    exact = products.sum().item()
    with_exact = weights @ products.sum(1)  # <estimate, g>
    squares = ((weights @ products) * weights).sum(1).clamp(min=0)
    mean = weights.mean(0)
    bias = ((mean - 1) @ products @ (mean - 1)).clamp(min=0).item() / exact
    variance = (squares.mean() - mean @ products @ mean).clamp(min=0).item() / exact
    ratio = (squares / exact).sqrt()
    errors = ((squares - 2 * with_exact + exact).clamp(min=0) / exact).sqrt()
    backwards = [
        len({s for (_, s), w in zip(pairs, row, strict=True) if w})
        for row in weights[:200].tolist()
    ]
    return {
        "bias": bias**0.5,
        "bias_noise": (variance / len(weights)) ** 0.5,
        "variance": variance,
        "norm_ratio": ratio.mean().item(),
        "norm_ratio_variance": ratio.var().item() if len(ratio) > 1 else 0.0,
        "cosine": (with_exact / (squares * exact).sqrt().clamp(min=1e-300)).mean().item(),
        "relative_error": errors.mean().item(),
        "encoder_backwards": statistics.mean(backwards),
    }


def study_gradients(
    model: MemoryLM,
    documents: Sequence[Tensor],
    sizes: Sequence[int],
    draws: int,
    bar: Callable[..., Iterable[Any]] = tqdm,
) -> list[dict[str, Any]]:
    """One row of statistics per estimator and S, averaged over documents.

    `norm_ratio_variance` is the variance over draws and documents, because the paper's Table 4
    draws once per input. So it includes the variance of the documents' means.
    """
    per_document: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number, ids in enumerate(bar(documents, desc="documents")):
        sample = Sample.language_modeling(ids, model.memory_config.chunk_size)
        pairs, vectors, norms = pair_gradients(model, sample)
        products = gram(vectors)
        del vectors
        for name, S, estimator in estimators_of(sizes):
            weights = draw_weights(estimator, pairs, len(sample.rows), norms, draws, seed=number)
            per_document.setdefault((name, S), []).append(statistics_of(weights, products, pairs))
    result = []
    for (name, S), rows in per_document.items():
        means: dict[str, Any] = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        means["norm_ratio_variance"] += statistics.pvariance([row["norm_ratio"] for row in rows])
        result.append({"estimator": name, "S": S} | means)
    return result
