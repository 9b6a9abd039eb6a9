"""Runs trials in forked processes and finds faults in their exit codes, their output and the files
of the user."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from fuzz.workspace import call, contents

HANG = 20.0  # seconds after which a command hangs
MOST_MEMORY = 6 * 2**30  # bytes of address space that a command may take more than this process
LARGEST_FILE = 2**29  # bytes of a file that a command may write
LONGEST_LINE = 1200  # characters of a line that a command may print


@dataclass
class Step:
    """A command to run.

    codes: the exit codes that are allowed. kill: the seconds after which it is killed; None for
    never. check: a function of the folder afterwards, which returns a message about a fault or
    None. variables: environment variables. stdin: the file that it reads as its input."""

    command: list[str]
    codes: tuple[int, ...] = (0, 2, 3)
    kill: float | None = None
    check: Callable[[Path], str | None] = lambda folder: None
    variables: dict[str, str] = field(default_factory=dict)
    stdin: str = os.devnull


@dataclass
class Trial:
    """A trial, which `python -m fuzz --only kind:number` runs again.

    prepare: a function that changes a copy of the workspace and returns a description and the
    steps to run."""

    kind: str
    number: int
    prepare: Callable[[Path], tuple[str, list[Step]]]

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.number}"


@dataclass
class Outcome:
    """The result of a trial.

    seconds: the time of the longest step. refused: whether the first step ended with code 2.
    killed: how many steps were killed. faults: pairs of a kind of fault and a message."""

    trial: Trial
    what: str
    seconds: float
    refused: bool
    killed: int
    faults: list[tuple[str, str]]


def run_all(
    trials: Iterable[Trial], workspace: Path, directory: Path, workers: int
) -> Iterator[Outcome]:
    """Yields the outcomes of trials in the order in which they end. `workers` trials run at a
    time."""
    waiting, running = iter(trials), []
    more = True
    while more or running:
        while more and len(running) < workers:
            trial = next(waiting, None)
            more = trial is not None
            if trial:
                running.append(run_trial(trial, workspace, directory))
        for one in list(running):
            outcome = next(one)
            if outcome:
                running.remove(one)
                yield outcome
        time.sleep(0.002)


def run_trial(trial: Trial, workspace: Path, directory: Path) -> Iterator[Outcome | None]:
    """Yields None while a trial is running, then its outcome."""
    folder = directory / trial.name.replace(":", "-") / "workspace"
    shutil.copytree(workspace, folder, symlinks=True)
    what, steps = trial.prepare(folder)
    before, faults = contents(folder), []
    refused, killed, seconds = False, 0, 0.0
    for number, step in enumerate(steps):
        began = time.monotonic()
        output = folder.parent / f"output-{number}"
        output.touch()
        child = start(step, folder, output)
        code, limit = None, HANG if step.kill is None else step.kill
        while code is None and time.monotonic() - began < limit:
            yield None
            pid, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
        taken = time.monotonic() - began
        seconds = max(seconds, taken)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += step.kill is not None
        text = output.read_bytes()[-100_000:].decode("utf-8", "replace")
        if code is None and step.kill is None:
            faults.append(("hang", f"{step.command}: {text[-200:]}"))
        elif code is not None:
            faults += [
                (kind, f"{' '.join(step.command)[:120]!r}: {message}")
                for kind, message in find_faults(step, code, text)
            ]
        refused = refused or (number == 0 and code == 2)
        if message := step.check(folder):
            faults.append(("lost", message))
    after = contents(folder)
    lost = [name for name in before if after.get(name) != before[name]]
    if lost:
        faults.append(("lost", f"changed or gone: {lost[:5]}"))
    shutil.rmtree(folder.parent, ignore_errors=True)
    yield Outcome(trial, what, seconds, refused, killed, faults)


def find_faults(step: Step, code: int, text: str) -> Iterator[tuple[str, str]]:
    """Yields the kind of each fault and a message, from the exit code and the output of a step."""
    last = text.strip().splitlines()[-1:] or ["(no output)"]
    if "Traceback (most recent call last)" in text or code == 70:
        yield "traceback", f"{last[0][:300]}"
    elif code not in step.codes:
        yield "exit code", f"{code}, allowed {step.codes}: {last[0][:300]}"
    elif code == 2 and not text.strip():
        yield "silence", "exit code 2 without a message"
    elif code == 2 and max(map(len, text.splitlines())) > LONGEST_LINE:
        yield "long line", last[0][:100]


def start(step: Step, folder: Path, output: Path) -> int:
    """Runs a step's command in the folder, in a forked process that writes to the file `output`.
    Returns the id of the process."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child:
        return child
    # This is the exit code of an exception that nothing has caught.
    code: Any = 70
    try:
        os.chdir(folder)
        os.environ |= {"UIOLLMS_CACHE": str(folder / "cache"), **step.variables}
        datasets.config.HF_DATASETS_CACHE = str(folder / "cache" / "datasets")
        # A killed process would hold the lock that all forks share.
        tqdm.set_lock(threading.RLock())
        limit_resources()
        written, read = os.open(output, os.O_WRONLY), os.open(step.stdin, os.O_RDONLY)
        for stream, handle in ((0, read), (1, written), (2, written)):
            os.dup2(handle, stream)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(written), "w", buffering=1) for _ in range(2))
        code = call(*step.command)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def limit_resources() -> None:
    """Limits the memory and the file sizes of this process, so that a command that takes too much
    fails at once instead of taking the machine."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_MEMORY, taken + MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
