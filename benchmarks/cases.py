"""What is measured: training, scoring and generation, ours and the obvious alternative.

Shapes: H key/value heads, M memory slots, K head size, n tokens of a past.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.alone import run_alone
from benchmarks.gemm import gemm_peak
from benchmarks.measure import in_new_process, interleaved, median_ratio
from benchmarks.models import random_document
from benchmarks.passes import memory_formula, passes, useful
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState
from uiollms.planning.flops import Flops

Table = list[dict[str, Any]]


@dataclass
class Bench:
    """One model under measurement. sizes: of chunk_batch, the first is what all tables but one
    have; fresh: memory in new processes (else in this one, which is quick, and hides what the
    allocator has kept); gemm: `gemm_peak` by chunk_batch."""

    name: str
    model: MemoryLM
    sizes: Sequence[int]
    repeats: int
    fresh: bool
    gemm: dict[int, dict[str, Any]] = field(default_factory=dict)

    def watch_peak(self) -> None:
        """Measure the GEMMs' peak. Called before and after what is timed, because the machine is
        not always equally fast: the best of the run counts."""
        for size in self.sizes:
            rows = size * self.model.memory_config.chunk_size
            found = gemm_peak(Flops.of(self.model), rows, self.model.dtype, self.repeats)
            if size not in self.gemm or found["peak"] > self.gemm[size]["peak"]:
                self.gemm[size] = found

    def peak(self, chunk_batch: int | None = None) -> float:
        """FLOP/s, by default of the model's own chunk_batch."""
        return self.gemm[chunk_batch or self.model.chunk_batch]["peak"]

    def alone(
        self, kind: str, length: int, S: int = 2, chunk_batch: int | None = None, **more: bool
    ) -> dict[str, float]:
        """What `run_alone` says of one pass, bytes in MiB."""
        size = chunk_batch or self.model.chunk_batch
        case = {
            "model": self.name,
            "pass": kind,
            "length": length,
            "S": S,
            "chunk_batch": size,
        } | more
        result = (in_new_process if self.fresh else run_alone)(case)
        return {
            name: value if name == "seconds" else value / 2**20 for name, value in result.items()
        }


def against_baseline(bench: Bench, length: int) -> Table:
    """Time and memory of every pass over one document, S = 2, with every chunk_batch, beside the
    straightforward algorithm, and time also beside the one whose encoder is run as a whole. All
    take turns."""
    model, before = bench.model, bench.model.chunk_batch
    document = random_document(model, length)
    calls, short = (
        passes(model, ids, 2) for ids in (document, document[: 3 * model.memory_config.chunk_size])
    )
    twins = {"uio": "baseline uio", "exact": "baseline uio", "score": "baseline score"}

    def sized(kind: str, size: int) -> object:
        model.chunk_batch = size
        return calls[kind]()

    ours = {(kind, size): partial(sized, kind, size) for kind in twins for size in bench.sizes}
    theirs = {
        (kind, None): call for kind, call in calls.items() if kind not in twins
    }  # knows no chunk_batch
    seconds = interleaved({**ours, **theirs}, bench.repeats, short.values())
    bench.watch_peak()
    flops, alone = (
        useful(model, document, 2),
        {twin: bench.alone(twin, length, alive=True) for twin in set(twins.values())},
    )
    rows = []
    for kind, size in ours:
        turns, twin = seconds[kind, size], twins[kind]
        plain, whole = (
            seconds[twin, None],
            seconds[twin.replace("baseline", "baseline whole"), None],
        )
        model.chunk_batch = size
        with torch.set_grad_enabled(kind != "score"):
            at_once = model.chunks_per_batch
        peak = bench.peak(at_once if at_once in bench.sizes else size)
        median = statistics.median(turns)
        memory = bench.alone(kind, length, chunk_batch=size, alive=True)
        rows.append(
            {
                "pass": kind,
                "chunk_batch": size,
                "tokens": length,
                "seconds": median,
                "time / baseline": median_ratio(turns, plain),
                "time / whole": median_ratio(turns, whole),
                "floor / baseline": flops[kind] / peak / statistics.median(plain),
                "utilisation": flops[kind] / median / peak,
                "peak MiB": memory["bytes"],
                "memory / baseline": memory["bytes"] / alone[twin]["bytes"]
                if alone[twin]["bytes"]
                else None,
                "tensors MiB": memory["alive"],
                "tensors / baseline": memory["alive"] / alone[twin]["alive"],
            }
        )
    model.chunk_batch = before
    return rows


def against_length(bench: Bench, kind: str, lengths: Sequence[int]) -> Table:
    """Time a token, utilisation and peak memory against length, S = 2, both of the same new
    processes. All lengths take turns."""
    model = bench.model
    fitting = [n for n in lengths if n <= model.capacity]
    turns = [{n: bench.alone(kind, n) for n in fitting} for _ in range(bench.repeats)]
    bench.watch_peak()
    rows: Table = []
    for n in fitting:
        seconds = [turn[n]["seconds"] for turn in turns]
        grown, median = (
            statistics.median(turn[n]["bytes"] for turn in turns),
            statistics.median(seconds),
        )
        first = rows[0] if rows else None
        rows.append(
            {
                "pass": kind,
                "tokens": n,
                "us / token": 1e6 * median / n,
                "time / token, / first": median_ratio(
                    seconds, [turn[fitting[0]]["seconds"] for turn in turns]
                )
                * fitting[0]
                / n,
                "utilisation": useful(model, random_document(model, n), 2)[kind]
                / median
                / bench.peak(),
                "peak MiB": grown,
                "bytes / token above first": (grown - first["peak MiB"])
                * 2**20
                / (n - first["tokens"])
                if first
                else None,
                "formula, bytes / token": memory_formula(model, n, 2)[kind] / n,
            }
        )
    return rows


def against_S(bench: Bench, length: int, windows: Sequence[int]) -> Table:
    """A training step against S."""
    document = random_document(bench.model, length)
    seconds = interleaved(
        {S: passes(bench.model, document, S, only="uio")["uio"] for S in windows}, bench.repeats
    )
    return [
        {
            "S": S,
            "tokens": length,
            "time / first": median_ratio(seconds[S], seconds[windows[0]]),
            "peak MiB": bench.alone("uio", length, S)["bytes"],
        }
        for S in windows
    ]


def against_chunk_batch(bench: Bench, length: int, sizes: Sequence[int]) -> Table:
    """A training step against the chunks computed at once."""
    model = bench.model
    document, before = random_document(model, length), model.chunk_batch
    call = passes(model, document, 2, only="uio")["uio"]

    def with_batch(size: int) -> object:
        model.chunk_batch = size
        return call()

    seconds = interleaved(
        {size: lambda size=size: with_batch(size) for size in sizes}, bench.repeats
    )
    model.chunk_batch = before
    return [
        {
            "chunk_batch": size,
            "tokens": length,
            "time / first": median_ratio(seconds[size], seconds[sizes[0]]),
            "peak MiB": bench.alone("uio", length, chunk_batch=size)["bytes"],
        }
        for size in sizes
    ]


def against_past(bench: Bench, pasts: Sequence[int], new_tokens: int) -> Table:
    """Greedy decoding of `new_tokens` tokens, crossing a chunk boundary, behind pasts of random
    contents; beside it the base with a full KV cache of equal length, where that fits its
    positions."""
    model = bench.model
    calls: dict[tuple[str, int], Callable[[], float]] = {}
    for n in pasts:
        calls["memory", n] = lambda n=n: continue_stream(model, random_state(model, n), new_tokens)
        if n + new_tokens <= model.config.max_position_embeddings:
            calls["base", n] = lambda n=n: continue_base(model, n, new_tokens)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(bench.repeats):
        for key, call in calls.items():
            seconds[key].append(call())
    bench.watch_peak()
    rows: Table = []
    for n in pasts:
        ours = seconds["memory", n]
        flops = Flops.of(model).generation(
            n // model.memory_config.chunk_size * model.memory_config.num_memory
        )
        base = seconds.get(("base", n))
        rows.append(
            {
                "past": n,
                "ms / token": 1e3 * statistics.median(ours) / new_tokens,
                "time / first": median_ratio(ours, seconds["memory", pasts[0]]),
                "base time / ours": median_ratio(base, ours) if base else None,
                "utilisation": flops * new_tokens / statistics.median(ours) / bench.peak(),
            }
        )
    return rows


def random_state(model: MemoryLM, past: int) -> MemoryState:
    """A stream after `past` tokens, at the middle of a chunk; what its memories hold changes no
    time."""
    size, l = model.base.model.layers[0].self_attn.head_dim, model.memory_config.chunk_size
    slots = past // l * model.memory_config.num_memory
    heads, layers = model.config.num_key_value_heads, range(model.config.num_hidden_layers)

    def random_kv() -> list[Tensor]:
        return [torch.randn(1, heads, slots, size, dtype=model.dtype) for _ in layers]

    empty = model.new_state()
    state = MemoryState(
        random_kv(),
        random_kv(),
        empty.local_keys,
        empty.local_values,
        empty.open_ids,
        past // l * l,
    )
    with torch.no_grad():
        return model(random_document(model, l // 2)[None], state, logits_to_keep=1).past_key_values


@torch.no_grad()
def continue_stream(model: MemoryLM, state: MemoryState, new_tokens: int) -> float:
    """Seconds for `new_tokens` greedy tokens."""
    token = torch.zeros(1, 1, dtype=torch.int64)

    def decode() -> None:
        nonlocal state, token
        for _ in range(new_tokens):
            output = model(token, state, logits_to_keep=1)
            state, token = output.past_key_values, output.logits[:, -1:].argmax(-1)

    return clocked(decode)


@torch.no_grad()
def continue_base(model: MemoryLM, past: int, new_tokens: int) -> float:
    """The same for the base with its library KV cache, filled with random keys and values."""
    size, cache = model.base.model.layers[0].self_attn.head_dim, DynamicCache()
    for i in range(model.config.num_hidden_layers):
        shape = (1, model.config.num_key_value_heads, past, size)
        cache.update(
            torch.randn(shape, dtype=model.dtype), torch.randn(shape, dtype=model.dtype), i
        )
    token = torch.zeros(1, 1, dtype=torch.int64)

    def decode() -> None:
        nonlocal token
        for _ in range(new_tokens):
            token = (
                model.base(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            )

    return clocked(decode)


def clocked(call: Callable[[], None]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
