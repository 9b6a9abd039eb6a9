"""Opening what others have written: a file that is there and is one, and no more of it than is asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from uiollms.refusals import ConfigError

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
    """Raises ConfigError unless a path is a regular file: reading a pipe or a device may wait, or go
    on, for ever."""
    if kind := kind_of(path):
        raise ConfigError(f"{path}: is {kind}, expected a file; copy what it gives into one")


def check_tree(path: str | Path) -> None:
    """Raises ConfigError unless a path, if it is there, is a file, or a folder of files and folders."""
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        return check_file(path)
    for folder, _, names in os.walk(path):
        for name in names:
            if os.path.exists(inside := os.path.join(folder, name)):  # else a link to nothing
                check_file(inside)


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file for reading bytes. Raises ConfigError where there is none or it cannot be read."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from None


def read_bytes(path: str | Path, most: int) -> bytes:
    """All bytes of a file. Raises ConfigError for one of more than `most`."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ConfigError(f"{path}: is larger than {most >> 20:,} MiB, the most that is read of such a file")
    return data


def unreadable(path: str | Path, error: OSError | ValueError) -> ConfigError:
    """ValueError: of a name that no file can have."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    return ConfigError(f"{path}: cannot be read ({reason})")
