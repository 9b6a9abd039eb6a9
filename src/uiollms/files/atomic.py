"""Files and folders that are whole or are noticed: the one way to write them, in full and on the
disk before they get their name, and a sha256 for every file of a folder."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

import psutil
from safetensors import SafetensorError

from uiollms.files.errors import ConfigError
from uiollms.files.json_files import read_json
from uiollms.files.reading import check_tree

CHECKSUMS = "checksums.json"
MOST_READS = 100  # of a folder that is replaced every time while it is read
Value = TypeVar("Value")


def remove(path: Path) -> None:
    """A file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_checksums(folder: Path) -> None:
    """Write checksums.json, with the sum of every file that is there by now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=4) + "\n", encoding="utf-8")


# ---- the one way to write ------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, beside `path`, which it replaces once it is whole and on the
    disk. Where the block fails, what was at `path` stays; of a link the target is replaced."""
    place = Path(os.path.realpath(path))
    clear_leftovers(place.parent)
    work = work_name(place.parent, place.suffix)  # the suffix tells some writers the format
    try:
        yield work
        sync(work)
        os.replace(work, place)
    finally:
        remove(work)
    sync(place.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a text as the whole file `path`, in UTF-8, by `replacing`."""
    with replacing(path) as work:
        work.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `path` once all in it is on the disk; parents
    are made. Whoever reads `whole_folder(path)` finds the old folder or the new one at any moment,
    also after a kill. Where the block fails, what was at `path` stays; of a link the target is
    replaced. One process at a time may write at `path`."""
    place = Path(os.path.realpath(path))
    make_folder(place.parent)
    clear_leftovers(place.parent)
    recover(place)
    work = work_name(place.parent)
    work.mkdir()
    try:
        yield work
        for part in sorted(work.rglob("*")):
            sync(part)
        sync(work)
        swap(work, place)
    finally:
        remove(work)  # half a folder, or the one that was replaced
    sync(place.parent)


def swap(work: Path, place: Path) -> None:
    """Give `work` the name `place`; what was there is then at `work`, if anywhere."""
    if not os.path.lexists(place):
        os.rename(work, place)
    elif not exchange(work, place):  # two renames, with the old folder where readers look for it
        old = place_aside(place)
        os.rename(place, old)
        try:
            os.rename(work, place)
        except BaseException:
            os.rename(old, place)
            raise
        sync(place.parent)
        os.rename(old, work)
    sync(place.parent)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # not Linux, or a C library older than 2018
        return False
    if renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def place_aside(place: Path) -> Path:
    """Where a folder lies while it is replaced by two renames."""
    return place.with_name(f".{place.name}{WORK}old")


def whole_folder(path: Path) -> Path:
    """Where a folder written by `replacing_folder` is to be read: at `path`, or beside it, where a
    process was killed between its two renames (or is between them)."""
    if os.path.lexists(path) and not path.is_symlink():
        return path
    place = Path(os.path.realpath(path))
    old = place_aside(place)
    return old if not place.exists() and old.is_dir() else path


def recover(place: Path) -> None:
    """Put back a folder that a killed process left set aside; remove one that was replaced."""
    old = place_aside(place)
    if not old.is_dir():
        return
    if os.path.lexists(place):
        gone = work_name(place.parent)
        os.rename(old, gone)  # in one step: half a folder must not be taken for the old one
        remove(gone)
    else:
        os.rename(old, place)
    sync(place.parent)


def read_whole(path: Path, read: Callable[[Path], Value]) -> Value:
    """What `read` makes of a folder written by `replacing_folder`; read again where the folder was
    replaced meanwhile, so that no value is half of one and half of the other."""
    for attempt in range(1, MOST_READS + 1):
        place = whole_folder(path)
        before = identity(place)
        try:
            value = read(place)
        except Exception:
            if attempt == MOST_READS or identity(whole_folder(path)) == before:
                raise
        else:
            if attempt == MOST_READS or identity(whole_folder(path)) == before:
                break
    return value


def identity(folder: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_ino, stat.st_ctime_ns


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, as far as they are not there, with their names on the disk."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync(place.parent)


# ---- names of unfinished work --------------------------------------------------------------------

WORK = ".uiollms-"  # then the machine, the process and a number
_numbers = itertools.count()


def machine_name() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def work_name(folder: Path, suffix: str = "") -> Path:
    """A name in a folder for something unfinished, which no other process or thread uses."""
    suffix = suffix if len(suffix) <= 20 else ""
    return folder / f"{WORK}{machine_name()}-{os.getpid()}-{next(_numbers)}{suffix}"


def clear_leftovers(folder: Path) -> None:
    """Remove what processes of this machine left unfinished in a folder when they were killed."""
    mine = f"{WORK}{machine_name()}-"
    names = [name for name in os.listdir(folder) if name.startswith(mine)]
    for name in names:
        process = name.removeprefix(mine).partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            with suppress(
                OSError
            ):  # not ours, or another process was faster: it is in nobody's way
                remove(folder / name)


# ---- what is read --------------------------------------------------------------------------------


def verify(folder: Path, needed: Iterable[str] = ()) -> None:
    """Raises ConfigError, naming the file, where a file differs from checksums.json or one of
    `needed` is not in it."""
    check_tree(folder)
    sums = read_json(folder / CHECKSUMS)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ConfigError(f"{folder / CHECKSUMS}: expected an object of file names and sha256 sums")
    for name in [*needed, *sums]:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise ConfigError(f"{folder / CHECKSUMS}: {name!r} is outside of the checkpoint")
        if name not in sums:
            raise ConfigError(
                f"{folder}: the checkpoint is damaged ({name} is missing in {CHECKSUMS})"
            )
        try:
            found = sha256(folder / name)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder}: the checkpoint is damaged ({name!r} cannot be read: {error})"
            ) from None
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


@contextmanager
def reporting_write_errors(path: str | Path, remedy: str = "") -> Iterator[None]:
    """Around whatever writes at `path`: a full disk, a folder without permission, a name that no
    file can have."""
    try:
        yield
    except ConfigError:
        raise
    except (
        OSError,
        SafetensorError,
        ValueError,
    ) as error:  # ValueError: a name with a zero byte or half a surrogate pair
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be written ({reason}){remedy}") from None
