"""The tables of a report. Each compares training, scoring or generation with an alternative, or
over a range of one setting.

Shapes: H key/value heads, M memory slots, K head size, n tokens of a past.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks import worker
from benchmarks.gemm import gemm_peak
from benchmarks.measure import in_new_process, interleaved, median_ratio, seconds_of
from benchmarks.models import random_document
from benchmarks.passes import memory_formula, passes, useful_flops
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState
from uiollms.planning.flops import Flops

Table = list[dict[str, Any]]


@dataclass
class Bench:
    """One model and how it is measured.

    sizes: values of chunk_batch; all tables but the first use sizes[0]
    fresh: whether memory is measured in new processes. In this process it is faster to measure, but
           a CPU's result misses memory that the allocator already holds.
    gemm:  the result of `gemm_peak` for each chunk_batch
    """

    name: str
    model: MemoryLM
    sizes: Sequence[int]
    repeats: int
    fresh: bool
    gemm: dict[int, dict[str, Any]] = field(default_factory=dict)

    def measure_peak(self) -> None:
        """Measures the GEMM peak and keeps it if it exceeds the earlier ones. It is called before
        and after the timed passes, because the speed of the machine varies during a run."""
        for size in self.sizes:
            rows = size * self.model.memory_config.chunk_size
            found = gemm_peak(
                Flops.of(self.model), rows, self.model.dtype, self.repeats, self.model.device
            )
            if size not in self.gemm or found["peak"] > self.gemm[size]["peak"]:
                self.gemm[size] = found

    def peak(self, chunk_batch: int | None = None) -> float:
        """GEMM peak in FLOP/s, by default for the model's current chunk_batch."""
        return self.gemm[chunk_batch or self.model.chunk_batch]["peak"]

    def run_case(
        self, kind: str, length: int, S: int = 2, chunk_batch: int | None = None, **more: bool
    ) -> dict[str, float]:
        """Measures one pass with `worker.run_case` and converts its bytes to MiB."""
        size = chunk_batch or self.model.chunk_batch
        case = {
            "model": self.name,
            "device": str(self.model.device),
            "pass": kind,
            "length": length,
            "S": S,
            "chunk_batch": size,
        } | more
        if self.fresh:
            result = in_new_process(case)
        else:
            before = self.model.chunk_batch
            result = worker.run_case(case, self.model)
            self.model.chunk_batch = before
        return {
            name: value if name == "seconds" else value / 2**20 for name, value in result.items()
        }


def against_baseline(bench: Bench, length: int) -> Table:
    """Compares time and memory of every pass over one document, at S = 2 and every chunk_batch,
    with the baseline. Time is also compared with the baseline whose encoder runs its last layer and
    LM head. All passes take turns."""
    model, before = bench.model, bench.model.chunk_batch
    document = random_document(model, length)
    calls, short = (
        passes(model, ids, 2) for ids in (document, document[: 3 * model.memory_config.chunk_size])
    )
    twins = {"uio": "baseline uio", "exact": "baseline uio", "score": "baseline score"}

    def run_sized(kind: str, size: int) -> object:
        model.chunk_batch = size
        return calls[kind]()

    ours = {(kind, size): partial(run_sized, kind, size) for kind in twins for size in bench.sizes}
    # The baseline has no chunk_batch.
    theirs = {(kind, None): call for kind, call in calls.items() if kind not in twins}
    seconds = interleaved({**ours, **theirs}, bench.repeats, short.values(), model.device)
    bench.measure_peak()
    flops = useful_flops(model, document, 2)
    baseline = {twin: bench.run_case(twin, length, alive=True) for twin in set(twins.values())}
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
        memory = bench.run_case(kind, length, chunk_batch=size, alive=True)
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
                "memory / baseline": memory["bytes"] / baseline[twin]["bytes"]
                if baseline[twin]["bytes"]
                else None,
                "tensors MiB": memory["alive"],
                "tensors / baseline": memory["alive"] / baseline[twin]["alive"],
            }
        )
    model.chunk_batch = before
    return rows


def against_length(bench: Bench, kind: str, lengths: Sequence[int]) -> Table:
    """Measures time per token, utilisation and peak memory for documents of several lengths, at
    S = 2. Time and memory come from the same processes. All lengths take turns."""
    model = bench.model
    fitting = [n for n in lengths if n <= model.capacity]
    turns = [{n: bench.run_case(kind, n) for n in fitting} for _ in range(bench.repeats)]
    bench.measure_peak()
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
                "utilisation": useful_flops(model, random_document(model, n), 2)[kind]
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
    """Measures a training step for several values of S."""
    document = random_document(bench.model, length)
    seconds = interleaved(
        {S: passes(bench.model, document, S, only="uio")["uio"] for S in windows},
        bench.repeats,
        device=bench.model.device,
    )
    return [
        {
            "S": S,
            "tokens": length,
            "time / first": median_ratio(seconds[S], seconds[windows[0]]),
            "peak MiB": bench.run_case("uio", length, S)["bytes"],
        }
        for S in windows
    ]


def against_chunk_batch(bench: Bench, length: int, sizes: Sequence[int]) -> Table:
    """Measures a training step for several values of chunk_batch."""
    model = bench.model
    document, before = random_document(model, length), model.chunk_batch
    call = passes(model, document, 2, only="uio")["uio"]

    def with_batch(size: int) -> object:
        model.chunk_batch = size
        return call()

    seconds = interleaved(
        {size: lambda size=size: with_batch(size) for size in sizes},
        bench.repeats,
        device=model.device,
    )
    model.chunk_batch = before
    return [
        {
            "chunk_batch": size,
            "tokens": length,
            "time / first": median_ratio(seconds[size], seconds[sizes[0]]),
            "peak MiB": bench.run_case("uio", length, chunk_batch=size)["bytes"],
        }
        for size in sizes
    ]


def against_past(bench: Bench, pasts: Sequence[int], new_tokens: int) -> Table:
    """Measures greedy decoding of `new_tokens` tokens, across a chunk boundary, after pasts of
    several lengths and random contents. Where the past fits the base's positions, it is compared
    with the base and a full KV cache of the same length."""
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
    bench.measure_peak()
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
    """The state after `past` tokens and half a chunk. Its memories are random, which does not
    change the time."""
    size, l = model.base.model.layers[0].self_attn.head_dim, model.memory_config.chunk_size
    slots = past // l * model.memory_config.num_memory
    heads, layers = model.config.num_key_value_heads, range(model.config.num_hidden_layers)

    def random_kv() -> list[Tensor]:
        shape = 1, heads, slots, size
        return [torch.randn(shape, dtype=model.dtype, device=model.device) for _ in layers]

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
        ids = random_document(model, l // 2)[None].to(model.device)
        return model(ids, state, logits_to_keep=1).past_key_values


@torch.no_grad()
def continue_stream(model: MemoryLM, state: MemoryState, new_tokens: int) -> float:
    """Seconds to generate `new_tokens` tokens greedily from a state."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    def decode() -> None:
        nonlocal state, token
        for _ in range(new_tokens):
            output = model(token, state, logits_to_keep=1)
            state, token = output.past_key_values, output.logits[:, -1:].argmax(-1)

    return seconds_of(decode, model.device)


@torch.no_grad()
def continue_base(model: MemoryLM, past: int, new_tokens: int) -> float:
    """Seconds to generate `new_tokens` tokens greedily with the base alone, whose KV cache contains
    `past` random keys and values."""
    size, cache = model.base.model.layers[0].self_attn.head_dim, DynamicCache()
    for i in range(model.config.num_hidden_layers):
        shape = (1, model.config.num_key_value_heads, past, size)
        keys, values = (
            torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        cache.update(keys, values, i)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    def decode() -> None:
        nonlocal token
        for _ in range(new_tokens):
            token = (
                model.base(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            )

    return seconds_of(decode, model.device)
