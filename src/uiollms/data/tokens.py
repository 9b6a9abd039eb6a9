"""Tokenise texts, prompts with responses, and continuations of other text.

Many tokenizers add something at the ends of a text: Llama 2's adds a space before it, most add
BOS, some add EOS. These additions belong to a document and not to a part of one. Therefore a text
is tokenised as a whole and cut afterwards. A document starts with the tokenizer's prefix and ends
with EOS only if its task needs it. A prompt and its response are tokenised as one text. Text that
continues other text is tokenised as it would be after that text.

Shapes: T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Characters of text that are tokenised for each needed token; hardly any token has more.
LONGEST_TOKEN = 16

# Texts after which a continuation is tokenised. A tokenizer may merge one of them with the text
# that follows (two line breaks, two letters), but hardly both.
ANCHORS = ("\n", "a")


def call_tokenizer(tokenizer: Any, text: str | list[str], special_tokens: bool) -> Any:
    """Calls the tokenizer; all of this package's calls are here. `verbose` is off because it warns
    of texts that are longer than the base's positions, for which memory exists."""
    return tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenises a text without special tokens: [T]."""
    return list(call_tokenizer(tokenizer, text, special_tokens=False))


def prefix_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer adds before every text: BOS, or none."""
    whole = list(call_tokenizer(tokenizer, "a", special_tokens=True))
    text = plain_ids(tokenizer, "a")
    starts = range(len(whole) - len(text) + 1)
    start = next((i for i in starts if text and whole[i : i + len(text)] == text), 0)
    return whole[:start]


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenises a document: [T], from BOS, if the tokenizer adds one, to the text's last token."""
    return prefix_ids(tokenizer) + plain_ids(tokenizer, text)


def batch_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenises several documents as `document_ids` does, on all cores."""
    if not texts:
        return []
    first = prefix_ids(tokenizer)
    found = call_tokenizer(tokenizer, list(texts), special_tokens=False)
    return [first + list(ids) for ids in found]


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Tokenises a document as `document_ids` does, into a tensor [T] int64."""
    return torch.tensor(document_ids(tokenizer, text), dtype=torch.int64)


def tokenize_pair(tokenizer: Any, prompt: str, response: str) -> tuple[Tensor, Tensor]:
    """Tokenises a document of a prompt and a response as one text, and returns the tokens of each,
    int64. A token with characters of both belongs to the response, unless it is the document's
    first token, which nothing can predict.

    "Answer: ket" + "tle" -> BOS Answer : | _kettle
    """
    ids = document_ids(tokenizer, prompt + response)
    return split(ids, max(1, common_prefix_length(document_ids(tokenizer, prompt), ids)))


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenises a text that continues another text: [T], without BOS and without an added space."""
    for anchor in ANCHORS:
        before, whole = plain_ids(tokenizer, anchor), plain_ids(tokenizer, anchor + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return plain_ids(tokenizer, text)


def continuation_pair(tokenizer: Any, prompt: str, response: str) -> tuple[Tensor, Tensor]:
    """Tokenises a prompt and a response as `tokenize_pair` does, after another text."""
    ids = continuation_ids(tokenizer, prompt + response)
    return split(ids, common_prefix_length(continuation_ids(tokenizer, prompt), ids))


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of equal tokens with which both sequences begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def split(ids: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    whole = torch.tensor(ids, dtype=torch.int64)
    return whole[:count], whole[count:]
