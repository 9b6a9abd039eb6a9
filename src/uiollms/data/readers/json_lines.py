"""Files -> documents, lazily: JSON lines, JSON lines in .gz, lists inside one big JSON file,
plain text.

Memory: 12 bytes a document (16 in a big JSON file) and the document that is being read. Time:
opening reads a file once from end to end; after that every document costs one seek. A .gz cannot
be entered in the middle, so it is unpacked once into the cache (see paths.py), which costs disk
space of three to five times its size.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
import os
import re
import zlib
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uiollms.data.documents import Corpus, Document, Lazy
from uiollms.files.atomic import atomic_file, make_folder
from uiollms.files.errors import ConfigError, shortened
from uiollms.files.folders import cache_dir, raw_dir
from uiollms.files.json_files import loads
from uiollms.files.reading import check_file, decode_utf8, open_file, read_text

MOST_TEXT = 2**30  # bytes of a text, or of a line of JSON: some 250 million tokens
# Bytes that a .gz may unpack to however small it is, and how often its own size: text hardly
# shrinks to a fifth, and what shrinks to a thousandth was made to fill disks.
MOST_UNPACKED, MOST_GROWTH = 2**30, 200
Fields = dict[str, Any]
MakeDocument = Callable[
    [Fields, str], Document
]  # (fields, source) -> document; raises ConfigError naming the source


@dataclass(frozen=True)
class RawFile:
    """A file of raw_data/README.md."""

    name: str

    def missing(self) -> str | None:
        path = raw_dir() / self.name
        return (
            None if path.is_file() else f"{path} is missing; raw_data/README.md says how to get it"
        )

    def path(self) -> Path:
        if message := self.missing():
            raise ConfigError(message)
        return raw_dir() / self.name


def text_of(fields: Fields, name: str, source: str) -> str:
    """The text in a field. Raises ConfigError if there is none, or if it is not text that a
    tokenizer can read."""
    if name not in fields:
        raise ConfigError(
            f"{source}: field {name!r} is missing, found {shortened(str(sorted(fields)))}"
        )
    value = fields[name]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ConfigError(f"{source}: field {name!r} is {kind}, expected text")
    check_text(value, f"{source}: field {name!r}")
    return value


def check_text(text: str, source: str) -> None:
    """Raises ConfigError for what no tokenizer can read: JSON can write half of a surrogate pair,
    and a shell hands on a byte that is no text as one."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"character {error.start} is half of a surrogate pair"
            raise ConfigError(f"{source}: {where}") from None


def plain_text(fields: Fields, source: str) -> Document:
    """{"text": ...}"""
    return Document(text_of(fields, "text", source), source)


def input_output(fields: Fields, source: str) -> Document:
    """{"input": ..., "output": ...}"""
    response = text_of(fields, "output", source)
    return Document(text_of(fields, "input", source), source, response, task="question answering")


def text_or_qa(fields: Fields, source: str) -> Document:
    """{"text": ...} or {"input": ..., "output": ...}; a field that is null is none, as in lines
    that were written out of a table."""
    given = {name for name, value in fields.items() if value is not None}
    if "text" in given:
        return plain_text(fields, source)
    if {"input", "output"} <= given:
        return input_output(fields, source)
    nulls = sorted(fields.keys() - given)
    found = f"{shortened(str(sorted(given)))}" + (f", and null {nulls}" if nulls else "")
    wanted = "expected a field 'text', or fields 'input' and 'output'"
    raise ConfigError(f"{source}: {wanted}; found {found}")


def json_lines(
    path: str | Path, make: MakeDocument = text_or_qa, limit: int | None = None, shown: str = ""
) -> Corpus:
    """A JSON-lines file, its first `limit` documents, through an index of where its lines start.
    shown: the name of the file in messages, if not its path."""
    starts, numbers = (
        array("q"),
        array("I"),
    )  # byte offsets; line numbers, which count blank lines too
    with open_file(path) as file:
        position = 0
        for number, line in enumerate(iter(lambda: file.readline(MOST_TEXT + 1), b""), start=1):
            if len(starts) == limit:
                break
            if len(line) > MOST_TEXT:
                most = f"longer than {MOST_TEXT >> 20:,} MiB, the most that is read of a document"
                raise ConfigError(f"{shown or path}: line {number}: {most}")
            if line.removeprefix(BOM_UTF8).strip():
                starts.append(position)
                numbers.append(number)
            position += len(line)

    def read(i: int) -> Document:
        with open_file(path) as file:
            file.seek(starts[i])
            source = f"{shown or path}: line {numbers[i]}"
            return make(json_object(file.readline(), source), source)

    return Lazy(len(starts), read)


def json_lines_gz(path: str | Path) -> Corpus:
    return json_lines(unpacked(path), shown=str(path))


def json_object(data: bytes, source: str) -> Fields:
    """Raises ConfigError for bytes that are not UTF-8, broken JSON, a key that stands twice in an
    object, and values that are not objects."""
    try:
        value = loads(decode_utf8(data, source), source)
    except ConfigError as error:
        raise ConfigError(str(error).split("\n")[0]) from None  # a document's faults are one line
    except json.JSONDecodeError as error:
        hint = (
            "; this file is one JSON list, make it lines: jq -c '.[]' FILE"
            if data.lstrip()[:1] == b"["
            else ""
        )
        raise ConfigError(f"{source}: not JSON: {error}{hint}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def text_file(path: str | Path) -> Corpus:
    """A corpus of one document, a whole text file."""
    return Lazy(1, lambda _: Document(read_text(path, MOST_TEXT), str(path)))


def unpacked(path: str | Path) -> Path:
    """The unpacked copy of a .gz in the cache, made on the first call; a changed file gets a new
    copy. Raises ConfigError for a damaged one, and one that does not end in sensible time."""
    check_file(path)
    state = state_of(path)
    most = max(MOST_UNPACKED, MOST_GROWTH * os.path.getsize(path))
    copy = (
        cache_dir()
        / "unpacked"
        / f"{Path(path).stem}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    )
    if not copy.exists():
        try:
            make_folder(copy.parent)
            with atomic_file(copy) as work, gzip.open(path) as packed, work.open("wb") as part:
                while data := packed.read(1 << 20):
                    part.write(data)
                    if part.tell() > most:
                        grows = (
                            f"it grows past {most >> 20:,} MiB, more than {MOST_GROWTH} times its "
                            "size"
                        )
                        raise ConfigError(f"{path}: is not unpacked: {grows}")
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{path}: cannot be unpacked: {error}") from None
    return copy


def state_of(path: str | Path) -> str:
    """Which file in which state: place, size, time of its last change. Raises ConfigError if
    there is none."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return f"{os.path.realpath(path)} {stat.st_size} {stat.st_mtime_ns}"


def json_list(path: str | Path, key: str, make: MakeDocument) -> Corpus:
    """The list of objects under a key of one big JSON object, {"train": [{...}, ...], "test":
    [...]}, through an index of where its elements start and end."""
    starts, ends = element_spans(path, key)

    def read(i: int) -> Document:
        source = f"{path}: {key}[{i}]"
        if ends[i] - starts[i] > MOST_TEXT:
            raise ConfigError(
                f"{source}: longer than {MOST_TEXT >> 20:,} MiB, the most that is read of a "
                "document"
            )
        with open_file(path) as file:
            file.seek(starts[i])
            return make(json_object(file.read(ends[i] - starts[i]), source), source)

    return Lazy(len(starts), read)


_MARK = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"|["{}\[\]]', re.DOTALL
)  # a whole string, or a quote without end, or a bracket


def element_spans(path: str | Path, key: str) -> tuple[array[int], array[int]]:
    """Byte offsets (starts, ends) of the objects in the list under a key, without parsing them.

    {"a": [{"x": 1}], "b": [{"x": 2}, {"x": 3}]}, key "b" -> ([24, 34], [32, 42])
    """
    starts, ends = array("q"), array("q")
    depth, name, names = 0, "", set()
    for mark, position in marks(path):
        if len(mark) > 1:
            if (
                depth == 1
            ):  # a key of the whole object, or a text value, which the next key replaces
                name = mark[1:-1].decode("utf-8", "replace")
            elif depth == 2 and name == key:
                raise ConfigError(
                    f"{path}: {key}: byte {position}: expected a list of objects, found a text in "
                    "it"
                )
        elif mark == b'"':
            raise ConfigError(
                f"{path}: not JSON: the text that starts at byte {position} has no end"
            )
        elif mark in b"{[":
            depth += 1
            if depth == 2 and mark == b"[":
                names.add(name)
            if depth == 3 and mark == b"{" and name == key:
                starts.append(position)
        else:
            if depth == 3 and mark == b"}" and name == key:
                ends.append(position + 1)
            depth -= 1
    if depth != 0:
        raise ConfigError(
            f"{path}: not JSON: {depth} brackets are not closed, the file may be cut off"
        )
    if key not in names:
        raise ConfigError(
            f"{path}: there is no list {key!r}, found {shortened(str(sorted(names)))}"
        )
    return starts, ends


def marks(path: str | Path) -> Iterator[tuple[bytes, int]]:
    """What gives a JSON file its structure, each with its place: brackets, and texts (only the
    short ones that can be keys are copied, the others are b"..")."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ConfigError(f"{path}: is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for match in _MARK.finditer(data):
            start, end = match.span()
            yield (match.group() if end - start < 64 else b".."), start
