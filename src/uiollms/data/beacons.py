"""Tokenised samples as Activation Beacon (Zhang et al. 2024) makes them: chosen by their length in tokens.

To choose them, both files are tokenised once; which documents were chosen is kept in the cache (see paths.py) for each
state of the file, tokenizer and max_length. After that a sample is tokenised when it is read.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from uiollms.config import ConfigError
from uiollms.data.documents import Corpus, Document, Lazy, TokenDocument
from uiollms.data.files import state_of
from uiollms.paths import cache_dir

SHORTEST = 1200  # tokens
MOST = 200_000  # samples a file
SEED = 42
BATCH = 64  # documents tokenised at once, on all cores
IGNORED = -100

Tokens = tuple[tuple[int, ...], tuple[int, ...]]  # (input_ids [T], labels [T])


def fit(prompt: Sequence[int], response: Sequence[int] | None, eos: int | None, max_length: int) -> Tokens | None:
    """Token ids and labels of a sample, or None if its length is outside 1,200 .. max_length.

    Text: all tokens are labels. Question answering: the response and its EOS are; a prompt that is too long loses its
    middle, the first half of the room (rounded down) keeps its start.
    max_length 8 (and no lower limit), prompt 1 2 3 4 5 6 7 8 9, response 20 21, EOS 0
    -> ids 1 2 7 8 9 20 21 0, labels -100 -100 -100 -100 -100 20 21 0
    """
    if response is None:
        ids = tuple(prompt)
        return (ids, ids) if SHORTEST <= len(ids) <= max_length else None
    if eos is None:
        raise ConfigError("beacons sampled: the tokenizer has no EOS token to end a response with")
    answer = (*response, eos)
    room = max_length - len(answer)
    if room < 1:
        return None
    if len(prompt) > room:
        prompt = (*prompt[: room // 2], *prompt[len(prompt) - (room - room // 2) :])
    ids = (*prompt, *answer)
    return (ids, (IGNORED,) * len(prompt) + answer) if len(ids) >= SHORTEST else None


def tokens_of(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Tokens | None]:
    prompts = tokenizer([document.text for document in documents], verbose=False).input_ids
    answers = [document.response or "" for document in documents]
    responses = tokenizer(answers, add_special_tokens=False, verbose=False).input_ids
    return [
        fit(prompt, None if document.response is None else response, tokenizer.eos_token_id, max_length)
        for document, prompt, response in zip(documents, prompts, responses, strict=True)
    ]


def sampled(documents: Corpus, path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, kl_weight: float) -> Corpus:
    """The documents of one file (`path`, for the cache) that fit, at most 200,000, in an order drawn with seed 42."""
    kept = chosen(documents, path, tokenizer, max_length)

    def read(i: int) -> Document:
        document = documents[kept[i]]
        (tokens,) = tokens_of([document], tokenizer, max_length)
        if tokens is None:
            raise ConfigError(f"{document.source}: has changed since it was chosen; start the run again")
        return TokenDocument(
            document.text,
            document.source,
            document.response,
            task="activation beacons",
            kl_weight=kl_weight,
            input_ids=tokens[0],
            labels=tokens[1],
        )

    return Lazy(len(kept), read)


def chosen(documents: Corpus, path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[int]:
    """Numbers of the chosen documents, from the cache if they are there."""
    key = f"{state_of(path)} {fingerprint(tokenizer)} {SHORTEST} {max_length} {MOST} {SEED}"
    kept = cache_dir() / "beacons" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not kept.exists():
        numbers = choose(documents, tokenizer, max_length, f"choosing samples of {path.name} (once)")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:  # whole or not at all
            np.save(Path(work, "part.npy"), np.asarray(numbers, dtype=np.int64))
            os.replace(Path(work, "part.npy"), kept)
    return [int(number) for number in np.load(kept)]


def choose(documents: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int, title: str) -> array[int]:
    order = array("q", range(len(documents)))
    random.Random(SEED).shuffle(order)
    kept = array("q")
    for start in tqdm(range(0, len(order), BATCH), desc=title, unit_scale=BATCH, unit="doc", disable=None):
        numbers = order[start : start + BATCH]
        tokens = tokens_of([documents[i] for i in numbers], tokenizer, max_length)
        kept.extend(i for i, found in zip(numbers, tokens, strict=True) if found)
        if len(kept) >= MOST:
            return kept[:MOST]
    return kept


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells tokenizers apart by what they do, wherever they were loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules} {tokenizer.eos_token_id}".encode()).hexdigest()
