"""Open and read files safely: only regular files, and only up to a maximum size."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from uiollms.files.errors import ConfigError

MOST_JSON = 64 * 2**20  # bytes of a JSON file; a config has a few thousand
KINDS = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISDIR: "a folder",
}


def file_kind(path: str | Path) -> str | None:
    """Describes a path that is not a regular file, such as "a folder"; links are followed. Returns
    None for a regular file. Raises ConfigError if the path does not exist or is not accessible."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise unreadable_error(path, error) from None
    if stat.S_ISREG(mode):
        return None
    return next((words for is_kind, words in KINDS.items() if is_kind(mode)), "no file")


def check_file(path: str | Path) -> None:
    """Raises ConfigError unless a path is a regular file. Reading a pipe or a device could block or
    never end."""
    if kind := file_kind(path):
        raise ConfigError(f"{path}: is {kind}, expected a file; copy its contents into one")


def check_tree(path: str | Path) -> None:
    """Raises ConfigError if a path contains something other than files and folders, or a file that
    is too large for the format of its name, whose checksum would take too long. A path that does
    not exist is accepted."""
    if not os.path.exists(path):
        return
    inside = [str(path)]
    if os.path.isdir(path):
        inside = [
            os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
        ]
    for name in inside:
        if os.path.exists(name):  # skip links without a target
            check_file(name)
            check_size(name)


def check_size(path: str) -> None:
    """Raises ConfigError for JSON files that are too large, and for safetensors files (.mem is one)
    that are longer than their header states."""
    size = os.path.getsize(path)
    if path.endswith(".json") and size > MOST_JSON:
        raise ConfigError(f"{path}: has {size:,} bytes, at most {MOST_JSON:,} are read of JSON")
    if path.endswith((".safetensors", ".mem")):
        stated = length_in_header(path)
        if (stated is None and size > MOST_JSON) or (stated is not None and stated < size):
            header = "no header" if stated is None else f"by its header {stated:,}"
            raise ConfigError(f"{path}: has {size:,} bytes and {header}; copy the file again")


def length_in_header(path: str) -> int | None:
    """Returns the length in bytes that the header of a safetensors file states, or None if the
    header is invalid."""
    with open_file(path) as file:
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
            return None  # the loader reports the fault


@contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading bytes. Raises ConfigError if it does not exist or cannot be
    read."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise unreadable_error(path, error) from None


def read_bytes(path: str | Path, most: int) -> bytes:
    """Reads all bytes of a file. Raises ConfigError for a file of more than `most` bytes."""
    data = bytearray()
    with open_file(path) as file:
        while len(data) <= most and (part := file.read(1 << 20)):
            data += part
    if len(data) > most:
        raise ConfigError(
            f"{path}: is larger than {most >> 20:,} MiB, the most that is read of such a file"
        )
    return bytes(data)


def read_text(path: str | Path, most: int) -> str:
    """Reads the text of a UTF-8 file of at most `most` bytes. A byte order mark is removed, and
    Windows line ends become \\n. Raises ConfigError if the file cannot be read."""
    return decode_utf8(read_bytes(path, most), str(path)).replace("\r\n", "\n")


def decode_utf8(data: bytes, source: str) -> str:
    """Decodes UTF-8 without a byte order mark. Raises ConfigError, naming the source."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: byte {error.start} is not UTF-8") from None


def unreadable_error(path: str | Path, error: OSError | ValueError) -> ConfigError:
    """The ConfigError for an error of the file system, or the ValueError of a name that no file
    can have."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    return ConfigError(f"{path}: cannot be read ({reason})")
