"""What memory saves beside the raw context, by length: bytes, time to the first token, seconds a
token and peak memory.

Shapes: T tokens, C chunks, m num_memory, L layers, D hidden size, H key/value heads, K head size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uiollms.alternatives.costs import Steps, now
from uiollms.config.sections import MemoryConfig
from uiollms.files.atomic import atomic_file
from uiollms.files.errors import ConfigError
from uiollms.kernels.peak_memory import PeakMemory
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import encode_all, project_all, read_raw
from uiollms.model.state import KVPrefix

MODES = ("memory", "raw")
STEPS = 16  # tokens that are decoded one by one, after a first one
MEASURED = ("context_s", "first_s", "token_ms", "peak_mib")  # medians of the turns


def check_lengths(lengths: Sequence[int], memory: MemoryConfig, positions: int) -> None:
    """Raises ConfigError for a length that does not fit the compressor, or the base's number of
    positions."""
    capacity = memory.capacity(positions)
    for length in lengths:
        if length % memory.chunk_size:
            raise ConfigError(
                f"--lengths: {length} is not a multiple of the chunk size {memory.chunk_size}"
            )
        if length > capacity:
            raise ConfigError(
                f"--lengths: {length} exceeds the capacity {capacity}; choose a smaller length, or "
                "a config with fewer slots per chunk"
            )


def study_savings(
    model: MemoryLM,
    ids: Tensor,
    lengths: Sequence[int],
    repeats: int,
    bar: Callable[..., Iterable[Any]],
    longest_raw: int | None = None,
) -> list[dict[str, Any]]:
    """Returns one row per length and mode.

    ids:     token ids [T], more than the longest of `lengths` by at least STEPS + 1
    lengths: tokens of a context, for which `check_lengths` finds no fault
    repeats: turns, of which the medians count
    longest_raw: tokens up to which the raw context is measured; None for all lengths

    kept_mib:  what is kept of the context between calls: memory vectors L x [C, m, D], or the keys
               and values of all tokens
    read_mib:  keys and values that a new token reads
    context_s: seconds from the context's token ids to what is kept
    first_s:   seconds from what is kept to the logits of one new token
    token_ms:  milliseconds of each of the STEPS next tokens
    peak_mib:  how far memory rises above the loaded model

    Past the base's positions the raw context is computed all the same. What the base then predicts
    is worth nothing, so such a row has a note.

    Raises ConfigError, before anything is measured, if `ids` are too few.
    """
    chunk_size, longest = model.memory_config.chunk_size, max(lengths)
    if len(ids) < longest + STEPS + 1:
        raise ConfigError(
            f"--lengths: the corpus has {len(ids)} tokens, {longest + STEPS + 1} are needed for "
            f"{longest}; choose a smaller length or another --corpus"
        )
    for mode in MODES:  # warm up
        measure_context(model, ids[: chunk_size + 2], chunk_size, mode)
    points = [
        (length, mode)
        for length in lengths
        for mode in MODES
        if mode == "memory" or longest_raw is None or length <= longest_raw
    ]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {point: [] for point in points}
    for turn in range(repeats):
        for length, mode in bar(points, desc=f"contexts, turn {turn + 1} of {repeats}"):
            found[length, mode].append(
                measure_context(model, ids[: length + STEPS + 1], length, mode)
            )
    rows = []
    for (length, mode), turns in found.items():
        row = turns[0] | {name: statistics.median(t[name] for t in turns) for name in MEASURED}
        positions = model.limits.positions
        if mode == "raw" and length + STEPS + 1 > positions:
            row["note"] = f"past the base's {positions:,} positions: cost only"
        rows.append(row)
    return rows


@torch.no_grad()
def measure_context(model: MemoryLM, ids: Tensor, length: int, mode: str) -> dict[str, Any]:
    """Returns the row of one turn. ids [T]: the context's `length` tokens, then the new ones."""
    recent = model.memory_config.recent_tokens if mode == "memory" else 0
    first = ids[length - recent : length + 1]  # recent tokens are read again, before the new one
    with PeakMemory(model.device) as peak:
        began = now(model.device)
        kept = keep_context(model, ids[:length], mode)
        compressed = now(model.device)
        if mode == "memory":
            keys, values = project_all(model, kept)
            prefix, num_slots = KVPrefix([[k] for k in keys], [[v] for v in values]), slots_of(kept)
        else:
            half = len(kept) // 2
            prefix = KVPrefix([[k] for k in kept[:half]], [[v] for v in kept[half:]])
            num_slots = 0
        read = [part for parts in (*prefix.keys, *prefix.values) for part in parts]
        slots, read_mib, kept_mib = read[0].shape[2], mib(read), mib(kept)
        steps = Steps(model, prefix, num_slots, len(ids) - length + recent)
        model.logits(steps.read(first)[:, -1:])
        answered = now(model.device)
        for i in range(length + 1, len(ids)):
            model.logits(steps.read(ids[i : i + 1]))
        ended = now(model.device)
    return {
        "tokens": length,
        "mode": mode,
        "slots": slots,
        "kept_mib": kept_mib,
        "read_mib": read_mib,
        "context_s": compressed - began,
        "first_s": answered - compressed,
        "token_ms": 1000 * (ended - answered) / (len(ids) - length - 1),
        "peak_mib": peak.bytes / 2**20,
        "note": "",
    }


def keep_context(model: MemoryLM, context: Tensor, mode: str) -> list[Tensor]:
    """Returns what is kept of a context [T]: memory vectors, L x [C, m, D], or the keys, then the
    values of all tokens, 2L x [1, H, T, K]."""
    if mode == "memory":
        return encode_all(model, context.view(-1, model.memory_config.chunk_size))[0]
    prefix = read_raw(model, context)
    return [part for parts in (*prefix.keys, *prefix.values) for part in parts]


def slots_of(memory: Sequence[Tensor]) -> int:
    """The slots of memory vectors, L x [C, m, D]."""
    return memory[0].shape[0] * memory[0].shape[1]


def mib(tensors: Sequence[Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


PANELS = {
    "kept_mib": "kept between calls (MiB)",
    "context_s": "reading the context once (s)",
    "first_s": "first token after what is kept (s)",
    "token_ms": "each further token (ms)",
}


def plot_savings(
    rows: Sequence[dict[str, Any]], style: Callable[[str], dict[str, Any]], path: Path
) -> None:
    """Draws one panel per column of PANELS, against the tokens of the context. style: the line
    style of a mode."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 8), layout="constrained")
    ticks = sorted({row["tokens"] for row in rows})
    for number, (column, title) in enumerate(PANELS.items()):
        axes = figure.add_subplot(2, 2, number + 1)
        for mode in MODES:
            points = [(row["tokens"], row[column]) for row in rows if row["mode"] == mode]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), markersize=5, **style(mode))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel("tokens of the context")
        axes.set_title(title, fontsize=12)
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=11)
    with atomic_file(path) as work:
        figure.savefig(work, dpi=110)
