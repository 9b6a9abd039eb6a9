"""Passkey and needle trials: a sentence is hidden at some depth of a long text, and a question
follows at the end.

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
    continuation_pair,
    plain_ids,
    prefix_ids,
)
from uiollms.files.errors import ConfigError

# task_type -> the hidden sentence and the question, after which the answer follows.
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
    """sample: the trial in chunks, of which the answer is scored; depth: fraction of the filler
    before the sentence; position: index of the sentence's first token."""

    sample: Sample
    depth: float
    position: int


def make_trials(
    task_type: str,
    filler: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    chunk_size: int,
    count: int,
    depths: Sequence[float] = DEPTHS,
) -> list[Trial]:
    """Builds `count` trials of `length` tokens for each depth, in the order of the depths. Every
    call returns the same trials.

    Trial i has the same filler (from document i on) and the same answer at all depths; only the
    position differs. Answers differ between trials as long as there are enough words. Raises
    ConfigError if `length` is too short for sentence, question and answer, or at most one chunk.

    length 12, filler a b c ..., sentence N N, question Q Q, answer A, depth 0.5 -> a b c d N N e
    f g Q Q A, scored at A (7 tokens of filler, round(0.5 * 7) = 4 of them before the sentence;
    BOS, if there is one, comes first)

    The filler is tokenised as one text; sentence and question as continuations of other text.
    """
    rng = random.Random(0)
    answers = [f" {key}" for key in rng.sample(range(10_000, 100_000), count)]
    if task_type == "needle":
        words = rng.sample(WORDS, len(WORDS))
        answers = [f" {words[i % len(words)]}" for i in range(count)]
    hidden, question_text = FORMS[task_type]
    first = torch.tensor(prefix_ids(tokenizer), dtype=torch.int64)  # BOS or nothing
    prepared = []
    for i, answer in enumerate(answers):
        sentence = torch.tensor(continuation_ids(tokenizer, hidden.format(answer=answer)))
        question, reply = continuation_pair(tokenizer, question_text, answer)
        filler_length = length - len(first) - len(sentence) - len(question) - len(reply)
        if filler_length < 1 or length <= chunk_size:
            needed = max(length - filler_length + 1, chunk_size + 1)
            raise ConfigError(
                f"{task_type}: a trial of {length} tokens is too short, truncation must be at "
                f"least {needed}"
            )
        prepared.append(
            (filler_tokens(filler, i, tokenizer, filler_length), sentence, question, reply)
        )

    found = []
    for depth in depths:
        for i, (text, sentence, question, reply) in enumerate(prepared):
            start = round(depth * len(text))
            if start == 0:  # the document begins with the sentence, and the filler continues it
                sentence = torch.tensor(plain_ids(tokenizer, hidden.format(answer=answers[i])))
                filler_length = length - sum(map(len, (first, sentence, question, reply)))
                text = filler_tokens(filler, i, tokenizer, filler_length, continuation_ids)
            ids = torch.cat([first, text[:start], sentence, text[start:], question, reply])
            labels = ids.clone()
            labels[: -len(reply)] = IGNORED
            found.append(Trial(Sample.beacon(ids, labels, chunk_size), depth, len(first) + start))
    return found


def filler_tokens(
    filler: Sequence[Document],
    start: int,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    read: Callable[[PreTrainedTokenizerBase, str], list[int]] = plain_ids,
) -> Tensor:
    """Returns `length` tokens of text from document number `start` on; after the last document
    comes the first. Short documents are joined by line breaks and tokenised by `read` as one text.
    Raises ConfigError if all documents are blank."""
    texts: list[str] = []
    # size: characters so far; next_try: characters at which they are tokenised
    blank, size, next_try = 0, 0, length
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
        if size >= next_try:
            ids = read(tokenizer, "\n".join(texts))
            if len(ids) >= length:
                break
            next_try = 2 * size
    return torch.tensor(ids[:length], dtype=torch.int64)
