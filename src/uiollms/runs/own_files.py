"""What a run folder's files are called, and whether those that lie there are a run's: no command
moves or overwrites a file that somebody else has put there.

A folder is a run's if train.py has locked it, or a checkpoint, versions.json or the results of
test.py lie in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from uiollms.files.atomic import sync
from uiollms.files.errors import ConfigError, Faults
from uiollms.files.json_files import read_json
from uiollms.files.reading import file_kind

RESULTS = ("test.json", "test-nll.safetensors", "test.png")  # of test.py
FILES = (
    *("checkpoints", "config.json", "versions.json", "metrics.jsonl", "log.txt", "tensorboard"),
    *("curve.png", *RESULTS, "attention.safetensors", "report.html", "plots"),
)
LOCK = "lock"
MOVING = ".earlier"  # what another run left, on its way to earlier-<n>


def check_run_folder(folder: Path, names: tuple[str, ...] = FILES) -> None:
    """Raises ConfigError, a line for each, for what lies where a command puts the files `names` of
    a run and was not put there by one."""
    faults = Faults()
    ours = is_run_folder(folder)
    for name in names:
        path = folder / name
        foreign = not ours or (name == "test.json" and not holds_results(path))
        if foreign and os.path.lexists(path):
            faults.add(refusal(path, "was not written by a run"))
        elif path.exists() and not path.is_dir() and (kind := file_kind(path)):
            faults.add(refusal(path, f"is {kind}, not written by a run,"))
    lock = folder / LOCK
    if lock.exists() and (not lock.is_file() or lock.stat().st_size):
        faults.add(refusal(lock, "is not the lock of a run"))
    faults.report()


def refusal(path: Path, why: str) -> str:
    return f"{path}: {why} and would be lost; choose another train.run_dir, or move the file"


def is_run_folder(folder: Path) -> bool:
    if (folder / LOCK).is_file() or holds_results(folder / "test.json"):
        return True
    if any((folder / "checkpoints").glob("step-*/state.json")):
        return True
    return holds_object(folder / "versions.json", {"python", "torch"})


def holds_results(path: Path) -> bool:
    """Whether a test.json is what test.py has written, no list of tasks."""
    return holds_object(path, {"weights", "config", "versions", "results"})


def holds_object(path: Path, keys: set[str]) -> bool:
    if not path.is_file():
        return False
    try:
        value = read_json(path)
    except ConfigError:  # somebody else's
        return False
    return isinstance(value, dict) and keys <= value.keys()


def check_save_place(save_ckp: Path, folder: Path) -> None:
    """Raises ConfigError where weights at `save_ckp` would take the place of the run folder or of
    what a run keeps in it; links are followed."""
    place, root = Path(os.path.realpath(save_ckp)), Path(os.path.realpath(folder))
    if root.is_relative_to(place):
        where = "would take the place of the run folder"
    elif place.is_relative_to(root) and is_own(place.relative_to(root).parts[0]):
        where = f"is inside the run folder's own {place.relative_to(root).parts[0]}"
    else:
        return
    remedy = f"choose another, such as {folder / 'checkpoint'}"
    raise ConfigError(f"{save_ckp}: {where} ({folder}); {remedy}")


@contextmanager
def held(path: Path, said: str, seconds: float = 0.0) -> Iterator[None]:
    """A lock while the block runs. Raises ConfigError that says `said` where another still has
    it after so many seconds."""
    lock = FileLock(path, timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(said) from None
    try:
        yield
    finally:
        lock.release()


def is_own(name: str) -> bool:
    """Whether a run gives the name to something in its folder, earlier runs' included."""
    return name in FILES or name in (LOCK, MOVING) or name.startswith("earlier-")


def set_aside(folder: Path, paths: list[Path]) -> Path:
    """Move files of a run folder into its next free earlier-<n>/, all or none of them: a process
    that is killed meanwhile leaves what `put_back` undoes. Checkpoints go last, so that what reads
    the folder until then finds its weights."""
    moving, target = folder / MOVING, free_name(folder)
    moving.mkdir()
    for path in sorted(paths, key=lambda path: path.name == "checkpoints"):
        path.rename(moving / path.name)
    for place in {moving, folder, *(path.parent for path in paths)}:
        sync(place)
    moving.rename(target)
    sync(folder)
    return target


def put_back(folder: Path) -> None:
    """Undo what a killed process left of `set_aside`. Where a name is taken by now, what it had
    moved is kept in earlier-<n>/."""
    moving = folder / MOVING
    if not moving.is_dir():
        return
    for path in sorted(moving.iterdir(), key=lambda path: path.name != "checkpoints"):
        home = folder / "checkpoints" if path.name.startswith("step-") else folder
        home.mkdir(exist_ok=True)
        if not os.path.lexists(home / path.name):
            path.rename(home / path.name)
    if any(moving.iterdir()):
        moving.rename(free_name(folder))
    else:
        moving.rmdir()
    sync(folder)


def free_name(folder: Path) -> Path:
    """The next free earlier-<n>."""
    return next(p for n in range(1, 10**9) if not (p := folder / f"earlier-{n}").exists())
