"""The files of a run folder: their names, the folder's lock, and moving an earlier run's aside.

No command moves or overwrites a file that somebody else has put into the folder. A folder is a
run's if train.py has locked it, or if it contains a checkpoint, a run's versions.json or the
results of test.py.
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

TEST_RESULTS = ("test.json", "test-nll.safetensors", "test.png")  # written by test.py
RUN_FILES = (
    *("checkpoints", "config.json", "versions.json", "metrics.jsonl", "log.txt", "tensorboard"),
    *("trackers.json", "wandb"),
    *("curve.png", *TEST_RESULTS, "attention.safetensors", "report.html", "plots"),
)
LOCK = "lock"
MOVING = ".earlier"  # the name of earlier-<n> while files are moved into it


def check_run_folder(folder: Path, names: tuple[str, ...] = RUN_FILES) -> None:
    """Checks that a command can write its files `names` into a folder. Raises ConfigError with a
    line for each of these names under which there is a file that no run has written."""
    faults = Faults()
    of_a_run = is_run_folder(folder)
    for name in names:
        path = folder / name
        foreign = not of_a_run or (name == "test.json" and not has_results(path))
        if foreign and os.path.lexists(path):
            faults.add(refusal(path, "was not written by a run"))
        elif path.exists() and not path.is_dir() and (kind := file_kind(path)):
            faults.add(refusal(path, f"is {kind}, not written by a run,"))
    lock = folder / LOCK
    if lock.exists() and (not lock.is_file() or lock.stat().st_size):
        faults.add(refusal(lock, "is not the lock of a run"))
    faults.report()


def refusal(path: Path, reason: str) -> str:
    return f"{path}: {reason} and would be lost; choose another train.run_dir, or move the file"


def is_run_folder(folder: Path) -> bool:
    if (folder / LOCK).is_file() or has_results(folder / "test.json"):
        return True
    if any((folder / "checkpoints").glob("step-*/state.json")):
        return True
    return has_keys(folder / "versions.json", {"python", "torch"})


def has_results(path: Path) -> bool:
    """Whether a test.json contains the results of test.py, rather than a list of tasks."""
    return has_keys(path, {"weights", "config", "versions", "results"})


def has_keys(path: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object that has these keys."""
    if not path.is_file():
        return False
    try:
        value = read_json(path)
    except ConfigError:
        return False
    return isinstance(value, dict) and keys <= value.keys()


def is_run_file(name: str) -> bool:
    """Whether a run gives this name to something in its folder."""
    return name in RUN_FILES or name in (LOCK, MOVING) or name.startswith("earlier-")


def check_save_path(save_ckp: Path, folder: Path) -> None:
    """Raises ConfigError if weights at `save_ckp` would replace the run folder, or lie inside of
    one of its files. Links are followed."""
    target, root = Path(os.path.realpath(save_ckp)), Path(os.path.realpath(folder))
    if root.is_relative_to(target):
        fault = "would replace the run folder"
    elif target.is_relative_to(root) and is_run_file(target.relative_to(root).parts[0]):
        fault = f"is inside the run folder's own {target.relative_to(root).parts[0]}"
    else:
        return
    remedy = f"choose another, such as {folder / 'checkpoint'}"
    raise ConfigError(f"{save_ckp}: {fault} ({folder}); {remedy}")


@contextmanager
def locked(path: Path, fault: str, timeout: float = 0.0) -> Iterator[None]:
    """Locks the file `path` during a block. Raises ConfigError with the text `fault` if another
    process still holds the lock after `timeout` seconds."""
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(fault) from None
    try:
        yield
    finally:
        lock.release()


# ---- files of earlier runs -----------------------------------------------------------------------


def set_aside(folder: Path, paths: list[Path]) -> Path:
    """Moves files of a run folder into its next free earlier-<n>/ and returns that folder. If the
    process is killed meanwhile, `put_back` undoes it, so all files are moved or none. Checkpoints
    are moved last, so that commands which read the folder find weights for as long as possible."""
    moving, target = folder / MOVING, next_earlier(folder)
    moving.mkdir()
    for path in sorted(paths, key=lambda path: path.name == "checkpoints"):
        path.rename(moving / path.name)
    for changed in {moving, folder, *(path.parent for path in paths)}:
        sync(changed)
    moving.rename(target)
    sync(folder)
    return target


def put_back(folder: Path) -> None:
    """Undoes a `set_aside` that was killed. A file whose name has been taken since then stays in a
    new earlier-<n>/."""
    moving = folder / MOVING
    if not moving.is_dir():
        return
    for path in sorted(moving.iterdir(), key=lambda path: path.name != "checkpoints"):
        parent = folder / "checkpoints" if path.name.startswith("step-") else folder
        parent.mkdir(exist_ok=True)
        if not os.path.lexists(parent / path.name):
            path.rename(parent / path.name)
    if any(moving.iterdir()):
        moving.rename(next_earlier(folder))
    else:
        moving.rmdir()
    sync(folder)


def next_earlier(folder: Path) -> Path:
    """The first path earlier-<n> of a folder that does not exist."""
    return next(p for n in range(1, 10**9) if not (p := folder / f"earlier-{n}").exists())
