"""Free-running copies: the model writes chunks down from memory, and every token is the likeliest
after the ones that it wrote before.

Shapes: C chunks, l chunk_size, B rows.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import empty_prefix, encode_and_project_all
from uiollms.model.state import KVPrefix


@torch.no_grad()
def greedy_reconstruction(model: MemoryLM, chunks: Tensor) -> Tensor:
    """Auto encoding: copies each of the chunks [C, l] from its memory alone -> [C, l] int64. Every
    copy starts with the `repeat_token` embedding."""
    parts = []
    for batch in chunks.split(model.chunks_per_batch):
        keys, values = model.project(model.encode_layers(batch), [0] * len(batch))
        memory = KVPrefix([[k] for k in keys], [[v] for v in values])
        parts.append(greedy_chunk(model, memory, batch[:, 0], repeat=True))
    return torch.cat(parts)


@torch.no_grad()
def greedy_copy(model: MemoryLM, chunks: Tensor, count: int) -> Tensor:
    """Longdata copy: copies the document's first `count` chunks, one after the other, from the
    memories of all chunks [C, l] (C = 0: without memory) -> [count, l] int64. The first copy
    starts with the `repeat_token` embedding, a later one with the last token of the copy before."""
    keys, values = encode_and_project_all(model, chunks)
    memory = KVPrefix([[k] for k in keys], [[v] for v in values]) if keys else empty_prefix(model)
    copies: list[Tensor] = []
    for _ in range(count):
        last = copies[-1][:, -1] if copies else torch.zeros(1, dtype=torch.int64)
        copies.append(greedy_chunk(model, memory, last, repeat=not copies))
    return torch.cat(copies)


def greedy_chunk(model: MemoryLM, memory: KVPrefix, first: Tensor, repeat: bool) -> Tensor:
    """Writes one chunk of tokens for every row of `memory` -> [B, l] int64.

    first: [B], the token that a row is started with; with `repeat` the `repeat_token` embedding
    replaces it
    """
    layers = range(len(memory.keys))
    num_slots = [memory.keys[0][0].shape[2] if memory.keys[0] else 0] * len(first)
    tokens = [first.cpu()]
    local: dict[int, tuple[Tensor, Tensor]] = {}
    for i in range(model.memory_config.chunk_size):
        keys = [[*memory.keys[j], *([local[j][0]] if i else [])] for j in layers]
        values = [[*memory.values[j], *([local[j][1]] if i else [])] for j in layers]
        prefix = KVPrefix(keys, values, num_local=i + 1)
        started = torch.ones(len(first), dtype=torch.bool) if repeat and i == 0 else None
        hidden = model.decode(tokens[-1][:, None], prefix, num_slots, local_past=i, repeat=started)
        tokens.append(model.logits(hidden[:, -1]).argmax(-1).cpu())
        local = prefix.local
    return torch.stack(tokens[1:], dim=1)


# ---- What a summary shows of a copy --------------------------------------------------------------


def written_chunk(
    original: Tensor, copy: Tensor, guesses: Tensor, decode: Callable[[Tensor], str]
) -> dict[str, Any]:
    """A chunk [l] with its free-running copy [l] and its guessed tokens [l], in the form of
    `summaries.Written`. decode: token ids -> text."""
    matcher = difflib.SequenceMatcher(None, original.tolist(), copy.tolist(), autojunk=False)
    in_order = torch.zeros(len(copy), dtype=torch.bool)
    for block in matcher.get_matching_blocks():
        in_order[block.b : block.b + block.size] = True
    return dict(
        original=decode(original),
        tokens=len(original),
        alone=copy_pieces(copy, in_order, decode),
        guided=copy_pieces(guesses, guesses == original, decode),
    )


def copy_pieces(ids: Tensor, right: Tensor, decode: Callable[[Tensor], str]) -> dict[str, Any]:
    """Token ids [l], cut where right [l] bool changes, in the form of `summaries.Copy`."""
    pieces = []
    for is_right, run in itertools.groupby(range(len(ids)), key=right.tolist().__getitem__):
        pieces.append((decode(ids[list(run)]), is_right))
    return dict(pieces=pieces, right=int(right.sum()))
