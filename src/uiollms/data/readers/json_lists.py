"""Read documents lazily from lists of objects in one large JSON file.

An open file needs 16 to 20 bytes of memory per document. Opening reads the file once, without
parsing the objects; after that, reading a document needs one seek.
"""

from __future__ import annotations

import mmap
import os
import re
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from uiollms.data.documents import Corpus, Document, LazyCorpus
from uiollms.data.readers.fields import MakeDocument, any_fields
from uiollms.data.readers.json_lines import MOST_TEXT, json_object
from uiollms.files.errors import ConfigError, shortened
from uiollms.files.reading import open_file


def json_array(
    path: str | Path, make: MakeDocument = any_fields, limit: int | None = None
) -> Corpus:
    """Opens a file that is one JSON list of objects, [{...}, {...}], or its first `limit` objects,
    through an index of its elements."""
    starts, ends, numbers = record_spans(path, limit)

    def read(i: int) -> Document:
        source = f"{path}: line {numbers[i]}: record {i + 1}"
        return read_object(path, starts[i], ends[i], source, make)

    return LazyCorpus(len(starts), read)


def json_list(path: str | Path, key: str, make: MakeDocument) -> Corpus:
    """Opens the list of objects under a key of one large JSON object, {"train": [{...}, ...],
    "test": [...]}, through an index of its elements."""
    starts, ends = element_spans(path, key)

    def read(i: int) -> Document:
        return read_object(path, starts[i], ends[i], f"{path}: {key}[{i}]", make)

    return LazyCorpus(len(starts), read)


def read_object(
    path: str | Path, start: int, end: int, source: str, make: MakeDocument
) -> Document:
    """Reads the object between two byte offsets."""
    if end - start > MOST_TEXT:
        raise ConfigError(
            f"{source}: longer than {MOST_TEXT >> 20:,} MiB, the most that is read of a document"
        )
    with open_file(path) as file:
        file.seek(start)
        return make(json_object(file.read(end - start), source), source)


LONGEST_GAP = 2**20  # bytes between two records, which are white space and a comma


def record_spans(
    path: str | Path, limit: int | None = None
) -> tuple[array[int], array[int], array[int]]:
    """Finds the byte offsets (starts, ends) of the objects in a file that is one list, and the
    numbers of the lines in which they start, without parsing the objects. Raises ConfigError if
    something other than objects and commas is between them; the message has the line.

    [{"x": 1},
     {"x": 2}]   -> ([1, 12], [9, 20], [1, 2])
    """
    starts, ends, numbers = array("q"), array("q"), array("I")
    data = map_file(path)
    depth, last, line = 0, 0, 1  # last: the end of the previous record
    for mark, position in structure_marks(data):
        if mark == b'"':
            known = starts[-1] if len(ends) < len(starts) else last  # a position in line `line`
            raise ConfigError(
                f"{path}: line {line_of(data, known, line, position)}: not JSON: the text that "
                f"starts at byte {position} has no end"
            )
        if mark == b"{" and depth == 1:
            line = check_gap(path, data, last, position, b"," if starts else b"[", line)
            starts.append(position)
            numbers.append(line)
        if mark in b"{[":
            depth += 1
        elif mark in b"}]":
            depth -= 1
            if depth == 1 and len(ends) < len(starts):
                ends.append(position + 1)
                line, last = line_of(data, starts[-1], line, position), position + 1
                if len(ends) == limit:
                    return starts, ends, numbers
        if depth == 0:
            break
    if depth != 0:
        raise ConfigError(
            f"{path}: not JSON: {depth} brackets are not closed, the file may be cut off"
        )
    check_gap(path, data, last, len(data), b"]" if starts else b"[]", line)
    return starts, ends, numbers


def line_of(data: mmap.mmap, start: int, line: int, position: int) -> int:
    """The number of the line of a position, if `start` is in line number `line`."""
    return line + data[start:position].count(b"\n")


def check_gap(
    path: str | Path, data: mmap.mmap, start: int, stop: int, expected: bytes, line: int
) -> int:
    """Raises ConfigError unless the bytes between two records are `expected` and white space.
    Returns the number of the line of `stop`, if `start` is in line number `line`."""
    gap = data[start : min(stop, start + LONGEST_GAP)]
    found = gap if start else gap.removeprefix(BOM_UTF8)
    if b"".join(found.split()) == expected and stop - start <= LONGEST_GAP:
        return line + gap.count(b"\n")
    stripped = found.lstrip()
    if start == 0 and not stripped.startswith(b"["):
        raise ConfigError(
            f"{path}: expected one list of objects, [{{...}}, ...], found "
            f"{shortened(repr(stripped.decode('utf-8', 'replace')), 60)}; if every line is an "
            "object, name the file .jsonl"
        )
    at = line_of(data, start, line, start + len(gap) - len(stripped))
    shown = shortened(repr(stripped.strip().decode("utf-8", "replace")), 60)
    raise ConfigError(
        f"{path}: line {at}: not a list of objects: expected {expected.decode()!r} before the next "
        f"object or the end, found {shown}"
    )


# A whole string, a quote that is not closed, or a bracket.
_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\]]', re.DOTALL)


def element_spans(path: str | Path, key: str) -> tuple[array[int], array[int]]:
    """Finds the byte offsets (starts, ends) of the objects in the list under a key, without parsing
    them.

    {"a": [{"x": 1}], "b": [{"x": 2}, {"x": 3}]}, key "b" -> ([24, 34], [32, 42])
    """
    starts, ends = array("q"), array("q")
    depth, name, names = 0, "", set()
    for mark, position in structure_marks(map_file(path)):
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


def map_file(path: str | Path) -> mmap.mmap:
    """Maps a file into memory, from where the operating system reads it when it is accessed."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ConfigError(f"{path}: is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def structure_marks(data: mmap.mmap) -> Iterator[tuple[bytes, int]]:
    """Yields the brackets and strings of JSON with their byte offsets. Only strings that are short
    enough for keys are copied; the others are b".." instead."""
    for match in _MARK.finditer(data):
        start, end = match.span()
        yield (match.group() if end - start < 64 else b".."), start
