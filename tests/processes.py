"""Training in forked children, which start in milliseconds and can be killed, starved or filled
up."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import matplotlib.figure  # noqa: F401  slow imports happen here, once, for all children
import tensorboard.compat.proto.event_pb2  # noqa: F401
from test_commands import call
from tqdm import tqdm

from uiollms.runs.environment import environment

TRAIN = ["train.py", "--env_conf", "env.json"]


def forked(
    function: Callable[[], int],
    kill_after: float | None = None,
    output: str = os.devnull,
    wait: bool = True,
) -> Any:
    """Run in a forked child, killed after some seconds if asked; its exit code, or minus the
    signal that ended it. Without `wait`, a function that waits for it and returns that."""
    environment()  # asks git, once for all children
    child = os.fork()
    if not child:
        # Bars of all forks share one lock, which a child that is killed would keep for ever.
        tqdm.set_lock(threading.RLock())
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (sys.stdout, sys.stderr):
            standard.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(file), "w", buffering=1) for _ in range(2))
        code = 70  # an exception that nothing has caught
        try:
            code = function()
        except SystemExit as stop:
            code = int(stop.code)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    if not wait:
        return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(*flags: str) -> Callable[[], int]:
    return lambda: call(*TRAIN, *flags)


def train_and_at(event: int, action: Callable[[], None], *flags: str) -> Callable[[], int]:
    """Training that does something when it opens, makes, renames or deletes its `event`-th file
    in ./out."""
    folder, seen = os.path.join(os.getcwd(), "out"), 0

    def watch(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and isinstance(
            arguments[0], str | os.PathLike
        ):
            if os.path.abspath(os.fspath(arguments[0])).startswith(folder):
                seen += 1
                if seen == event:
                    action()

    def function() -> int:
        sys.addaudithook(watch)
        return call(*TRAIN, *flags)

    return function


def signalled(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)
