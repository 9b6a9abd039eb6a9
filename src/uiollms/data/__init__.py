"""Corpora: a name -> documents, read one at a time.

    messages = open_corpus("sotu.train")        # len(messages) == 224, nothing read yet
    messages[0]              # Document(text="Fellow Citizens ...", source="sotu:1790-Washington-1")
    mixture = Mixture([messages, open_corpus("pg19.train.1m")], shares=[0.05, 0.95], seed=0)
    mixture.open(next(mixture))  # Document(...), for ever; state_dict() remembers the place

A corpus is a sequence that knows its length and reads a document only when it is asked for: JSON
lines through an index of byte offsets (12 bytes a document), hub datasets and parquet through
memory-mapped Arrow. `python -m uiollms.data` lists all corpora and says which are ready on this
machine.

What happens to bad data. A document that cannot be what its author meant stops the run, with the
file and the line: a broken or truncated JSON line, bytes that are not UTF-8, a missing field, a
field that is not text. It would otherwise be missing from the training without anybody knowing;
`python -m uiollms.data --check NAME` finds all of them beforehand. A document that is merely
empty (blank text, or blank response) carries nothing to learn: training skips and counts it.
Blank lines are no documents.

Reading order: documents (what a document is, the register of names), corpora_text, corpora_own,
corpora_tasks and corpora_recall (the names),
files, hub and beacons (the readers behind them), mixture.
"""

from transformers import PreTrainedTokenizerBase

from uiollms.data.corpora import (  # noqa: F401  importing them registers their corpora
    facts,
    labelled,
    local,
    text,
)
from uiollms.data.documents import Corpus, Document, NewsDocument, RecallDocument, TokenDocument
from uiollms.data.mixture import Mixture
from uiollms.data.registry import find_corpus
from uiollms.files.errors import ConfigError

__all__ = [
    "Corpus",
    "Document",
    "Mixture",
    "NewsDocument",
    "RecallDocument",
    "TokenDocument",
    "find_corpus",
    "open_corpus",
]


def open_corpus(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """The corpus of that name; spaces and case do not matter. The tokenizer is used by `beacons
    sampled` alone. Raises ConfigError for an unknown name, and for one whose data is not on this
    machine, with how to get it."""
    entry, arguments = find_corpus(name)
    if not entry.tokenized:
        return entry.opener(*arguments)
    if tokenizer is None:
        raise ConfigError(
            f"corpus {name!r} comes tokenised and needs a tokenizer: open_corpus(name, tokenizer)"
        )
    return entry.opener(*arguments, tokenizer=tokenizer)
