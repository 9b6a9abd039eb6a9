"""Opening what others have written: a file that is there and is one, and no more of it than is
asked for."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from uiollms.files.errors import ConfigError

MOST_JSON = 64 * 2**20  # bytes of a JSON file: a config has some thousand
KINDS = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISDIR: "a folder",
}


def kind_of(path: str | Path) -> str | None:
    """What a path is, in words, where it is no regular file (links are followed); None where it is
    one. Raises ConfigError where it cannot be looked at."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if stat.S_ISREG(mode):
        return None
    return next((words for is_kind, words in KINDS.items() if is_kind(mode)), "no file")


def check_file(path: str | Path) -> None:
    """Raises ConfigError unless a path is a regular file: reading a pipe or a device may wait,
    or go on, for ever."""
    if kind := kind_of(path):
        raise ConfigError(f"{path}: is {kind}, expected a file; copy what it gives into one")


def check_tree(path: str | Path) -> None:
    """Raises ConfigError unless a path, if it is there, is a file, or a folder of files and
    folders, none of which is so large that it cannot be what its name says: summing it would
    take for ever."""
    if not os.path.exists(path):
        return
    inside = [str(path)]
    if os.path.isdir(path):
        inside = [
            os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
        ]
    for name in inside:
        if os.path.exists(name):  # else a link to nothing
            check_file(name)
            check_size(name)


def check_size(path: str) -> None:
    """Raises ConfigError for JSON past all bounds, and safetensors (.mem is one) longer than
    their header says."""
    size = os.path.getsize(path)
    if path.endswith(".json") and size > MOST_JSON:
        raise ConfigError(f"{path}: has {size:,} bytes, at most {MOST_JSON:,} are read of JSON")
    if path.endswith((".safetensors", ".mem")):
        said = said_length(path)
        if (said is None and size > MOST_JSON) or (said is not None and said < size):
            header = "no header" if said is None else f"by its header {said:,}"
            raise ConfigError(f"{path}: has {size:,} bytes and {header}; copy the file again")


def said_length(path: str) -> int | None:
    """Bytes that a safetensors file has by its header; None where that is none."""
    with opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_JSON:
            return None
        try:
            header = json.loads(file.read(length))
            ends = [
                part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"
            ]
            return 8 + length + int(max(ends, default=0))
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ):
            return None  # the loader says what is wrong


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file for reading bytes. Raises ConfigError where there is none or it cannot be
    read."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from None


def read_bytes(path: str | Path, most: int) -> bytes:
    """All bytes of a file. Raises ConfigError for one of more than `most`."""
    data = bytearray()
    with opened(path) as file:
        while len(data) <= most and (part := file.read(1 << 20)):
            data += part
    if len(data) > most:
        raise ConfigError(
            f"{path}: is larger than {most >> 20:,} MiB, the most that is read of such a file"
        )
    return bytes(data)


def unreadable(path: str | Path, error: OSError | ValueError) -> ConfigError:
    """ValueError: of a name that no file can have."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    return ConfigError(f"{path}: cannot be read ({reason})")
