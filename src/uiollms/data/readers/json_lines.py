"""Read documents lazily from files: JSON lines, JSON lines in .gz, lists in one large JSON file,
and plain text.

An open file needs 12 bytes of memory per document (16 in a large JSON file). Opening reads the file
once; after that, reading a document needs one seek. A .gz file does not allow seeks, so it is
unpacked once into the cache folder (files/folders.py), which needs three to five times its size.
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

from uiollms.data.documents import Corpus, Document, LazyCorpus
from uiollms.files.atomic import atomic_file, make_folder
from uiollms.files.errors import ConfigError, shortened
from uiollms.files.folders import cache_dir, raw_dir
from uiollms.files.json_files import loads
from uiollms.files.reading import check_file, decode_utf8, open_file, read_text

MOST_TEXT = 2**30  # bytes of a text, or of a line of JSON; about 250 million tokens
# A .gz file may unpack to so many bytes, or to so many times its size. Text compresses to about a
# fifth; a file that compresses to a thousandth was made to fill disks.
MOST_UNPACKED, MOST_GROWTH = 2**30, 200
Fields = dict[str, Any]
# (fields, source) -> document; raises ConfigError naming the source
MakeDocument = Callable[[Fields, str], Document]


@dataclass(frozen=True)
class RawFile:
    """A file that raw_data/README.md describes."""

    name: str

    def missing(self) -> str | None:
        path = raw_dir() / self.name
        return (
            None
            if path.is_file()
            else f"{path} is missing; raw_data/README.md describes how to get it"
        )

    def path(self) -> Path:
        if message := self.missing():
            raise ConfigError(message)
        return raw_dir() / self.name


def text_field(fields: Fields, name: str, source: str) -> str:
    """Returns the text of a field. Raises ConfigError if the field is missing or is not text that a
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
    """Raises ConfigError for half of a surrogate pair, which no tokenizer can read. It can be in
    JSON, and a shell passes on bytes that are not text as one."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"character {error.start} is half of a surrogate pair"
            raise ConfigError(f"{source}: {where}") from None


def plain_text(fields: Fields, source: str) -> Document:
    """{"text": ...}"""
    return Document(text_field(fields, "text", source), source)


def input_output(fields: Fields, source: str) -> Document:
    """{"input": ..., "output": ...}"""
    response = text_field(fields, "output", source)
    return Document(
        text_field(fields, "input", source), source, response, task="question answering"
    )


def text_or_qa(fields: Fields, source: str) -> Document:
    """{"text": ...} or {"input": ..., "output": ...}. A field that is null counts as missing, as in
    lines that were exported from a table."""
    given = {name for name, value in fields.items() if value is not None}
    if "text" in given:
        return plain_text(fields, source)
    if {"input", "output"} <= given:
        return input_output(fields, source)
    nulls = sorted(fields.keys() - given)
    found = f"{shortened(str(sorted(given)))}" + (f", and null {nulls}" if nulls else "")
    expected = "expected a field 'text', or fields 'input' and 'output'"
    raise ConfigError(f"{source}: {expected}; found {found}")


def json_lines(
    path: str | Path, make: MakeDocument = text_or_qa, limit: int | None = None, shown: str = ""
) -> Corpus:
    """Opens a JSON-lines file, or its first `limit` documents, through an index of its lines.
    shown: the name of the file in messages, by default its path."""
    # Byte offsets, and line numbers, which also count blank lines.
    starts, numbers = array("q"), array("I")
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

    return LazyCorpus(len(starts), read)


def json_lines_gz(path: str | Path) -> Corpus:
    return json_lines(unpack(path), shown=str(path))


def json_object(data: bytes, source: str) -> Fields:
    """Parses a JSON object. Raises ConfigError for bytes that are not UTF-8, broken JSON, a key
    that occurs twice in an object, and values that are not objects."""
    try:
        value = loads(decode_utf8(data, source), source)
    except ConfigError as error:
        raise ConfigError(str(error).split("\n")[0]) from None  # report one line per document
    except json.JSONDecodeError as error:
        hint = (
            "; this file is one JSON list; convert it to lines with jq -c '.[]' FILE"
            if data.lstrip()[:1] == b"["
            else ""
        )
        raise ConfigError(f"{source}: not JSON: {error}{hint}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def text_file(path: str | Path) -> Corpus:
    """Opens a text file as a corpus of one document."""
    return LazyCorpus(1, lambda _: Document(read_text(path, MOST_TEXT), str(path)))


def unpack(path: str | Path) -> Path:
    """Returns the path of the unpacked copy of a .gz file in the cache folder. The first call
    writes it; a changed file gets a new copy. Raises ConfigError for a damaged file, and for one
    that unpacks to far more than its size."""
    check_file(path)
    state = file_state(path)
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


def file_state(path: str | Path) -> str:
    """Identifies a file and its state by path, size and time of the last change. Raises ConfigError
    if it does not exist."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return f"{os.path.realpath(path)} {stat.st_size} {stat.st_mtime_ns}"


def json_list(path: str | Path, key: str, make: MakeDocument) -> Corpus:
    """Opens the list of objects under a key of one large JSON object, {"train": [{...}, ...],
    "test": [...]}, through an index of its elements."""
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

    return LazyCorpus(len(starts), read)


# A whole string, a quote that is not closed, or a bracket.
_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\]]', re.DOTALL)


def element_spans(path: str | Path, key: str) -> tuple[array[int], array[int]]:
    """Finds the byte offsets (starts, ends) of the objects in the list under a key, without parsing
    them.

    {"a": [{"x": 1}], "b": [{"x": 2}, {"x": 3}]}, key "b" -> ([24, 34], [32, 42])
    """
    starts, ends = array("q"), array("q")
    depth, name, names = 0, "", set()
    for mark, position in structure_marks(path):
        if len(mark) > 1:
            # At depth 1 a key of the whole object, or a text value, which the next key replaces.
            if depth == 1:
                name = mark[1:-1].decode("utf-8", "replace")
            elif depth == 2 and name == key:
                raise ConfigError(
                    f"{path}: {key}: byte {position}: expected a list of objects, found a text "
                    "in it"
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


def structure_marks(path: str | Path) -> Iterator[tuple[bytes, int]]:
    """Yields the brackets and strings of a JSON file with their byte offsets. Only strings that are
    short enough for keys are copied; the others are b".." instead."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ConfigError(f"{path}: is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for match in _MARK.finditer(data):
            start, end = match.span()
            yield (match.group() if end - start < 64 else b".."), start
