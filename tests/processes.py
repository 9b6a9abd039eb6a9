"""Training in forked child processes. They start in milliseconds, and tests can kill them or limit
their memory and disk."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

# These slow imports run here once, so that no child repeats them.
import matplotlib.figure  # noqa: F401
import tensorboard.compat.proto.event_pb2  # noqa: F401
from test_commands import call
from tqdm import tqdm

from uiollms.runs.environment import environment

TRAIN = ["train.py", "--env_conf", "env.json"]


def run_forked(
    function: Callable[[], int],
    kill_after: float | None = None,
    output: str = os.devnull,
    wait: bool = True,
) -> Any:
    """Runs a function in a forked child, which is killed after `kill_after` seconds, and returns
    the child's exit code, or minus the number of the signal that ended it. The child writes its
    stdout and stderr to the file `output`. Without `wait`, returns at once a function that waits
    for the child and returns its exit code."""
    # `environment` calls git and caches the answer, here once for all children.
    environment()
    child = os.fork()
    if not child:
        # The bars of all forks share one lock, which a killed child would hold for ever.
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
    """Returns a function that trains with these flags and returns the exit code."""
    return lambda: call(*TRAIN, *flags)


def train_with_action(event: int, action: Callable[[], None], *flags: str) -> Callable[[], int]:
    """Returns a function that trains, and that calls `action` when the training opens, creates,
    renames or deletes a file in ./out for the `event`-th time."""
    folder, count = os.path.join(os.getcwd(), "out"), 0

    def watch(name: str, arguments: tuple) -> None:
        nonlocal count
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and isinstance(
            arguments[0], str | os.PathLike
        ):
            if os.path.abspath(os.fspath(arguments[0])).startswith(folder):
                count += 1
                if count == event:
                    action()

    def function() -> int:
        sys.addaudithook(watch)
        return call(*TRAIN, *flags)

    return function


def send_signal(number: int) -> Callable[[], None]:
    """Returns a function that sends this signal to the process that calls it."""
    return lambda: os.kill(os.getpid(), number)
