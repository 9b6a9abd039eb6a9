"""The register of corpora by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from uiollms.data.documents import Corpus
from uiollms.files.errors import ConfigError

SIZE = r"(?:\.([1-9]\d*[km]))?"  # the optional argument of a corpus name that `cut` understands


class Source(Protocol):
    """Something a corpus is read from: a raw_data file, a hub dataset, a Python package."""

    @property
    def name(self) -> str: ...

    def missing(self) -> str | None:
        """What is not on this machine and how to get it, in one line; None if it is there."""


@dataclass(frozen=True)
class NamedCorpus:
    """An entry of the register. usage: the name as people write it, {a,b} one of, [.x] optional;
    pattern: of the name in lower case without spaces, its groups are the opener's arguments;
    tokenized: the opener also takes a tokenizer, and its first argument is how many tokens a
    document has at most. mixed: not all documents are of kind `task`; needs: sources of all that
    the name may stand for; reads: of the same arguments, those that the opener reads; taught: of
    the same arguments, the most tokens that a teacher reads raw (0: none does, or it depends on
    the truncation alone); chunks: of the same arguments, the fewest chunks that a document
    needs, and how many it has without a truncation (0, 0: any); version: of the same arguments,
    which of several states of the corpus this machine has, for results (None: there is one)."""

    usage: str
    pattern: re.Pattern[str]
    task: str
    needs: tuple[Source, ...]
    tokenized: bool
    opener: Callable[..., Corpus]
    mixed: bool
    reads: Callable[..., Sequence[Source]]
    taught: Callable[..., int]
    chunks: Callable[..., tuple[int, int]]
    version: Callable[..., str | None]


REGISTER: list[NamedCorpus] = []
Opener = Callable[..., Corpus]


def corpus(
    usage: str,
    pattern: str,
    task: str = "language modeling",
    needs: Sequence[Source] = (),
    tokenized: bool = False,
    mixed: bool = False,
    reads: Callable[..., Sequence[Source]] | None = None,
    taught: Callable[..., int] = lambda *arguments: 0,
    chunks: Callable[..., tuple[int, int]] = lambda *arguments: (0, 0),
    version: Callable[..., str | None] = lambda *arguments: None,
) -> Callable[[Opener], Opener]:
    """Register the decorated opener under a name, see NamedCorpus."""

    def register(opener: Opener) -> Opener:
        found = NamedCorpus(
            usage=usage,
            pattern=re.compile(pattern),
            task=task,
            needs=tuple(needs),
            tokenized=tokenized,
            opener=opener,
            mixed=mixed,
            reads=reads or (lambda *arguments: needs),
            taught=taught,
            chunks=chunks,
            version=version,
        )
        REGISTER.append(found)
        return opener

    return register


def find_corpus(name: str) -> tuple[NamedCorpus, tuple[str | None, ...]]:
    """The entry of that name and the arguments in it; case and spaces do not matter (in a
    `files:` pattern they do). Opens nothing, so it also checks a config's names in no time.
    Raises ConfigError for an unknown name, with the nearest known one.

    "RedPajama book sample.train.1M" -> (entry of redpajama book sample, ("1m",))
    """
    head, colon, tail = name.partition(":")
    key = re.sub(r"\s", "", head).lower() + colon + (tail.strip() if colon else "")
    for entry in REGISTER:
        if match := entry.pattern.fullmatch(key):
            return entry, match.groups()
    usages = [entry.usage for entry in REGISTER]
    heads = {re.sub(r"\s", "", re.split(r"[.\[{:]", usage)[0]): usage for usage in reversed(usages)}
    near = difflib.get_close_matches(key.split(".")[0], heads, n=1, cutoff=0.5)
    hint = f"did you mean {heads[near[0]]}?" if near else f"known: {', '.join(usages)}"
    raise ConfigError(f"corpus {name!r} is unknown; {hint}")
