"""The limits of a model, and checks that documents and samples are within them.

Shapes: T tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from uiollms.config.sections import MemoryConfig
from uiollms.data.sample import Sample


class Limits(NamedTuple):
    """The limits of a model.

    memory: the compressor config; positions: number of positions of the base; positions_text: the
    positions in words, with their origin, for messages; vocab_size: rows of its embedding matrix.
    """

    memory: MemoryConfig
    positions: int
    positions_text: str
    vocab_size: int

    @property
    def capacity(self) -> int:
        """The length of the longest document in tokens."""
        return self.memory.capacity(self.positions)


class Limited(Protocol):
    """The part of a model on which samples depend."""

    @property
    def limits(self) -> Limits: ...


def check_length(num_tokens: int, limits: Limits) -> None:
    """Raises ValueError if a document of `num_tokens` tokens is longer than the capacity."""
    config, capacity = limits.memory, limits.capacity
    if num_tokens > capacity:
        full, last = divmod(capacity, config.chunk_size)
        recent = f" and recent_tokens {config.recent_tokens}" if config.recent_tokens else ""
        raise ValueError(
            f"the document has {num_tokens} tokens, the capacity is {capacity}: "
            f"{limits.positions_text}, chunk_size {config.chunk_size}{',' if recent else ' and'} "
            "num_memory "
            f"{config.num_memory}{recent} allow {full} full chunks and {last} tokens after them; "
            f"cut it with `truncation`, or compress harder (smaller num_memory)"
        )


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError if a token id has no embedding in the base. Otherwise a CPU would raise
    IndexError, and CUDA would abort the process. ids: a tensor of any shape."""
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
    """Raises ValueError if a row and the memories that it reads need more positions than the base
    has, so that a document in chunks exceeds the capacity, or if a token has no embedding."""
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
        f"that read them need {needed} positions, past {limits.positions_text}; cut the "
        f"document with `truncation`, or compress harder (smaller num_memory)"
    )


def check_teacher(limits: Limits, sample: Sample) -> None:
    """Raises ValueError if a teacher's text is longer than the base's number of positions, or
    contains a token without an embedding."""
    for text in sample.teachers:
        check_ids(text, limits.vocab_size)
        if len(text) > limits.positions:
            raise ValueError(
                f"the teacher reads its context raw: {len(text)} tokens, the base has "
                f"{limits.positions} positions; set truncation"
            )
