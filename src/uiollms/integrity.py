"""Folders that are whole or are noticed: a sha256 for every file, and files that are on the disk before they count."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from uiollms.config import ConfigError, read_json
from uiollms.reading import check_tree

CHECKSUMS = "checksums.json"


def remove(path: Path) -> None:
    """A file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Write checksums.json, then put every file and folder on the disk (fsync)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=4) + "\n", encoding="utf-8")
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    for path in (*files, folder / CHECKSUMS, *folders, folder):
        sync(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, beside `path`, which it replaces once it is whole and on the
    disk. Where the block fails, what was at `path` stays; of a link the target is replaced."""
    place = Path(os.path.realpath(path))
    # The suffix tells some writers the format.
    work = place.with_name(f".{place.stem}-{os.getpid()}{place.suffix}")
    try:
        yield work
        sync(work)
        os.replace(work, place)
    finally:
        remove(work)
    sync(place.parent)


def verify(folder: Path, needed: Iterable[str] = ()) -> None:
    """Raises ConfigError, naming the file, where a file differs from checksums.json or one of `needed` is not in it."""
    check_tree(folder)
    sums = read_json(folder / CHECKSUMS)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ConfigError(f"{folder / CHECKSUMS}: expected an object of file names and sha256 sums")
    for name in [*needed, *sums]:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise ConfigError(f"{folder / CHECKSUMS}: {name!r} is outside of the checkpoint")
        if name not in sums:
            raise ConfigError(f"{folder}: the checkpoint is damaged ({name} is missing in {CHECKSUMS})")
        try:
            found = sha256(folder / name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder}: the checkpoint is damaged ({name!r} cannot be read: {error})") from None
        if found != sums[name]:
            both = f"its sha256 is {found[:12]}.., {CHECKSUMS} says {sums[name][:12]!r}.."
            raise ConfigError(f"{folder}: the checkpoint is damaged ({name}: {both})")


def sha256(path: Path) -> str:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError("no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
