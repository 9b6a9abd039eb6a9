"""Corpora: sequences of documents that are opened by name and read one document at a time.

    messages = open_corpus("sotu.train")        # len(messages) == 224, nothing read yet
    messages[0]              # Document(text="Fellow Citizens ...", source="sotu:1790-Washington-1")
    mixture = Mixture([messages, open_corpus("pg19.train.1m")], shares=[0.05, 0.95], seed=0)
    mixture.open(next(mixture))  # an endless stream; state_dict() contains its position

A corpus has a length and reads a document only when it is accessed. JSON lines are read through an
index of byte offsets (12 bytes per document), hub datasets and parquet files through memory-mapped
Arrow. `uiollms data` lists all corpora and shows which ones are ready on this machine.

Faulty data stops the run with the file and the line: a broken or truncated JSON line, bytes that
are not UTF-8, a missing field, or a field that is not text. Otherwise the document would silently
be missing from the training. `uiollms data --check NAME` finds all such faults
beforehand. An empty document (blank text or a blank response) teaches nothing; training skips and
counts it. Blank lines are not documents.

Reading order: documents, registry (the names), corpora/ (the openers), readers/ (the file
formats), mixture, sample, builder, stream.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from uiollms.data.corpora import (  # noqa: F401  importing them registers their corpora
    benchmarks,
    facts,
    hub,
    labelled,
    local,
    questions,
    text,
)
from uiollms.data.documents import (
    ChatDocument,
    Corpus,
    Document,
    NewsDocument,
    QuestionDocument,
    RecallDocument,
    TokenDocument,
)
from uiollms.data.mixture import Mixture
from uiollms.data.registry import find_corpus
from uiollms.files.errors import ConfigError

__all__ = [
    "ChatDocument",
    "Corpus",
    "Document",
    "Mixture",
    "NewsDocument",
    "QuestionDocument",
    "RecallDocument",
    "TokenDocument",
    "find_corpus",
    "open_corpus",
]


def open_corpus(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: Mapping[str, Any] | None = None,
) -> Corpus:
    """Opens the corpus of a name; spaces and case do not matter. Only `beacons sampled` uses the
    tokenizer. options: those of a plugin, `plugin:NAME`. Raises ConfigError for an unknown name,
    and for data that is not on this machine; the message describes how to get it."""
    entry, arguments = find_corpus(name, options)
    if not entry.needs_tokenizer:
        return entry.opener(*arguments)
    if tokenizer is None:
        raise ConfigError(f"corpus {name!r} needs a tokenizer: open_corpus(name, tokenizer)")
    return entry.opener(*arguments, tokenizer=tokenizer)
