"""Build samples of synthetic recall: a chunk states a fact, and a later chunk asks for it.

Shapes: T tokens of a document, N its chunks, l chunk_size.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import torch

from uiollms.data import RecallDocument
from uiollms.data.corpora.facts import FARTHEST
from uiollms.data.sample import IGNORED, Sample
from uiollms.data.tokens import continuation_ids, continuation_pair, plain_ids, prefix_ids

MOST_PIECES = 3 / 4  # of a chunk, for statements and questions; the rest is filler
CHARACTERS = 6  # of filler text per token; if they give too few tokens, the filler is repeated
TOKENS_PER_FACT = 64  # the document without its last chunk gets one fact for so many tokens


class Piece(NamedTuple):
    """The tokens of a statement, or of a question with its value. scored: True for the value's."""

    ids: list[int]
    scored: list[bool]


def recall_sample(
    tokenizer: Any,
    document: RecallDocument,
    chunk_size: int,
    most: int | None,
) -> Sample:
    """Builds a sample of as many whole chunks as `most` tokens allow (None: one more than the
    largest distance).

    One chunk states a fact, and the question follows `document.distance` chunks later (None: a
    random distance from 1 to 8, within the document). Only values are scored; the loss is their
    mean NLL. The document's name determines all positions. Facts that do not fit are left out.
    Raises ValueError if the document has too few chunks.
    """
    farthest = max(document.distance or 1, FARTHEST)
    count = farthest + 1 if most is None else most // chunk_size
    fewest = (document.distance or 1) + 1
    if count < fewest:
        raise ValueError(
            f"a question {fewest - 1} chunks of {chunk_size} tokens after its fact needs "
            f"{fewest * chunk_size} tokens, found truncation {most}; raise it"
        )
    rng = random.Random(document.source)
    pieces = place_pieces(tokenizer, document, count, chunk_size, rng)
    filler = itertools.cycle(plain_ids(tokenizer, document.text[: count * chunk_size * CHARACTERS]))
    ids = prefix_ids(tokenizer)
    labels = [IGNORED] * len(ids)
    for t, inside in enumerate(pieces):
        free = (t + 1) * chunk_size - len(ids) - sum(len(piece.ids) for piece in inside)
        cuts = sorted(rng.randint(0, free) for _ in inside)
        rng.shuffle(inside)
        ends = [Piece([], [])]
        for start, stop, piece in zip([0, *cuts], [*cuts, free], inside + ends, strict=True):
            ids += [*itertools.islice(filler, stop - start), *piece.ids]
            labels += [IGNORED] * (stop - start)
            labels += [i if s else IGNORED for i, s in zip(piece.ids, piece.scored, strict=True)]
    sample = Sample.beacon(torch.tensor(ids), torch.tensor(labels), chunk_size)
    return sample.distilled(document.kl_weight) if document.kl_weight else sample


def place_pieces(
    tokenizer: Any,
    document: RecallDocument,
    count: int,
    chunk_size: int,
    rng: random.Random,
) -> list[list[Piece]]:
    """Chooses the statements and questions of each of `count` chunks."""
    free = [int(MOST_PIECES * chunk_size)] * count
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    line = continuation_ids(tokenizer, "\n")
    num_facts = max(1, (count - 1) * chunk_size // TOKENS_PER_FACT)
    for fact in document.facts[:num_facts]:
        distance = document.distance or rng.randint(1, min(FARTHEST, count - 1))
        stated = rng.randrange(count - distance)
        queried = stated + distance
        statement = continuation_ids(tokenizer, fact.statement)
        pair = continuation_pair(tokenizer, fact.question, fact.value)
        question, value = (part.tolist() for part in pair)
        query = question + value + line
        if len(statement) > free[stated] or len(query) > free[queried]:
            continue
        scored = [False] * len(question) + [True] * len(value) + [False] * len(line)
        pieces[stated].append(Piece(statement, [False] * len(statement)))
        pieces[queried].append(Piece(query, scored))
        free[stated] -= len(statement)
        free[queried] -= len(query)
    return pieces


def last_value(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all tokens before the last scored value, and that value, both [T]."""
    ids = torch.cat([row.input_ids for row in sample.rows])
    positions = torch.cat([row.start + row.scored + 1 for row in sample.rows]).tolist()
    start = stop = positions[-1] + 1
    while start - 1 in positions:
        start -= 1
    return ids[:start], ids[start:stop]
