"""The register of corpora by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from uiollms.data.documents import Corpus
from uiollms.files.errors import ConfigError
from uiollms.plugins import CorpusPlugin, find_plugin, is_plugin, make_plugin

SIZE = r"(?:\.([1-9]\d*[km]))?"  # the optional argument of a corpus name that `cut_texts` takes


class Source(Protocol):
    """What a corpus is read from: a raw_data file, a hub dataset or a Python package."""

    @property
    def name(self) -> str: ...

    def missing(self) -> str | None:
        """Describes in one line what is missing on this machine and how to get it. Returns None if
        nothing is missing."""


@dataclass(frozen=True)
class NamedCorpus:
    """An entry of the register of corpora.

    usage: the name as users write it; {a,b} lists alternatives, [.x] is optional.
    pattern: matches the name in lower case without spaces; its groups are the arguments of the
        opener and of the callables below.
    task: the task of the corpus's documents; with `mixed_tasks` some have other tasks.
    sources: everything that the name can be read from.
    needs_tokenizer: whether the opener also takes a tokenizer. Its first argument is then the
        largest number of tokens of a document.
    sources_read: returns those sources that the opener reads.
    teacher_tokens: returns the largest number of tokens that a teacher reads raw; 0 if there is no
        teacher, or if only the truncation limits its tokens.
    chunk_range: returns the smallest number of chunks that a document needs, and the number that
        it has without a truncation; (0, 0) if there is no such limit.
    version: returns the version of the corpus on this machine, which results record; None if the
        corpus never changes.
    has_messages: returns whether there are conversations among the documents, for which the
        tokenizer needs a chat template. It may read the first documents.
    """

    usage: str
    pattern: re.Pattern[str]
    task: str
    sources: tuple[Source, ...]
    needs_tokenizer: bool
    opener: Callable[..., Corpus]
    mixed_tasks: bool
    sources_read: Callable[..., Sequence[Source]]
    teacher_tokens: Callable[..., int]
    chunk_range: Callable[..., tuple[int, int]]
    version: Callable[..., str | None]
    has_messages: Callable[..., bool]


REGISTER: list[NamedCorpus] = []
Opener = Callable[..., Corpus]


def register_corpus(
    usage: str,
    pattern: str,
    task: str = "language modeling",
    sources: Sequence[Source] = (),
    needs_tokenizer: bool = False,
    mixed_tasks: bool = False,
    sources_read: Callable[..., Sequence[Source]] | None = None,
    teacher_tokens: Callable[..., int] = lambda *arguments: 0,
    chunk_range: Callable[..., tuple[int, int]] = lambda *arguments: (0, 0),
    version: Callable[..., str | None] = lambda *arguments: None,
    has_messages: Callable[..., bool] = lambda *arguments: False,
) -> Callable[[Opener], Opener]:
    """Returns a decorator that registers an opener; `NamedCorpus` describes the arguments."""

    def register(opener: Opener) -> Opener:
        found = NamedCorpus(
            usage=usage,
            pattern=re.compile(pattern),
            task=task,
            sources=tuple(sources),
            needs_tokenizer=needs_tokenizer,
            opener=opener,
            mixed_tasks=mixed_tasks,
            sources_read=sources_read or (lambda *arguments: sources),
            teacher_tokens=teacher_tokens,
            chunk_range=chunk_range,
            version=version,
            has_messages=has_messages,
        )
        REGISTER.append(found)
        return opener

    return register


def find_corpus(
    name: str, options: Mapping[str, Any] | None = None
) -> tuple[NamedCorpus, tuple[str | None, ...]]:
    """Finds the entry for a name, and the arguments that the name contains. Case and spaces do not
    matter, except in a `files:` pattern and in the name of a plugin. Nothing is opened, so the
    function also checks the names in a config. options: those of a plugin. Raises ConfigError for
    an unknown name, with the nearest known one.

    "RedPajama book sample.train.1M" -> (entry of redpajama book sample, ("1m",))
    """
    if is_plugin(name):
        return plugin_corpus(name, options or {}), ()
    head, colon, tail = name.partition(":")
    key = re.sub(r"\s", "", head).lower() + colon + (tail.strip() if colon else "")
    for entry in REGISTER:
        if match := entry.pattern.fullmatch(key):
            return entry, match.groups()
    heads = usage_heads()
    near = difflib.get_close_matches(key.split(".")[0], heads, n=1, cutoff=0.5)
    known = ", ".join([*(entry.usage for entry in REGISTER), "plugin:NAME"])
    hint = f"did you mean {heads[near[0]]}?" if near else f"known: {known}"
    raise ConfigError(f"corpus {name!r} is unknown; {hint}")


def usage_heads() -> dict[str, str]:
    """The first part of every corpus's name, and how the first such corpus is written:
    {"sotu": "sotu.{train,test}[.SIZE]"}"""
    return {
        re.sub(r"\s", "", re.split(r"[.\[{:]", entry.usage)[0]): entry.usage
        for entry in reversed(REGISTER)
    }


@dataclass(frozen=True)
class PluginSource:
    """What the corpus of a plugin is read from."""

    name: str
    plugin: CorpusPlugin

    def missing(self) -> str | None:
        return self.plugin.missing()


def plugin_corpus(name: str, options: Mapping[str, Any]) -> NamedCorpus:
    """The entry of a plugin's corpus. Raises ConfigError if no package offers it or its options are
    faulty."""
    built_in = tuple(usage_heads())
    plugin = make_plugin(CorpusPlugin, name, options, built_in)
    installed = find_plugin(CorpusPlugin, name, built_in)

    def open_documents() -> Corpus:
        documents = plugin.open()
        if not isinstance(documents, Sequence) or isinstance(documents, str):
            raise ConfigError(
                f"{installed.title}: open() returned {type(documents).__name__}, expected a "
                "sequence of Document"
            )
        return documents

    source = PluginSource(installed.title, plugin)
    return NamedCorpus(
        usage=name,
        pattern=re.compile(re.escape(name)),
        task=plugin.task,
        sources=(source,),
        needs_tokenizer=False,
        opener=open_documents,
        mixed_tasks=False,
        sources_read=lambda: (source,),
        teacher_tokens=lambda: 0,
        chunk_range=lambda: (0, 0),
        version=lambda: installed.package,
        has_messages=lambda: False,
    )
