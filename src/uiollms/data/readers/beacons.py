"""Tokenised samples as Activation Beacon (Zhang et al. 2024) makes them: documents are chosen by
their number of tokens and cut to a maximum.

The choice tokenises both files once. The numbers of the chosen documents are stored in the cache
folder (files/folders.py) for each state of the file, tokenizer and max_length. Later a sample is
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

from uiollms.data.documents import Corpus, Document, LazyCorpus, TokenDocument
from uiollms.data.readers.json_lines import file_state
from uiollms.data.tokens import batch_ids, common_prefix_length
from uiollms.files.atomic import atomic_file, make_folder
from uiollms.files.errors import ConfigError
from uiollms.files.folders import cache_dir

SHORTEST = 1200  # tokens
MOST = 200_000  # samples per file
SEED = 42
CHARACTERS = 5  # of a text per token of max_length; the text after them is not tokenised
SEPARATORS = (" ", "\n", "\n\n")
RULES = 2  # version of the rules above; choices under other versions are not used from the cache
BATCH = 64  # documents tokenised at once, on all cores
IGNORED = -100

Tokens = tuple[tuple[int, ...], tuple[int, ...]]  # (input_ids [T], labels [T])


def fit_tokens(
    prompt: Sequence[int], response: Sequence[int] | None, eos: int | None, max_length: int
) -> Tokens | None:
    """Builds the token ids and labels of a sample of at most max_length tokens. Returns None if it
    has fewer than 1,200 tokens, or if the response leaves no tokens for the prompt.

    Plain text keeps its first max_length tokens, all of which are labels. In question answering
    only the response and its EOS are labels. A prompt that is too long loses its middle; half of
    the remaining tokens (rounded down) are from its start.

    max_length 8 (without the lower limit), prompt 1 2 3 4 5 6 7 8 9, response 20 21, EOS 0
    -> ids 1 2 7 8 9 20 21 0, labels -100 -100 -100 -100 -100 20 21 0
    """
    if response is None:
        ids = tuple(prompt[:max_length])
        return (ids, ids) if len(ids) >= SHORTEST else None
    if eos is None:
        raise ConfigError("beacons sampled: the tokenizer has no EOS token to end a response with")
    answer = (*response, eos)
    length = max_length - len(answer)  # of the prompt
    if length < 1:
        return None
    if len(prompt) > length:
        prompt = (*prompt[: length // 2], *prompt[len(prompt) - (length - length // 2) :])
    ids = (*prompt, *answer)
    return (ids, (IGNORED,) * len(prompt) + answer) if len(ids) >= SHORTEST else None


def separator(number: int) -> str:
    """The text between input and output of a document: one of three, which the document's number
    determines."""
    return random.Random(f"{SEED} {number}").choice(SEPARATORS)


def tokenize_documents(
    documents: Corpus, numbers: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[Document, Tokens | None]]:
    """Returns the documents with the given numbers, and the sample of each. Plain text is tokenised
    up to 5 * max_length characters, input and output as one text."""
    found = [documents[i] for i in numbers]
    prompts, texts = [], []
    for i, document in zip(numbers, found, strict=True):
        prompt = document.text[: max_length * CHARACTERS]
        if document.response is not None:
            prompt = document.text.strip() + separator(i)
        prompts.append(prompt)
        texts.append(prompt + (document.response or "").strip())
    answered = [n for n, document in enumerate(found) if document.response is not None]
    ids = batch_ids(tokenizer, texts)
    heads = dict(zip(answered, batch_ids(tokenizer, [prompts[n] for n in answered]), strict=True))
    samples = []
    for n, document in enumerate(found):
        count = len(ids[n]) if n not in heads else max(1, common_prefix_length(heads[n], ids[n]))
        response = ids[n][count:] if n in heads else None
        samples.append(
            (document, fit_tokens(ids[n][:count], response, tokenizer.eos_token_id, max_length))
        )
    return samples


def sampled_corpus(
    documents: Corpus,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    kl_weight: float,
) -> Corpus:
    """The suitable documents of one file, at most 200,000, in a random order of seed 42. `path` is
    the file, for the cache."""
    kept = load_choice(documents, path, tokenizer, max_length)

    def read(i: int) -> Document:
        ((document, tokens),) = tokenize_documents(documents, [kept[i]], tokenizer, max_length)
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

    return LazyCorpus(len(kept), read)


def load_choice(
    documents: Corpus, path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Sequence[int]:
    """Returns the numbers of the chosen documents, from the cache if it contains them."""
    state = f"{file_state(path)} {tokenizer_fingerprint(tokenizer)}"
    key = f"{state} {SHORTEST} {max_length} {MOST} {SEED} {RULES}"
    kept = (
        cache_dir() / "beacons" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    )
    if not kept.exists():
        numbers = choose_documents(
            documents, tokenizer, max_length, f"choosing samples of {path.name} (once)"
        )
        make_folder(kept.parent)
        with atomic_file(kept) as work:
            np.save(work, np.asarray(numbers, dtype=np.int64))
    return [int(number) for number in np.load(kept)]


def choose_documents(
    documents: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int, title: str
) -> array[int]:
    order = array("q", range(len(documents)))
    random.Random(SEED).shuffle(order)
    kept = array("q")
    for start in tqdm(
        range(0, len(order), BATCH), desc=title, unit_scale=BATCH, unit="doc", disable=None
    ):
        numbers = order[start : start + BATCH]
        samples = tokenize_documents(documents, numbers, tokenizer, max_length)
        kept.extend(i for i, (_, tokens) in zip(numbers, samples, strict=True) if tokens)
        if len(kept) >= MOST:
            return kept[:MOST]
    return kept


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokenizer's rules, independent of where it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules} {tokenizer.eos_token_id}".encode()).hexdigest()
