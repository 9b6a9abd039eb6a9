"""Write files and folders atomically, read them consistently, and check their sha256 sums.

A file or folder is written under a temporary name beside its target, synchronised to the disk and
then renamed. So a process that is killed, or a disk that is full, leaves the old contents or the
new ones. All code of this package writes through `atomic_file` and `atomic_folder`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
import stat
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
MOST_READS = 100  # attempts to read a folder that another process replaces during each attempt
Value = TypeVar("Value")


def remove(path: Path) -> None:
    """Removes a file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_checksums(folder: Path) -> None:
    """Writes checksums.json with the sha256 sum of every file that the folder contains so far."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=4) + "\n", encoding="utf-8")


# ---- writing -------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write a file to. After the block the file is
    synchronised to the disk and replaces `path`. If the block raises, the old file stays. If
    `path` is a link, its target is replaced."""
    target = Path(os.path.realpath(path))
    clear_leftovers(target.parent)
    work = work_path(target.parent, target.suffix)  # some writers choose the format by the suffix
    work.touch()  # with the mode that the umask gives
    mode = work.stat().st_mode
    work.unlink()
    try:
        yield work
        add_permissions(work, mode)
        sync(work)
        os.replace(work, target)
    finally:
        remove(work)
    sync(target.parent)


def replace_text(path: Path, text: str) -> None:
    """Writes a text as the file `path` in UTF-8, atomically."""
    with atomic_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder to fill. After the block its contents are synchronised to the disk
    and it replaces the folder `path`; missing parents are created.

    At any moment, also after a kill, `whole_folder(path)` is either the old folder or the new one.
    If the block raises, the old folder stays. If `path` is a link, its target is replaced. Only
    one process at a time may write to `path`.
    """
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    clear_leftovers(target.parent)
    recover(target)
    work = work_path(target.parent)
    work.mkdir()
    try:
        yield work
        for part in sorted(work.rglob("*")):
            if part.is_file():
                add_permissions(part, work.stat().st_mode & 0o666)
            sync(part)
        sync(work)
        swap(work, target)
    finally:
        remove(work)  # an incomplete folder, or the one that was replaced
    sync(target.parent)


@contextmanager
def merged_folder(path: Path, is_own: Callable[[str], bool]) -> Iterator[Path]:
    """Yields a new, empty folder to fill, with a checksums.json. After the block its files replace
    those in the folder `path`, one after the other. Of the other files in `path` those that
    `is_own` selects by their relative name are removed, and the rest stays.

    The checksums are replaced first and the files that they list last, so `verify_checksums`
    refuses what a process leaves that is killed in between. If the block raises, `path` stays as it
    is. Only one process at a time may write to `path`.
    """
    target = Path(os.path.realpath(path))
    clear_leftovers(target.parent)
    work = work_path(target.parent)
    work.mkdir()
    try:
        yield work
        mode = work.stat().st_mode & 0o666
        listed = read_json(work / CHECKSUMS)
        names = [part.relative_to(work).as_posix() for part in work.rglob("*") if part.is_file()]
        for name in names:
            add_permissions(work / name, mode)
            sync(work / name)
        for name in sorted(names, key=lambda name: (name != CHECKSUMS, name in listed, name)):
            make_folder((target / name).parent)
            os.replace(work / name, target / name)
            sync((target / name).parent)
        for part in sorted(target.rglob("*"), reverse=True):  # files before their folder
            name = part.relative_to(target).as_posix()
            if part.is_file() and name not in names and is_own(name):
                part.unlink()
                with suppress(OSError):  # other files are in it
                    part.parent.rmdir()
        sync(target)
    finally:
        remove(work)


def add_permissions(path: Path, mode: int) -> None:
    """Adds the permissions of `mode` to a file. Some writers, such as safetensors, create files
    that only their owner can read, whatever the umask is."""
    found = stat.S_IMODE(path.stat().st_mode)
    if added := stat.S_IMODE(mode) & ~found:
        path.chmod(found | added)


def swap(work: Path, target: Path) -> None:
    """Renames the folder `work` to `target`. An old folder `target` gets the name `work`."""
    if not os.path.lexists(target):
        os.rename(work, target)
    elif not exchange(work, target):  # rename twice; between the renames readers use aside_path
        old = aside_path(target)
        os.rename(target, old)
        try:
            os.rename(work, target)
        except BaseException:
            os.rename(old, target)
            raise
        sync(target.parent)
        os.rename(old, work)
    sync(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one atomic step. Returns False if the operating system or the file
    system does not support it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # not Linux, or a C library older than 2018
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of Linux


def aside_path(target: Path) -> Path:
    """The name of the old folder between the two renames of `swap`."""
    return target.with_name(f".{target.name}{WORK}old")


def whole_folder(path: Path) -> Path:
    """The path at which to read a folder that `atomic_folder` writes. It is `path`, or the old
    folder beside it if a process is, or was killed, between its two renames."""
    if os.path.lexists(path) and not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    old = aside_path(target)
    return old if not target.exists() and old.is_dir() else path


def recover(target: Path) -> None:
    """Restores the old folder if a process was killed between its two renames. Remove the old
    folder if the new one already has its name."""
    old = aside_path(target)
    if not old.is_dir():
        return
    if os.path.lexists(target):
        # Rename first: a partly removed folder must not look like the old one.
        discarded = work_path(target.parent)
        os.rename(old, discarded)
        remove(discarded)
    else:
        os.rename(old, target)
    sync(target.parent)


def read_whole(path: Path, read: Callable[[Path], Value]) -> Value:
    """Calls `read` on a folder that `atomic_folder` writes, and returns its value. If the folder
    was replaced in the meantime, it is read again, so that no value mixes two versions."""
    for attempt in range(1, MOST_READS + 1):
        folder = whole_folder(path)
        before = identity(folder)
        try:
            value = read(folder)
        except Exception:
            if attempt == MOST_READS or identity(whole_folder(path)) == before:
                raise
        else:
            if attempt == MOST_READS or identity(whole_folder(path)) == before:
                break
    return value


def identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, and synchronise their names to the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


# ---- temporary names -----------------------------------------------------------------------------

WORK = ".uiollms-"  # prefix of temporary names, followed by machine, process and a number
_numbers = itertools.count()


def machine_id() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def work_path(folder: Path, suffix: str = "") -> Path:
    """A temporary path in a folder that no other process or thread uses."""
    suffix = suffix if len(suffix) <= 20 else ""
    return folder / f"{WORK}{machine_id()}-{os.getpid()}-{next(_numbers)}{suffix}"


def clear_leftovers(folder: Path) -> None:
    """Removes temporary files and folders of processes of this machine that no longer run."""
    prefix = f"{WORK}{machine_id()}-"
    names = [name for name in os.listdir(folder) if name.startswith(prefix)]
    for name in names:
        process = name.removeprefix(prefix).partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            with suppress(OSError):  # another user's, or removed by another process
                remove(folder / name)


# ---- checks --------------------------------------------------------------------------------------


def verify_checksums(folder: Path, needed: Iterable[str] = ()) -> None:
    """Compares the files of a folder with checksums.json. Raises ConfigError, naming the file, if a
    file differs or if one of `needed` is not listed."""
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
            both = f"its sha256 is {found[:12]}.., {CHECKSUMS} has {sums[name][:12]!r}.."
            raise ConfigError(f"{folder}: the checkpoint is damaged ({name}: {both})")


def sha256(path: Path) -> str:
    if not path.is_file():  # reading a pipe would block
        raise FileNotFoundError("no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Synchronises a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def reporting_write_errors(path: str | Path, remedy: str = "") -> Iterator[None]:
    """Turns the errors of a block that writes to `path` into a ConfigError of one line: a full
    disk, a folder without permission, a name that no file can have. `remedy` is appended."""
    try:
        yield
    except ConfigError:
        raise
    # ValueError: a name with a zero byte or half of a surrogate pair
    except (OSError, SafetensorError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be written ({reason}){remedy}") from None
