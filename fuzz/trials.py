"""Trials in forked processes, watched: what they ended with, what they said, what became of the
user's files."""

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

from fuzz.world import call, contents, copied

HANG = 20.0  # seconds
ROOM = 6 * 2**30  # bytes of address space that a command may take more than this process
LARGEST = 2**29  # bytes of a file that it may write
LONGEST = 1200  # characters of a line that it may say


@dataclass
class Step:
    """A command. codes: that it may end with; kill: after so many seconds; check: of what is in
    the folder afterwards, a fault in words or None; variables: of its environment; stdin: a file
    in it."""

    command: list[str]
    codes: tuple[int, ...] = (0, 2, 3)
    kill: float | None = None
    check: Callable[[Path], str | None] = lambda folder: None
    variables: dict[str, str] = field(default_factory=dict)
    stdin: str = os.devnull


@dataclass
class Trial:
    """kind and number draw it again: `python -m fuzz --only kind:number`. prepare: what is done
    to a copy of the world, and then to be run."""

    kind: str
    number: int
    prepare: Callable[[Path], tuple[str, list[Step]]]

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.number}"


@dataclass
class Outcome:
    """faults: kinds of what went wrong, each with words; refused: the first step ended with code
    2."""

    trial: Trial
    what: str
    seconds: float
    refused: bool
    killed: int
    faults: list[tuple[str, str]]


def run_all(trials: Iterable[Trial], world: Path, room: Path, workers: int) -> Iterator[Outcome]:
    """The outcomes of trials, `workers` at a time, in the order in which they end."""
    waiting, running = iter(trials), []
    more = True
    while more or running:
        while more and len(running) < workers:
            trial = next(waiting, None)
            more = trial is not None
            if trial:
                running.append(follow(trial, world, room))
        for one in list(running):
            outcome = next(one)
            if outcome:
                running.remove(one)
                yield outcome
        time.sleep(0.002)


def follow(trial: Trial, world: Path, room: Path) -> Iterator[Outcome | None]:
    """None while a trial is running, then its outcome."""
    folder = copied(world, room / trial.name.replace(":", "-") / "here")
    what, steps = trial.prepare(folder)
    before, faults = contents(folder), []
    refused, killed, seconds = False, 0, 0.0
    for number, step in enumerate(steps):
        began = time.monotonic()
        said = folder.parent / f"said-{number}"
        said.touch()
        child = start(step, folder, said)
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
        text = said.read_bytes()[-100_000:].decode("utf-8", "replace")
        if code is None and step.kill is None:
            faults.append(("hang", f"{step.command}: {text[-200:]}"))
        elif code is not None:
            faults += [
                (kind, f"{' '.join(step.command)[:120]!r}: {words}")
                for kind, words in judged(step, code, text)
            ]
        refused = refused or (number == 0 and code == 2)
        if words := step.check(folder):
            faults.append(("lost", words))
    after = contents(folder)
    lost = [name for name in before if after.get(name) != before[name]]
    if lost:
        faults.append(("lost", f"changed or gone: {lost[:5]}"))
    shutil.rmtree(folder.parent, ignore_errors=True)
    yield Outcome(trial, what, seconds, refused, killed, faults)


def judged(step: Step, code: int, text: str) -> Iterator[tuple[str, str]]:
    last = text.strip().splitlines()[-1:] or ["(nothing said)"]
    if "Traceback (most recent call last)" in text or code == 70:
        yield "traceback", f"{last[0][:300]}"
    elif code not in step.codes:
        yield "exit code", f"{code}, allowed {step.codes}: {last[0][:300]}"
    elif code == 2 and not text.strip():
        yield "silence", "exit code 2 without a word"
    elif code == 2 and max(map(len, text.splitlines())) > LONGEST:
        yield "long line", last[0][:100]


def start(step: Step, folder: Path, said: Path) -> int:
    """The id of a forked process that runs a step's command in the folder."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child:
        return child
    code: Any = 70  # of an exception that nothing has caught
    try:
        os.chdir(folder)
        os.environ |= {"UIOLLMS_CACHE": str(folder / "cache"), **step.variables}
        datasets.config.HF_DATASETS_CACHE = str(folder / "cache" / "datasets")
        tqdm.set_lock(threading.RLock())  # one that is killed would keep the lock of all
        limit()
        output, given = os.open(said, os.O_WRONLY), os.open(step.stdin, os.O_RDONLY)
        for stream, handle in ((0, given), (1, output), (2, output)):
            os.dup2(handle, stream)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w", buffering=1) for _ in range(2))
        code = call(*step.command)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def limit() -> None:
    """What takes absurdly much fails at once instead of taking the machine."""
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
