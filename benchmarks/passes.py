"""The passes over a document that are measured, their useful FLOPs, and the memory they must
take."""

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
    """Every pass over `document` that is measured, by name; all training passes with the same
    draws. `only` builds the baseline's model copies just for those passes that need them."""
    sample = Sample.language_modeling(document, model.memory_config.chunk_size)
    draws, weights = drawn(sample, S), windows(sample, S)

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

        def plain(kind: str, whole: bool) -> object:
            baseline.whole = whole
            baseline.zero_grad(set_to_none=True)
            return (
                baseline.score(sample) if kind == "score" else baseline.train_step(sample, S, draws)
            )

        for name, whole in (("baseline", False), ("baseline whole", True)):
            for kind in ("uio", "score"):
                calls[f"{name} {kind}"] = partial(plain, kind, whole)
    return calls if only is None else {only: calls[only]}


def drawn(sample: Sample, S: int) -> list[int]:
    """What the reservoir draws: the same in every pass."""
    rng = random.Random(0)
    return [rng.randint(0, chunk) for chunk in range(S, len(sample.rows))]


def windows(sample: Sample, S: int) -> dict[str, Tensor]:
    """The weights of the training passes."""
    count = len(sample.rows)
    return {
        "uio": window_from_draws(drawn(sample, S), S, True, count),
        "exact": draw_window(Exact(), count),
    }


def useful(model: MemoryLM, document: Tensor, S: int) -> dict[str, int]:
    """Useful FLOPs of the passes."""
    flops, sample = (
        Flops.of(model),
        Sample.language_modeling(document, model.memory_config.chunk_size),
    )
    counts = {
        name: flops.training(sample, len(chunks_with_gradient(sample, weights)))
        for name, weights in windows(sample, S).items()
    }
    return counts | {"score": flops.scoring(sample)}


def memory_formula(model: MemoryLM, tokens: int, S: int) -> dict[str, int]:
    """Bytes that must grow with a document: for every slot and layer its key and value, and in
    training the memory and the sum of the key's and value's gradients; of the chunks of which
    the encoder needs gradients also the memory's gradient and, where losses are weighted, the
    weighted sum; for every token its id, target and weight."""
    size = model.base.model.layers[0].self_attn.head_dim
    kv = 2 * model.config.num_key_value_heads * size
    layers, hidden, item = (
        model.config.num_hidden_layers,
        model.config.hidden_size,
        model.dtype.itemsize,
    )
    wide = max(item, 4)
    chunks = tokens // model.memory_config.chunk_size
    each = model.memory_config.num_memory * layers  # vectors of a kind
    sample = Sample.language_modeling(
        torch.zeros(tokens, dtype=torch.int64), model.memory_config.chunk_size
    )
    needed = {
        name: len(chunks_with_gradient(sample, weights))
        for name, weights in windows(sample, S).items()
    }
    scoring = chunks * each * kv * item + 24 * tokens
    training = scoring + chunks * each * (hidden * item + kv * wide)
    return {
        "score": scoring,
        "uio": training + needed["uio"] * each * (hidden * item + kv * wide),
        "exact": training + needed["exact"] * each * hidden * item,
    }
