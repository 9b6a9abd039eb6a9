"""Scores of one sample: what the model says of every scored token, with memory and beside what
it is to be compared with.

    memory    rows read the memories of the chunks before them: the model
    window    every row on its own (with its recent tokens), no memory: what the frozen base does
              with the same window
    raw       the base with the whole raw context, where its positions allow: what memory would be
              if it lost nothing
    shuffled  rows read as many memories, but of another document: what memory is worth for its
              content
    recent    the base with as many raw tokens right in front of a row as its memories have slots:
              what the same room is worth without any training

Shapes: T tokens of a document, T' scored tokens, C chunks, l chunk_size, B rows, D hidden size,
H key/value heads, M memory slots in front, m num_memory, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from uiollms.config.sections import MemoryConfig
from uiollms.data.limits import check_sample
from uiollms.data.sample import IGNORED, PROTOCOLS, Row, Sample, flat
from uiollms.kernels.devices import to_device
from uiollms.kernels.indexing import batched
from uiollms.kernels.linear_cross_entropy import linear_losses
from uiollms.model.layers import AnyPrefix
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import (
    decode_scored,
    empty_prefix,
    encode_and_project_all,
    teacher_hidden,
    teacher_hidden_at,
)
from uiollms.model.state import KVPrefix, SharedPrefix, supports_in_place


class Score(NamedTuple):
    """nll [T'] float: nats of every scored token; positions [T'] int64: its place in the
    document."""

    nll: Tensor
    positions: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL; infinite past what a float holds."""
        return self.nll.double().mean().exp().item()


MODES = ("memory", "window", "raw", "shuffled", "recent")


def score(
    model: MemoryLM,
    input_ids: Tensor,
    protocol: str = "paper",
    mode: str = "memory",
    other: Tensor | None = None,
) -> Score:
    """Per-token NLL of one document [T] or [1, T]. protocol: "paper" leaves the first token of
    every chunk unscored, "document" only the document's first; mode: one of MODES, see the top
    of this file; other: for "shuffled" the document [T] or [1, T] whose memories are read, with
    at least as many complete chunks as are read of this one. Raises ValueError past the
    capacity, for "raw" past the base's positions, and for an unknown protocol or mode."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; allowed are {', '.join(PROTOCOLS)}")
    if (other is not None) != (mode == "shuffled"):
        found = "without one" if other is None else f"with mode {mode!r}"
        raise ValueError(f"other is the document that mode 'shuffled' reads, found {found}")
    l = model.memory_config.chunk_size
    sample = PROTOCOLS[protocol](input_ids, l)
    if other is not None:
        other = flat(other)
        other = other[: len(other) // l * l].view(-1, l)
    return Score(token_losses(model, sample, mode, other)[1], positions(sample))


def positions(sample: Sample) -> Tensor:
    """[T'] int64: where in its document each scored token of a sample stands. A row's token
    predicts the next one; in a copy, whose rows begin one token early, its own place."""
    ahead = 0 if any(row.repeat for row in sample.rows) else 1
    return torch.cat([row.start + row.scored + ahead for row in sample.rows])


@torch.no_grad()
def token_losses(
    model: MemoryLM, sample: Sample, mode: str = "memory", other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and NLL, [T'] each, of the sample's scored tokens: what training takes the weighted
    sum of, so with a teacher the loss holds KL(teacher || student) and without one it is the
    NLL. other: another document's chunks, for "shuffled"."""
    if not sample.num_scored:
        return torch.empty(0), torch.empty(0)
    teachers = teacher_hidden(model, sample)
    parts = []
    for rows, hidden, targets in scored_hidden(model, sample, mode, other):
        teacher = teacher_hidden_at(model, teachers, rows) if teachers else None
        losses = linear_losses(hidden, model.base.lm_head, targets, teacher, sample.kl_weight)
        parts.append(losses)
    loss, nll = torch.stack(
        [torch.cat(column) for column in zip(*parts, strict=True)]
    ).cpu()  # the only wait for the device
    return loss, nll


@torch.no_grad()
def exact_match(
    model: MemoryLM, sample: Sample, mode: str = "memory", other: Tensor | None = None
) -> bool:
    """Whether each scored token is the likeliest one: then, and only then, greedy decoding gives
    just these tokens."""
    found = scored_hidden(model, sample, mode, other)
    return all(
        bool((model.logits(hidden).argmax(-1) == targets).all()) for _, hidden, targets in found
    )


def scored_hidden(
    model: MemoryLM, sample: Sample, mode: str, other: Tensor | None = None
) -> Iterator[tuple[Sequence[Row], Tensor, Tensor]]:
    """Batches of rows that score anything, the normed hidden states [N, D] of their scored
    positions, and their targets [N]. Raises ValueError past the capacity, and where another
    document has too few chunks."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; allowed are {', '.join(MODES)}")
    if mode == "raw":
        sample = with_raw_texts(sample)
        rows = [row for row in sample.rows if len(row.scored)]
        targets = torch.cat([row.targets[row.scored] for row in rows])
        hidden = teacher_hidden_at(model, teacher_hidden(model, sample), rows)
        yield rows, hidden, to_device(targets, hidden.device)
        return
    sample = sample.with_recent(model.memory_config.recent_tokens)  # its own, in every mode
    if mode == "window":
        sample = replace(
            sample,
            chunks=sample.chunks[:0],
            rows=tuple(replace(r, num_memories=0) for r in sample.rows),
        )
    elif mode == "recent":
        sample = with_recent_tokens(sample, model.memory_config)
    elif mode == "shuffled":
        if other is None or len(other) < len(sample.chunks):
            raise ValueError(
                f"{len(sample.chunks)} memories are read, the other document has "
                f"{0 if other is None else len(other)}"
            )
        sample = replace(sample, chunks=other[: len(sample.chunks)])
    check_sample(model.limits, sample)
    keys, values = encode_and_project_all(model, sample.chunks)
    for batch in batched(
        [t for t, row in enumerate(sample.rows) if len(row.scored)], model.chunks_per_batch
    ):
        rows = [sample.rows[t] for t in batch]
        prefix = shared_prefix(model, rows, keys, values)
        yield rows, *decode_scored(model, sample, batch, prefix)[:2]


def with_raw_texts(sample: Sample) -> Sample:
    """The sample with, as its teacher texts, what each row reads when its memories are the raw
    chunks; a text that begins another is not repeated.

    chunks [0 1] [2 3], rows [0 1] [2 3] [4] reading 0, 1, 2 of them -> one text 0 1 2 3 4, in
    which they stand at 0, 2, 4
    """
    if sample.teachers:
        return sample
    texts: list[Tensor] = []
    rows = []
    for row in reversed(sample.rows):
        before = sample.chunks[: row.num_memories].flatten()
        text = torch.cat([before, row.input_ids])
        if not texts or not torch.equal(texts[-1][: len(text)], text):
            texts.append(text)
        rows.append(replace(row, teacher=(len(texts) - 1, len(before))))
    return replace(sample, rows=tuple(reversed(rows)), teachers=tuple(texts))


def with_recent_tokens(sample: Sample, memory: MemoryConfig) -> Sample:
    """The sample without memories, each row behind the raw tokens that stand right in front of what
    it reads, unscored, as many as its memories have slots; fewer where there are not so many.
    Raises ValueError for a copy, which is told by memory alone.

    2 slots a chunk of 4, ids 0..9 -> reads [0 1 2 3] | [2 3 4 5 6 7] | [4 5 6 7 8 9]
    """
    rows = []
    for row in sample.rows:
        if row.repeat:
            raise ValueError("mode 'recent': a copy is told by memory alone, nothing is in front")
        before = sample.chunks[row.memories.start : row.memories.stop].flatten()
        before = before[: len(before) - row.recent]  # which it has already
        before = before[max(0, len(before) - recent_slots(row, memory)) :]
        unscored = torch.full_like(before, IGNORED)
        no_weight = torch.zeros(len(before), dtype=row.token_weights.dtype)
        longer = replace(
            row,
            input_ids=torch.cat([before, row.input_ids]),
            targets=torch.cat([unscored, row.targets]),
            token_weights=torch.cat([no_weight, row.token_weights]),
            num_memories=0,
            start=row.start - len(before),
            teacher=(row.teacher[0], row.teacher[1] - len(before)),
        )
        rows.append(longer)
    return replace(sample, chunks=sample.chunks[:0], rows=tuple(rows))


def recent_slots(row: Row, memory: MemoryConfig) -> int:
    """Key/value slots that stand in front of a row when it reads its memories."""
    return row.num_memories * memory.num_memory


def longest_text(sample: Sample) -> int:
    """Tokens of the longest raw text that "raw" (or the sample's own teacher) reads."""
    return max(len(text) for text in with_raw_texts(sample).teachers)


def shared_prefix(
    model: MemoryLM, rows: Sequence[Row], keys: Sequence[Tensor], values: Sequence[Tensor]
) -> AnyPrefix:
    """One document's memory, [1, H, M, K] per layer, in front of all of its rows."""
    slots = max(row.num_memories for row in rows) * model.memory_config.num_memory
    if slots == 0:
        return empty_prefix(model)
    return SharedPrefix(
        [k[:, :, :slots] for k in keys],
        [v[:, :, :slots] for v in values],
        supports_in_place(model.base),
    )


# ---- Free-running copies -------------------------------------------------------------------------


@torch.no_grad()
def greedy_reconstruction(model: MemoryLM, chunks: Tensor) -> Tensor:
    """Auto encoding, free-running: each of the chunks [C, l] from its own memory alone, every
    token the likeliest behind those chosen before it, the first behind the `repeat_token`
    embedding -> [C, l]."""
    parts = []
    for batch in chunks.split(model.chunks_per_batch):
        keys, values = model.project(model.encode_layers(batch), [0] * len(batch))
        parts.append(
            greedy(
                model,
                KVPrefix([[k] for k in keys], [[v] for v in values]),
                batch[:, 0],
                repeat=True,
            )
        )
    return torch.cat(parts)


@torch.no_grad()
def greedy_copy(model: MemoryLM, chunks: Tensor, count: int) -> Tensor:
    """Longdata copy, free-running: from the memories of all chunks [C, l] (none: C = 0) the
    document's first `count` chunks one by one, the first behind the `repeat_token` embedding, a
    later one behind the last token of its predecessor -> [count, l]."""
    keys, values = encode_and_project_all(model, chunks)
    memory = KVPrefix([[k] for k in keys], [[v] for v in values]) if keys else empty_prefix(model)
    copies: list[Tensor] = []
    for _ in range(count):
        last = copies[-1][:, -1] if copies else torch.zeros(1, dtype=torch.int64)
        copies.append(greedy(model, memory, last, repeat=not copies))
    return torch.cat(copies)


def greedy(model: MemoryLM, memory: KVPrefix, first: Tensor, repeat: bool) -> Tensor:
    """A chunk of tokens [B, l] for every row of `memory`, each the likeliest behind those before
    it; the row starts with its token of `first` [B] or, with `repeat`, with the `repeat_token`
    embedding in its place."""
    layers = range(len(memory.keys))
    num_slots = [memory.keys[0][0].shape[2] if memory.keys[0] else 0] * len(first)
    tokens = [first.cpu()]
    local: dict[int, tuple[Tensor, Tensor]] = {}
    for i in range(model.memory_config.chunk_size):
        keys = [[*memory.keys[j], *([local[j][0]] if i else [])] for j in layers]
        values = [[*memory.values[j], *([local[j][1]] if i else [])] for j in layers]
        prefix = KVPrefix(keys, values, keep=i + 1)
        started = torch.ones(len(first), dtype=torch.bool) if repeat and i == 0 else None
        hidden = model.decode(tokens[-1][:, None], prefix, num_slots, local_past=i, repeat=started)
        tokens.append(model.logits(hidden[:, -1]).argmax(-1).cpu())
        local = prefix.local
    return torch.stack(tokens[1:], dim=1)
