"""What a model can read at most, and whether a document or a sample fits.

Shapes: T tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from uiollms.config.sections import MemoryConfig
from uiollms.data.sample import Sample


class Limits(NamedTuple):
    """memory: the compressor; positions: how many the base has, `positions_said` in words with
    where they come from; vocab_size: of its embeddings."""

    memory: MemoryConfig
    positions: int
    positions_said: str
    vocab_size: int

    @property
    def capacity(self) -> int:
        """Tokens of the longest document."""
        return self.memory.capacity(self.positions)


class Limited(Protocol):
    """A model, as far as samples depend on it."""

    @property
    def limits(self) -> Limits: ...


def check_length(num_tokens: int, limits: Limits) -> None:
    """Raises ValueError for a document of `num_tokens` tokens that is past the capacity."""
    config, capacity = limits.memory, limits.capacity
    if num_tokens > capacity:
        full, last = divmod(capacity, config.chunk_size)
        recent = f" and recent_tokens {config.recent_tokens}" if config.recent_tokens else ""
        raise ValueError(
            f"the document has {num_tokens} tokens, the capacity is {capacity}: "
            f"{limits.positions_said}, chunk_size {config.chunk_size}{',' if recent else ' and'} "
            "num_memory "
            f"{config.num_memory}{recent} allow {full} full chunks and {last} tokens behind them; "
            f"cut it with `truncation`, or compress harder (smaller num_memory)"
        )


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError where token ids of any shape hold one that the base has no embedding
    for: a CPU would raise IndexError, CUDA stop the process."""
    if not ids.numel():
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} has no embedding, the base's are 0 .. "
            f"{vocab_size - 1}; "
            f"use the base's own tokenizer, or resize its embeddings"
        )


def check_sample(limits: Limits, sample: Sample) -> None:
    """Raises ValueError if a row and the memories that it reads need more positions than there are:
    for a document in chunks, one past the capacity. The same for a token without an embedding."""
    for ids in (sample.chunks, *(row.input_ids for row in sample.rows)):
        check_ids(ids, limits.vocab_size)
    m, recent = limits.memory.num_memory, limits.memory.recent_tokens
    rows = sample.with_recent(recent).rows
    row = max(rows, key=lambda row: row.num_memories * m + len(row.input_ids))
    needed = row.num_memories * m + len(row.input_ids)
    if needed <= limits.positions:
        return
    if [row.num_memories for row in sample.rows] == list(range(len(sample.rows))):
        check_length(sample.num_tokens, limits)
    raise ValueError(
        f"{row.num_memories} memories of num_memory {m} slots and the {len(row.input_ids)} tokens "
        f"{f'({recent} of them recent_tokens) ' if row.recent else ''}"
        f"that read them need {needed} positions, past {limits.positions_said}; cut the "
        f"document with `truncation`, or compress harder (smaller num_memory)"
    )


def check_teacher(limits: Limits, sample: Sample) -> None:
    """Raises ValueError if a teacher would read past the base's positions, or a token without an
    embedding."""
    for text in sample.teachers:
        check_ids(text, limits.vocab_size)
        if len(text) > limits.positions:
            raise ValueError(
                f"the teacher reads its context raw: {len(text)} tokens, the base has "
                f"{limits.positions} positions; set truncation"
            )
