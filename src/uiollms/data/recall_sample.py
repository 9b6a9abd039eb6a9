"""A text and facts -> a sample that states each fact in a chunk and asks for it some chunks later.

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
from uiollms.data.tokens import continuation_ids, continued_pair, first_ids, plain_ids

ROOM = 3 / 4  # of a chunk that statements and questions take at most, the rest is filler
CHARACTERS = 6  # of filler read a token; where a tokenizer makes fewer of them it begins again
TOKENS_PER_FACT = 64  # of the document but its last chunk: so many facts are hidden


class Piece(NamedTuple):
    """Tokens of a statement or a question with its value; scored: which of them, the value's."""

    ids: list[int]
    scored: list[bool]


def recall_sample(
    tokenizer: Any,
    document: RecallDocument,
    chunk_size: int,
    most: int | None,
) -> Sample:
    """As many whole chunks as `most` tokens allow (None: FARTHEST + 1). Each fact is stated in one
    chunk and asked for `document.distance` chunks later (None: drawn for each from 1 to 8, as far
    as there are chunks); only values are scored, and the loss is their mean NLL. Where each stands
    is drawn from the document's name. Facts that do not fit are left out. Raises ValueError where
    the document has too few chunks."""
    count = FARTHEST + 1 if most is None else most // chunk_size
    fewest = (document.distance or 1) + 1
    if count < fewest:
        raise ValueError(
            f"asks {fewest - 1} chunks of {chunk_size} tokens later and needs {fewest * chunk_size}"
            f" tokens, found truncation {most}; raise it"
        )
    rng = random.Random(document.source)
    pieces = placed(tokenizer, document, count, chunk_size, rng)
    filler = itertools.cycle(plain_ids(tokenizer, document.text[: count * chunk_size * CHARACTERS]))
    ids = first_ids(tokenizer)
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


def placed(
    tokenizer: Any,
    document: RecallDocument,
    count: int,
    chunk_size: int,
    rng: random.Random,
) -> list[list[Piece]]:
    """What each of `count` chunks states and asks."""
    rooms = [int(ROOM * chunk_size)] * count
    pieces: list[list[Piece]] = [[] for _ in rooms]
    line = continuation_ids(tokenizer, "\n")
    wanted = max(1, (count - 1) * chunk_size // TOKENS_PER_FACT)
    for fact in document.facts[:wanted]:
        distance = document.distance or rng.randint(1, min(FARTHEST, count - 1))
        told = rng.randrange(count - distance)
        asked = told + distance
        statement = continuation_ids(tokenizer, fact.statement)
        pair = continued_pair(tokenizer, fact.question, fact.value)
        question, value = (part.tolist() for part in pair)
        asking = question + value + line
        if len(statement) > rooms[told] or len(asking) > rooms[asked]:
            continue
        scored = [False] * len(question) + [True] * len(value) + [False] * len(line)
        pieces[told].append(Piece(statement, [False] * len(statement)))
        pieces[asked].append(Piece(asking, scored))
        rooms[told] -= len(statement)
        rooms[asked] -= len(asking)
    return pieces


def last_value(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """(all tokens in front of the last value that is asked for, the value), both [T]."""
    ids = torch.cat([row.input_ids for row in sample.rows])
    places = torch.cat([row.start + row.scored + 1 for row in sample.rows]).tolist()
    start = stop = places[-1] + 1
    while start - 1 in places:
        start -= 1
    return ids[:start], ids[start:stop]
