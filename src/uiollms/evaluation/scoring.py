"""Scores of one sample: the NLL and the training loss of every scored token, in one of several
modes.

    memory    Rows read the memories of the chunks before them. This is the model.
    window    Rows read no memory; each reads its chunk and its recent tokens only. This is the
              frozen base, given the same tokens.
    raw       The base reads the whole raw context, as far as its positions reach. This is what a
              memory without loss would give.
    shuffled  Rows read as many memories, but of another document. The difference to `memory` is
              what the content of memory is worth.

What the same number of slots is worth without any training (see uiollms/alternatives):

    recent    The base reads, before each row, as many raw tokens as the row's memories have
              slots: those directly before it.
    streaming As recent, but the first four of these tokens are the document's first.
    bm25      As recent, but these tokens are passages of the context that resemble the question.
    pooled    Rows read, in place of memories, the keys and values of the raw context, averaged
              over as many groups of tokens as there are slots.

Shapes: T tokens of a document, T' scored tokens, C chunks, l chunk_size, N scored tokens of a
batch of rows, D hidden size, H key/value heads, M memory slots that rows read, K head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from uiollms.alternatives.pooled import pool_context
from uiollms.alternatives.raw_tokens import CHOICES, with_raw_tokens
from uiollms.data.limits import check_sample
from uiollms.data.protocols import protocol_samples
from uiollms.data.sample import Row, Sample, flatten_ids
from uiollms.kernels.devices import device_of, to_device
from uiollms.kernels.indexing import batched
from uiollms.kernels.linear_cross_entropy import linear_losses
from uiollms.model.layers import AnyPrefix
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import (
    decode_scored,
    empty_prefix,
    encode_and_project_all,
    prepare_rows,
    scored_teacher_hidden,
    teacher_hidden,
)
from uiollms.model.state import SharedPrefix, supports_in_place


class Score(NamedTuple):
    """The scores of a document.

    nll:       [T'] float, nats of every scored token
    positions: [T'] int64, index of every scored token in the document
    """

    nll: Tensor
    positions: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL, which may be infinite."""
        return self.nll.double().mean().exp().item()


MODES = ("memory", "window", "raw", "shuffled", "recent", "streaming", "bm25", "pooled")
ScoredRows = tuple[Sequence[Row], Tensor, Tensor]  # rows, hidden states [N, D], targets [N]


def score(
    model: MemoryLM,
    input_ids: Tensor,
    protocol: str = "paper",
    mode: str = "memory",
    other: Tensor | None = None,
) -> Score:
    """NLL per scored token of one document [T] or [1, T].

    protocol: "paper" scores all tokens but the first of every chunk, "document" all but the first
              of the document; data/protocols.py has the others
    mode:     one of MODES, which the module's docstring describes
    other:    the document [T] or [1, T] whose memories mode "shuffled" reads; it must have at
              least as many complete chunks as are read of this one

    Raises ValueError if the document is longer than the capacity (mode "raw": than the base's
    positions), and if protocol or mode are unknown.
    """
    if (other is not None) != (mode == "shuffled"):
        found = "without one" if other is None else f"with mode {mode!r}"
        raise ValueError(f"other is the document that mode 'shuffled' reads, found {found}")
    l = model.memory_config.chunk_size
    nll, positions = [], []
    for sample in protocol_samples(protocol, input_ids, l):
        chunks = None
        if other is not None:
            text = flatten_ids(other)[sample.start :]
            chunks = text[: len(text) // l * l].view(-1, l)
        nll.append(token_losses(model, sample, mode, chunks)[1])
        positions.append(scored_positions(sample))
    return Score(torch.cat(nll), torch.cat(positions))


def scored_positions(sample: Sample) -> Tensor:
    """[T'] int64: the index in its document of every scored token. A row's token predicts the
    token after it. In a copy, whose rows start one token early, it predicts the token at its
    index."""
    ahead = sample.start + (0 if any(row.repeat for row in sample.rows) else 1)
    return torch.cat([row.start + row.scored + ahead for row in sample.rows])


@torch.no_grad()
def token_losses(
    model: MemoryLM, sample: Sample, mode: str = "memory", other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and NLL, [T'] each on the CPU, of the sample's scored tokens. The loss is what training
    sums with weights: with a teacher it includes KL(teacher || student), without one it equals
    the NLL.

    other: the chunks [C, l] of another document, for mode "shuffled"
    """
    return losses_of(model, sample, scored_hidden(model, sample, mode, other))


@torch.no_grad()
def losses_of(
    model: MemoryLM, sample: Sample, batches: Iterable[ScoredRows]
) -> tuple[Tensor, Tensor]:
    """`token_losses` of hidden states that are computed already, in the form that `scored_hidden`
    yields."""
    if not sample.num_scored:
        return torch.empty(0), torch.empty(0)
    teachers = teacher_hidden(model, sample)
    parts = []
    for rows, hidden, targets in batches:
        teacher = scored_teacher_hidden(model, teachers, rows) if teachers else None
        losses = linear_losses(hidden, model.base.lm_head, targets, teacher, sample.kl_weight)
        parts.append(losses)
    # This copy is the only point at which the CPU waits for the device.
    loss, nll = torch.stack([torch.cat(column) for column in zip(*parts, strict=True)]).cpu()
    return loss, nll


@torch.no_grad()
def exact_match(
    model: MemoryLM, sample: Sample, mode: str = "memory", other: Tensor | None = None
) -> bool:
    """Whether every scored token is the likeliest one. This holds exactly if greedy decoding
    generates these tokens."""
    return all_likeliest(model, scored_hidden(model, sample, mode, other))


@torch.no_grad()
def all_likeliest(model: MemoryLM, batches: Iterable[ScoredRows]) -> bool:
    """`exact_match` of hidden states that are computed already, in the form that `scored_hidden`
    yields."""
    return all(
        bool((model.logits(hidden).argmax(-1) == targets).all()) for _, hidden, targets in batches
    )


def scored_hidden(
    model: MemoryLM, sample: Sample, mode: str, other: Tensor | None = None
) -> Iterator[ScoredRows]:
    """Yields batches of the rows that have scored tokens, with the normed hidden states [N, D] at
    their scored positions and the targets [N]. Raises ValueError if the sample is longer than the
    capacity, and if the other document has too few chunks."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; allowed are {', '.join(MODES)}")
    if mode == "raw":
        sample = with_raw_texts(sample)
        rows = [row for row in sample.rows if len(row.scored)]
        targets = torch.cat([row.targets[row.scored] for row in rows])
        hidden = scored_teacher_hidden(model, teacher_hidden(model, sample), rows)
        yield rows, hidden, to_device(targets, hidden.device)
        return
    # The model's recent tokens are read in every mode.
    sample = sample.with_recent(model.memory_config.recent_tokens)
    if mode == "window":
        sample = replace(
            sample,
            chunks=sample.chunks[:0],
            rows=tuple(replace(r, num_memories=0) for r in sample.rows),
        )
    elif mode in CHOICES:
        sample = with_raw_tokens(sample, model.memory_config, mode)
    elif mode == "shuffled":
        if other is None or len(other) < len(sample.chunks):
            raise ValueError(
                f"{len(sample.chunks)} memories are read, the other document has "
                f"{0 if other is None else len(other)}"
            )
        sample = replace(sample, chunks=other[: len(sample.chunks)])
    check_sample(model.limits, sample)
    read_context = pool_context if mode == "pooled" else encode_and_project_all
    keys, values = read_context(model, sample.chunks)
    scored = [t for t, row in enumerate(sample.rows) if len(row.scored)]
    for batch in prepare_rows(model, sample, [*batched(scored, model.chunks_per_batch)]):
        rows = [sample.rows[t] for t in batch.numbers]
        prefix = shared_prefix(model, rows, keys, values)
        yield rows, decode_scored(model, sample, batch, prefix), batch.targets


def with_raw_texts(sample: Sample) -> Sample:
    """The sample with teacher texts: what each row reads if the raw chunks replace its memories. A
    text that is the beginning of another is not stored again. A sample that has teacher texts is
    returned unchanged.

    chunks [0 1] [2 3], rows [0 1] [2 3] [4] that read 0, 1, 2 memories -> one text 0 1 2 3 4, in
    which the rows start at 0, 2, 4
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


def pressed_hidden(model: MemoryLM, sample: Sample, hidden: Tensor) -> Iterator[ScoredRows]:
    """Yields what `scored_hidden` would, for the hidden states [N, D] that a press gave at the
    sample's scored tokens."""
    rows = [row for row in sample.rows if len(row.scored)]
    targets = torch.cat([row.targets[row.scored] for row in rows])
    device = device_of(model.base.lm_head)
    yield rows, to_device(hidden, device), to_device(targets, device)


def longest_text(sample: Sample) -> int:
    """Number of tokens of the longest raw text that mode "raw", or the sample's teacher, reads."""
    return max(len(text) for text in with_raw_texts(sample).teachers)


def shared_prefix(
    model: MemoryLM, rows: Sequence[Row], keys: Sequence[Tensor], values: Sequence[Tensor]
) -> AnyPrefix:
    """The memory of one document, [1, H, M, K] per layer, that all of these rows read."""
    slots = max(row.num_memories for row in rows) * model.memory_config.num_memory
    if slots == 0:
        return empty_prefix(model)
    return SharedPrefix(
        [k[:, :, :slots] for k in keys],
        [v[:, :, :slots] for v in values],
        supports_in_place(model.base),
    )
