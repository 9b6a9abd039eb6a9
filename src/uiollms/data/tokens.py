"""Text -> token ids, the same everywhere: whole texts are read as one and cut afterwards.

Many tokenizers do something at the ends of whatever they are given: Llama 2's puts a space in
front, most begin with BOS, some end with EOS. All that belongs to a document, not to a piece of
one. So a document starts with what the tokenizer writes in front of a text; nothing ends with
EOS unless its task says so; a prompt and its response are tokenised as one text; and what goes
on from other text is tokenised as it stands there.

Shapes: T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LONGEST_TOKEN = 16  # characters of a text read a token, where a number of tokens is to be filled

# Text that others are tokenised behind. A tokenizer may join one of them to what follows (two line
# breaks, two letters), hardly both.
ANCHORS = ("\n", "a")


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """[T], with nothing in front or behind; the warning about length is off: memory is there for
    that."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def first_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer writes in front of every text: BOS, or nothing."""
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    text = plain_ids(tokenizer, "a")
    places = range(len(whole) - len(text) + 1)
    start = next((i for i in places if text and whole[i : i + len(text)] == text), 0)
    return whole[:start]


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """[T], from BOS, if the tokenizer writes one, to the text's last token."""
    return first_ids(tokenizer) + plain_ids(tokenizer, text)


def batch_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`document_ids` of several documents, tokenised on all cores."""
    if not texts:
        return []
    first = first_ids(tokenizer)
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [first + list(ids) for ids in found]


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """`document_ids` as a tensor [T] int64."""
    return torch.tensor(document_ids(tokenizer, text), dtype=torch.int64)


def tokenize_pair(tokenizer: Any, prompt: str, response: str) -> tuple[Tensor, Tensor]:
    """A document of a prompt and the response right behind it, tokenised as one -> the tokens of
    each, int64. A token that holds characters of both is the response's, but for the document's
    first, which nothing could predict.

    "Answer: ket" + "tle" -> BOS Answer : | _kettle
    """
    ids = document_ids(tokenizer, prompt + response)
    return split(ids, max(1, common(document_ids(tokenizer, prompt), ids)))


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """[T] token ids of a text that goes on from another: no BOS, no space that it does not have."""
    for anchor in ANCHORS:
        before, whole = plain_ids(tokenizer, anchor), plain_ids(tokenizer, anchor + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return plain_ids(tokenizer, text)


def continued_pair(tokenizer: Any, prompt: str, response: str) -> tuple[Tensor, Tensor]:
    """As `tokenize_pair`, for a prompt that goes on from another text."""
    ids = continuation_ids(tokenizer, prompt + response)
    return split(ids, common(continuation_ids(tokenizer, prompt), ids))


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def split(ids: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    whole = torch.tensor(ids, dtype=torch.int64)
    return whole[:count], whole[count:]
