"""Read documents lazily from files: JSON lines, packed JSON lines, and plain text.

An open file needs 12 bytes of memory per document. Opening reads the file once; after that, reading
a document needs one seek. A .gz or .zst file does not allow seeks, so it is unpacked once into the
cache folder (files/folders.py), which needs three to ten times its size.
"""

# The `datasets` library (5.2) could read and index these files too, and resuming bit for bit would
# survive, because its tables have random access. Errors with file and line would not survive: its
# JSON reader counts rows from the start of a block of some 10 MB and names no file, one fault
# prevents the opening of the whole file, a misspelt field becomes null, and a number among texts is
# accepted. It would also write a second copy of all data, where 12 bytes a document suffice.

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uiollms.data.documents import Corpus, Document, LazyCorpus
from uiollms.data.readers.fields import Fields, MakeDocument, any_fields
from uiollms.files.atomic import atomic_file, make_folder
from uiollms.files.errors import ConfigError
from uiollms.files.folders import cache_dir, raw_dir
from uiollms.files.json_files import loads
from uiollms.files.reading import check_file, decode_utf8, open_file, read_text

MOST_TEXT = 2**30  # bytes of a text, or of a line of JSON; about 250 million tokens
# A packed file may unpack to so many bytes, or to so many times its size. Text compresses to about
# a fifth; a file that compresses to a thousandth was made to fill disks.
MOST_UNPACKED, MOST_GROWTH = 2**30, 200


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


def json_lines(
    path: str | Path, make: MakeDocument = any_fields, limit: int | None = None, shown: str = ""
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


def packed_json_lines(
    path: str | Path, make: MakeDocument = any_fields, limit: int | None = None
) -> Corpus:
    """Opens JSON lines in a .gz or .zst file as `json_lines` does."""
    return json_lines(unpack(path), make, limit, shown=str(path))


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


def text_file(
    path: str | Path, make: MakeDocument = any_fields, limit: int | None = None
) -> Corpus:
    """Opens a text file as a corpus of one document."""
    return LazyCorpus(1, lambda _: Document(read_text(path, MOST_TEXT), str(path)))


def open_zstandard(path: str | Path) -> Any:
    """Opens a .zst file, of one or several frames, for reading its contents. pyarrow, on which
    `datasets` is built, contains the decoder; Python's library has one from 3.14 on."""
    import pyarrow  # here, because machines without `datasets` train on other files

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


# Name ending -> a function that opens the file for reading its contents.
PACKED: dict[str, Callable[[str | Path], Any]] = {".gz": gzip.open, ".zst": open_zstandard}


def unpack(path: str | Path) -> Path:
    """Returns the path of the unpacked copy of a .gz or .zst file in the cache folder. The first
    call writes it; a changed file gets a new copy. Raises ConfigError for a damaged file, and for
    one that unpacks to far more than its size."""
    check_file(path)
    state = file_state(path)
    most = max(MOST_UNPACKED, MOST_GROWTH * os.path.getsize(path))
    copy = (
        cache_dir()
        / "unpacked"
        / f"{Path(path).stem}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    )
    if not copy.exists():
        opener = PACKED[Path(path).suffix]
        try:
            make_folder(copy.parent)
            with atomic_file(copy) as work, opener(path) as packed, work.open("wb") as part:
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
