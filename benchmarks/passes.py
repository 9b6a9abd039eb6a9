"""The passes over a document that are measured, their useful FLOPs, and the memory they must take."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks.baseline import Baseline
from uiollms.estimators import Exact, draw_window, window_from_draws
from uiollms.evaluate import score
from uiollms.flops import Flops
from uiollms.model import MemoryLM
from uiollms.step import chunks_with_gradient, gradient_step
from uiollms.tasks import Sample


def passes(model: MemoryLM, document: Tensor, S: int, only: str | None = None) -> dict[str, Callable[[], object]]:
    """Every pass over `document` that is measured, by name; all training passes with the same draws. `only` builds the
    baseline's model copies just for those passes that need them."""
    sample = Sample.language_modeling(document, model.memory_config.chunk_size)
    rng, count = random.Random(0), len(sample.rows)
    draws = [rng.randint(0, chunk) for chunk in range(S, count)]
    window = window_from_draws(draws, S, True, count)
    exact = draw_window(Exact(), count)

    def train(weights: Tensor) -> object:
        model.zero_grad(set_to_none=True)
        return gradient_step(model, sample, weights=weights)

    calls: dict[str, Callable[[], object]] = {
        "uio": lambda: train(window),
        "exact": lambda: train(exact),
        "score": lambda: score(model, document),
    }
    if only is None or only.startswith("baseline"):
        baseline = Baseline(model)

        def plain(kind: str, whole: bool) -> object:
            baseline.whole = whole
            baseline.zero_grad(set_to_none=True)
            return baseline.score(sample) if kind == "score" else baseline.train_step(sample, S, draws)

        for name, whole in (("baseline", False), ("baseline whole", True)):
            for kind in ("uio", "score"):
                calls[f"{name} {kind}"] = partial(plain, kind, whole)
    return calls if only is None else {only: calls[only]}


def useful(model: MemoryLM, document: Tensor, S: int) -> dict[str, int]:
    """Useful FLOPs of the passes."""
    flops, sample = Flops.of(model), Sample.language_modeling(document, model.memory_config.chunk_size)
    rng, count = random.Random(0), len(sample.rows)
    window = window_from_draws([rng.randint(0, chunk) for chunk in range(S, count)], S, True, count)
    backwards = {"uio": window, "exact": draw_window(Exact(), count)}
    counts = {name: flops.training(sample, len(chunks_with_gradient(sample, weights))) for name, weights in backwards.items()}
    return counts | {"score": flops.scoring(sample)}


def memory_formula(model: MemoryLM, tokens: int) -> dict[str, int]:
    """Bytes that must grow with a document: for every slot and layer its key and value (and in training the memory, and the
    gradients of all three, those of key and value twice: all, and weighted), for every token its id, target and weight."""
    size = model.base.model.layers[0].self_attn.head_dim
    kv = 2 * model.config.num_key_value_heads * size
    slots = tokens // model.memory_config.chunk_size * model.memory_config.num_memory
    item, layers, hidden = model.dtype.itemsize, model.config.num_hidden_layers, model.config.hidden_size
    scoring = slots * layers * kv * item + 24 * tokens
    gradients = slots * layers * (2 * hidden * item + 2 * kv * max(item, 4))
    return {"score": scoring, "uio": scoring + gradients, "exact": scoring + gradients}
