"""Alternatives that read some raw tokens of the context in place of its memories: the last ones,
the first and the last ones, or passages that resemble the question. Positions are contiguous, as if
the chosen tokens were the whole context.

Shapes: T tokens of a context, n slots, which is how many tokens are chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from uiollms.config.sections import MemoryConfig
from uiollms.data.sample import IGNORED, Row, Sample

NUM_SINKS = 4  # first tokens of a document, which StreamingLLM always keeps
PASSAGE = 64  # tokens
QUESTION = 32  # tokens at most, those directly before the first scored one


def recent_tokens(context: Tensor, slots: int, question: Tensor) -> Tensor:
    """Returns the last n tokens of a context [T]."""
    return context[max(0, len(context) - slots) :]


def sinks_and_recent(context: Tensor, slots: int, question: Tensor) -> Tensor:
    """Returns the first NUM_SINKS tokens of a context [T], then its last ones, together n tokens
    (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453).

    T 10, n 6 -> tokens 0 1 2 3 8 9
    """
    if len(context) <= slots:
        return context
    sinks = min(NUM_SINKS, slots)
    return torch.cat([context[:sinks], context[len(context) - (slots - sinks) :]])


def best_passages(context: Tensor, slots: int, question: Tensor) -> Tensor:
    """Returns n tokens of a context [T]: the passages of PASSAGE tokens that have the highest BM25
    scores for the question [Q], in their order in the context. The last one that is chosen loses
    its end, so that all have n tokens. Terms are token ids; passages of equal score are chosen from
    the context's start on.

    PASSAGE 4, n 6, passages a b c, scores 0.1 0.5 0.3 -> all of b, then 2 tokens of c
    """
    if len(context) <= slots:
        return context
    passages = context.split(PASSAGE)
    scores = bm25_scores(list(passages), question)
    left, chosen = slots, {}
    for number in scores.argsort(descending=True, stable=True).tolist():
        chosen[number] = passages[number][:left]
        left -= len(chosen[number])
        if not left:
            break
    return torch.cat([chosen[number] for number in sorted(chosen)])


def bm25_scores(passages: list[Tensor], question: Tensor) -> Tensor:
    """Returns the score [number of passages] float32 of each passage for the question, both given
    as token ids (BM25 in Lucene's form, k1 1.5, b 0.75, of the package bm25s)."""
    import bm25s  # half a second, which only this mode needs

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index
    retriever = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    terms = [[str(token) for token in passage.tolist()] for passage in passages]
    retriever.index(terms, show_progress=False)
    return torch.from_numpy(retriever.get_scores([str(token) for token in question.tolist()]))


# mode -> which n tokens of a context a row reads, given the context [T], n and the question [Q]
CHOICES: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "recent": recent_tokens,
    "streaming": sinks_and_recent,
    "bm25": best_passages,
}


def context_of(sample: Sample, row: Row) -> Tensor:
    """Returns the tokens [T] of the chunks whose memories a row reads. Without the row's recent
    tokens, which the row itself contains."""
    context = sample.chunks[row.memories.start : row.memories.stop].flatten()
    return context[: len(context) - row.recent]


def question_of(context: Tensor, row: Row) -> Tensor:
    """Returns the tokens before the row's first scored token, at most QUESTION of them. They may
    begin in the context [T]."""
    stop = int(row.scored[0]) + 1 if len(row.scored) else len(row.input_ids)
    return torch.cat([context, row.input_ids[:stop]])[-QUESTION:]


def with_raw_tokens(sample: Sample, memory: MemoryConfig, mode: str) -> Sample:
    """Returns the sample without memories. Each row starts with raw tokens of its context, as many
    as its memories have slots, or all where the context has fewer; `mode` is one of CHOICES. They
    are not scored. Raises ValueError for a copy, which is generated from memory alone.

    recent, 2 slots per chunk of 4, ids 0..9 -> the rows are
    [0 1 2 3] | [2 3 4 5 6 7] | [4 5 6 7 8 9]
    """
    rows = []
    for row in sample.rows:
        if row.repeat:
            raise ValueError(f"mode {mode!r}: a copy is generated from memory alone")
        context = context_of(sample, row)
        slots = row.num_memories * memory.num_memory
        before = CHOICES[mode](context, slots, question_of(context, row))
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
