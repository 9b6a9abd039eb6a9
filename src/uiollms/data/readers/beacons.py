"""Tokenised samples as Activation Beacon (Zhang et al. 2024) makes them: cut to a number of
tokens, and chosen by it.

To choose them, both files are tokenised once; which documents were chosen is kept in the cache
(see paths.py) for each state of the file, tokenizer and max_length. After that a sample is
tokenised when it is read.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from uiollms.data.documents import Corpus, Document, Lazy, TokenDocument
from uiollms.data.readers.json_lines import state_of
from uiollms.data.tokens import batch_ids, common
from uiollms.files.atomic import atomic_file, make_folder
from uiollms.files.errors import ConfigError
from uiollms.files.folders import cache_dir

SHORTEST = 1200  # tokens
MOST = 200_000  # samples a file
SEED = 42
CHARACTERS = 5  # of a text for each token of max_length; what lies behind them is not tokenised
SEPARATORS = (" ", "\n", "\n\n")
RULES = 2  # of what is chosen, of all above; a choice made by others is not taken from the cache
BATCH = 64  # documents tokenised at once, on all cores
IGNORED = -100

Tokens = tuple[tuple[int, ...], tuple[int, ...]]  # (input_ids [T], labels [T])


def fit(
    prompt: Sequence[int], response: Sequence[int] | None, eos: int | None, max_length: int
) -> Tokens | None:
    """Token ids and labels of a sample of at most max_length tokens, or None if it has fewer
    than 1,200, or a response that leaves no room for a prompt.

    Text: the first max_length tokens, all of them labels. Question answering: the response and
    its EOS are; a prompt that is too long loses its middle, the first half of the room (rounded
    down) keeps its start. max_length 8 (and no lower limit), prompt 1 2 3 4 5 6 7 8 9, response
    20 21, EOS 0 -> ids 1 2 7 8 9 20 21 0, labels -100 -100 -100 -100 -100 20 21 0
    """
    if response is None:
        ids = tuple(prompt[:max_length])
        return (ids, ids) if len(ids) >= SHORTEST else None
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


def separator(number: int) -> str:
    """What stands between input and output of a file's document of that number: one of three at
    random, the same at every reading."""
    return random.Random(f"{SEED} {number}").choice(SEPARATORS)


def tokens_of(
    documents: Corpus, numbers: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[Document, Tokens | None]]:
    """The documents of those numbers, and the samples that they make: a text of its first
    5 * max_length characters, input and output as one text."""
    found = [documents[i] for i in numbers]
    prompts, texts = [], []
    for i, document in zip(numbers, found, strict=True):
        prompt = document.text[: max_length * CHARACTERS]
        if document.response is not None:
            prompt = document.text.strip() + separator(i)
        prompts.append(prompt)
        texts.append(prompt + (document.response or "").strip())
    asked = [n for n, document in enumerate(found) if document.response is not None]
    ids = batch_ids(tokenizer, texts)
    heads = dict(zip(asked, batch_ids(tokenizer, [prompts[n] for n in asked]), strict=True))
    samples = []
    for n, document in enumerate(found):
        count = len(ids[n]) if n not in heads else max(1, common(heads[n], ids[n]))
        response = ids[n][count:] if n in heads else None
        samples.append(
            (document, fit(ids[n][:count], response, tokenizer.eos_token_id, max_length))
        )
    return samples


def sampled(
    documents: Corpus,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    kl_weight: float,
) -> Corpus:
    """The documents of one file (`path`, for the cache) that fit, at most 200,000, in an order
    drawn with seed 42."""
    kept = chosen(documents, path, tokenizer, max_length)

    def read(i: int) -> Document:
        ((document, tokens),) = tokens_of(documents, [kept[i]], tokenizer, max_length)
        if tokens is None:
            raise ConfigError(
                f"{document.source}: has changed since it was chosen; start the run again"
            )
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


def chosen(
    documents: Corpus, path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Sequence[int]:
    """Numbers of the chosen documents, from the cache if they are there."""
    key = f"{state_of(path)} {fingerprint(tokenizer)} {SHORTEST} {max_length} {MOST} {SEED} {RULES}"
    kept = (
        cache_dir() / "beacons" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    )
    if not kept.exists():
        numbers = choose(
            documents, tokenizer, max_length, f"choosing samples of {path.name} (once)"
        )
        make_folder(kept.parent)
        with atomic_file(kept) as work:
            np.save(work, np.asarray(numbers, dtype=np.int64))
    return [int(number) for number in np.load(kept)]


def choose(
    documents: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int, title: str
) -> array[int]:
    order = array("q", range(len(documents)))
    random.Random(SEED).shuffle(order)
    kept = array("q")
    for start in tqdm(
        range(0, len(order), BATCH), desc=title, unit_scale=BATCH, unit="doc", disable=None
    ):
        numbers = order[start : start + BATCH]
        samples = tokens_of(documents, numbers, tokenizer, max_length)
        kept.extend(i for i, (_, tokens) in zip(numbers, samples, strict=True) if tokens)
        if len(kept) >= MOST:
            return kept[:MOST]
    return kept


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells tokenizers apart by what they do, wherever they were loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules} {tokenizer.eos_token_id}".encode()).hexdigest()
