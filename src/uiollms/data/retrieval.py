"""Passkey and needle trials: a sentence hidden at a chosen depth of a long text, and a question
about it at the end.

Shapes: T tokens of a trial.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.data import Document
from uiollms.data.sample import IGNORED, Sample
from uiollms.data.tokens import (
    LONGEST_TOKEN,
    continuation_ids,
    continued_pair,
    first_ids,
    plain_ids,
)
from uiollms.files.errors import ConfigError

# task_type -> the sentence that is hidden, the question; both end where the answer belongs.
FORMS = {
    "passkey": (
        "\nTake note: the secret number of this text is{answer}.\n",
        "\nQuestion: What is the secret number of this text?\nAnswer: The secret number of this "
        "text is",
    ),
    "needle": (
        "\nThe gardener of the old mill hides a{answer} under the stairs.\n",
        "\nQuestion: What does the gardener of the old mill hide under the stairs?\nAnswer: Under "
        "the stairs is a",
    ),
}
WORDS = """
    kettle violin lantern compass hammer mirror basket ladder pillow drum bottle clock rope
    feather candle spoon button letter
    blanket shovel
""".split()
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Trial(NamedTuple):
    """sample: the trial in chunks, scored at the answer; depth: the share of the filler in front
    of the sentence; place: where the sentence begins, in tokens."""

    sample: Sample
    depth: float
    place: int


def trials(
    task_type: str,
    filler: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    chunk_size: int,
    count: int,
    depths: Sequence[float] = DEPTHS,
) -> list[Trial]:
    """`count` trials of `length` tokens at every depth, depth after depth, the same at every
    call. Trial i has the same filler (from document i on) and the same answer, which no other
    has (while words last), at all depths: only the place differs. Raises ConfigError where
    `length` has no room for sentence, question, answer and more than a chunk in all.

    length 12, filler a b c ..., sentence N N, question Q Q, answer A, depth 0.5 -> a b c d N N e
    f g Q Q A, scored at A (7 tokens of filler, of which round(0.5 * 7) = 4 stand in front; a BOS
    stands in front of all)

    The filler is tokenised as one text, sentence and question as they stand behind other text.
    """
    rng = random.Random(0)
    answers = [f" {key}" for key in rng.sample(range(10_000, 100_000), count)]
    if task_type == "needle":
        words = rng.sample(WORDS, len(WORDS))
        answers = [f" {words[i % len(words)]}" for i in range(count)]
    hidden, asked = FORMS[task_type]
    first = torch.tensor(first_ids(tokenizer), dtype=torch.int64)  # BOS, if the tokenizer has one
    prepared = []
    for i, answer in enumerate(answers):
        sentence = torch.tensor(continuation_ids(tokenizer, hidden.format(answer=answer)))
        question, reply = continued_pair(tokenizer, asked, answer)
        room = length - len(first) - len(sentence) - len(question) - len(reply)
        if room < 1 or length <= chunk_size:
            needed = max(length - room + 1, chunk_size + 1)
            raise ConfigError(
                f"{task_type}: a trial of {length} tokens is too short, truncation must be at "
                f"least {needed}"
            )
        prepared.append((filler_tokens(filler, i, tokenizer, room), sentence, question, reply))

    found = []
    for depth in depths:
        for i, (text, sentence, question, reply) in enumerate(prepared):
            place = round(depth * len(text))
            if place == 0:  # the document begins with the sentence, and the filler goes on from it
                sentence = torch.tensor(plain_ids(tokenizer, hidden.format(answer=answers[i])))
                room = length - sum(map(len, (first, sentence, question, reply)))
                text = filler_tokens(filler, i, tokenizer, room, continuation_ids)
            ids = torch.cat([first, text[:place], sentence, text[place:], question, reply])
            labels = ids.clone()
            labels[: -len(reply)] = IGNORED
            found.append(Trial(Sample.beacon(ids, labels, chunk_size), depth, len(first) + place))
    return found


def filler_tokens(
    filler: Sequence[Document],
    start: int,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    read: Callable[[PreTrainedTokenizerBase, str], list[int]] = plain_ids,
) -> Tensor:
    """`length` tokens of text from document number `start` (counted round) on; short documents are
    joined, a line each, and tokenised as one, by `read`. Raises ConfigError if all are blank."""
    texts: list[str] = []
    blank, size, enough = 0, 0, length  # size: characters; enough: how many to try with
    for i in itertools.count(start):
        if blank == len(filler):
            raise ConfigError(
                f"passkey and needle need filler text, the corpus has {len(filler)} documents, all "
                "of them blank"
            )
        text = filler[i % len(filler)].text.strip()[: length * LONGEST_TOKEN]
        blank = 0 if text else blank + 1
        texts += [text] if text else []
        size += len(text)
        if size >= enough:
            ids = read(tokenizer, "\n".join(texts))
            if len(ids) >= length:
                break
            enough = 2 * size
    return torch.tensor(ids[:length], dtype=torch.int64)
