"""The passes over a document that are measured, their useful FLOPs, and the memory that they need
at least."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.baseline import Baseline
from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import score
from uiollms.model.memory_lm import MemoryLM
from uiollms.planning.flops import Flops
from uiollms.training.estimators import Exact, draw_window, window_from_draws
from uiollms.training.step import chunks_with_gradient, gradient_step


def passes(
    model: MemoryLM, document: Tensor, S: int, only: str | None = None
) -> dict[str, Callable[[], object]]:
    """Returns every pass over `document` by its name. All training passes have the same draws.
    With `only`, the result contains that pass alone, and the baseline's copies of the model are
    made only if the pass needs them."""
    sample = Sample.language_modeling(document, model.memory_config.chunk_size)
    draws, weights = reservoir_draws(sample, S), weight_matrices(sample, S)

    def train(kind: str) -> object:
        model.zero_grad(set_to_none=True)
        return gradient_step(model, sample, weights=weights[kind])

    calls: dict[str, Callable[[], object]] = {
        "uio": lambda: train("uio"),
        "exact": lambda: train("exact"),
        "score": lambda: score(model, document),
    }
    if only is None or only.startswith("baseline"):
        baseline = Baseline(model)

        def run_baseline(kind: str, whole: bool) -> object:
            baseline.whole = whole
            baseline.zero_grad(set_to_none=True)
            return (
                baseline.score(sample) if kind == "score" else baseline.train_step(sample, S, draws)
            )

        for name, whole in (("baseline", False), ("baseline whole", True)):
            for kind in ("uio", "score"):
                calls[f"{name} {kind}"] = partial(run_baseline, kind, whole)
    return calls if only is None else {only: calls[only]}


def reservoir_draws(sample: Sample, S: int) -> list[int]:
    """The random integers of the reservoir, the same in every pass; see `window_from_draws`."""
    rng = random.Random(0)
    return [rng.randint(0, chunk) for chunk in range(S, len(sample.rows))]


def weight_matrices(sample: Sample, S: int) -> dict[str, Tensor]:
    """The weight matrix of each training pass."""
    count = len(sample.rows)
    return {
        "uio": window_from_draws(reservoir_draws(sample, S), S, True, count),
        "exact": draw_window(Exact(), count),
    }


def useful_flops(model: MemoryLM, document: Tensor, S: int) -> dict[str, int]:
    """Useful FLOPs of each pass, as planning/flops.py counts them."""
    flops, sample = (
        Flops.of(model),
        Sample.language_modeling(document, model.memory_config.chunk_size),
    )
    counts = {
        name: flops.training(sample, len(chunks_with_gradient(sample, weights)))
        for name, weights in weight_matrices(sample, S).items()
    }
    return counts | {"score": flops.scoring(sample)}


def memory_formula(model: MemoryLM, tokens: int, S: int) -> dict[str, int]:
    """Bytes that a pass needs at least and that grow with the document.

    Every token needs its id, target and weight. Every slot and layer needs a key and a value, and
    in training also the memory and the sums of the key's and the value's gradients. Chunks whose
    encoder gradients are computed also need the memory's gradient and, if losses are weighted, the
    weighted sum of the key's and value's gradients."""
    size = model.base.model.layers[0].self_attn.head_dim
    kv = 2 * model.config.num_key_value_heads * size
    layers, hidden, item = (
        model.config.num_hidden_layers,
        model.config.hidden_size,
        model.dtype.itemsize,
    )
    wide = max(item, 4)
    chunks = tokens // model.memory_config.chunk_size
    each = model.memory_config.num_memory * layers  # vectors of one kind in a chunk
    sample = Sample.language_modeling(
        torch.zeros(tokens, dtype=torch.int64), model.memory_config.chunk_size
    )
    needed = {
        name: len(chunks_with_gradient(sample, weights))
        for name, weights in weight_matrices(sample, S).items()
    }
    scoring = chunks * each * kv * item + 24 * tokens
    training = scoring + chunks * each * (hidden * item + kv * wide)
    return {
        "score": scoring,
        "uio": training + needed["uio"] * each * (hidden * item + kv * wide),
        "exact": training + needed["exact"] * each * hidden * item,
    }
