"""Handle signals to a training run, and inform its processes of stop requests and lost processes.

A single process has only handlers of SIGINT and SIGTERM. With several processes, each has two
threads, because the main thread may wait in a collective, which no Python code can interrupt:
    listen           reads signals from a pipe that Python's C signal handler writes to, and
                     enforces them: first the main thread may finish its step; after FINISH seconds
                     an exception is raised in it; after END seconds the process is ended
    exchange_state   informs the other processes through a store in the first process (torch's
                     TCPStore), also that this process is alive
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from uiollms.files.errors import ConfigError

log = logging.getLogger("uiollms")

# Seconds. torchrun kills a process 30 s after it has told it to stop, Slurm too by default.
FINISH = 15.0  # within which a step, or an evaluation's document, may end by itself
END = 45.0  # after which a process is ended, unless it writes a checkpoint
WRITING = 600.0  # after which it is ended even then
# From announcing a stop request to the other processes to the end of a process that has nothing to
# finish.
TELLING = 3.0
REPEATED = 5.0  # within which a launcher may repeat a signal that the terminal has already sent
POLL = 0.5
SILENCE = 300.0  # without contact, after which a process counts as lost

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
POKE = (
    signal.SIGURG
)  # interrupts the main thread; by default it is ignored, and nothing else uses it


class LostProcess(ConfigError):
    """Another process of the run has ended."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "another process of this run has ended or cannot be reached, see its last lines of "
            "output; this one stops, the last checkpoint is whole: go on with --resume "
            f"({reason[:160]})"
        )


class Watch:
    """The stop requests and lost processes that this process has noticed; see `watching`.

    stop_signal: the first signal that reached any process of the run; lost: why the run cannot
    continue. Both may be set at any moment, so processes must agree before they act on them alike.
    """

    def __init__(self) -> None:
        self.stop_signal: signal.Signals | None = None
        self.lost: str | None = None
        self.noticed_at = 0.0  # when either was set, in seconds of time.monotonic
        self.announced_at: float | None = (
            None  # when the other processes could first know the signal
        )
        self.started = False  # there is a step to finish and to save
        self.writing = 0  # depth of `uninterrupted`
        self.leaving = False  # the main thread is ending
        self.multi_process = False
        self.rank, self.size = 0, 1
        self.store: Any = None
        self.last_contact = time.monotonic()
        self.closed = threading.Event()
        self.stack = ExitStack()

    # ---- the main thread -------------------------------------------------------------------------

    def begin(self) -> None:
        """From now on a signal lets the step finish, so that it can be saved."""
        self.started = True
        if not self.multi_process and threading.current_thread() is threading.main_thread():
            for each in STOP_SIGNALS:
                before = signal.signal(each, self.on_signal)
                self.stack.callback(signal.signal, each, before)

    def on_signal(self, number: int, frame: Any) -> None:
        """The signal handler of a single process."""
        if self.stop_signal is None:
            self.print_line(f"{self.announcement}; a second signal ends it at once")
            self.request_stop(signal.Signals(number))
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Protect a block that must run to its end, such as writing a checkpoint: no exception is
        raised in it, no second signal ends it, and the process is ended only after WRITING
        seconds."""
        self.writing += 1
        try:
            yield
        finally:
            self.writing -= 1

    def exit_exception(self) -> SystemExit | LostProcess:
        """The exception with which the main thread ends."""
        return (
            SystemExit(128 + self.stop_signal) if self.stop_signal else LostProcess(str(self.lost))
        )

    @property
    def announcement(self) -> str:
        return "finishes the step, saves and stops" if self.started else "stops"

    def print_line(self, line: str) -> None:
        """Writes a line to stderr, from any thread and in a signal handler."""
        os.write(2, f"\n{line}\n".encode())

    # ---- from any thread -------------------------------------------------------------------------

    def request_stop(self, number: signal.Signals) -> None:
        if self.stop_signal is None:
            if self.lost is None:
                self.noticed_at = time.monotonic()
            self.stop_signal = number

    def report_lost(self, reason: str) -> None:
        if self.lost is None and self.stop_signal is None and not self.leaving:
            self.noticed_at = time.monotonic()
            self.lost = " ".join(reason.split())

    # ---- several processes -----------------------------------------------------------------------

    def listen_for_signals(self) -> None:
        """Starts the thread that handles signals."""
        self.multi_process = True
        read, write = os.pipe()
        for end in (read, write):
            self.stack.callback(os.close, end)
            os.set_blocking(end, False)
        self.stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write))
        for number, handler in (
            *((each, self.ignore) for each in STOP_SIGNALS),
            (POKE, self.interrupt),
        ):
            self.stack.callback(self.restore, number, signal.signal(number, handler))
        self.start(partial(self.listen, read), wake=partial(os.write, write, b"\0"))

    def start(self, run: Callable[[], None], wake: Callable[[], object] = bool) -> None:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        for at_the_end in (partial(thread.join, 2 * POLL), wake, self.closed.set):  # last first
            self.stack.callback(at_the_end)

    def restore(self, number: int, before: Any) -> None:
        """Restores a signal handler. In a process that was stopped by a signal, further stop
        signals are ignored, because a repetition by the launcher must not change its exit code."""
        signal.signal(
            number, signal.SIG_IGN if self.stop_signal and number in STOP_SIGNALS else before
        )

    def ignore(self, number: int, frame: Any) -> None:
        """The thread `listen` handles the signal."""

    def interrupt(self, number: int, frame: Any) -> None:
        if not (self.writing or self.leaving or self.closed.is_set()):
            raise self.exit_exception()

    def listen(self, pipe: int) -> None:
        poked = 0.0
        while not self.closed.is_set():
            if select.select([pipe], [], [], POLL)[0]:
                for number in os.read(pipe, 4096):
                    if number in STOP_SIGNALS:
                        self.handle_signal(signal.Signals(number))
            now = time.monotonic()
            if self.store is not None and self.rank and now - self.last_contact > SILENCE:
                self.report_lost(f"nothing was heard of process 0 for {SILENCE:.0f} s")
            if self.stop_signal is None and self.lost is None:
                continue
            if now - self.noticed_at >= self.end_after and not self.closed.is_set():
                self.end()
            # Repeat it after a while, because an exception can get lost in a destructor.
            if now - self.noticed_at >= self.poke_after and now - poked >= REPEATED:
                poked = now
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, POKE)

    def handle_signal(self, number: signal.Signals) -> None:
        if self.stop_signal is None:
            self.print_line(
                f"{self.announcement}, with all processes; a second signal ends this one at once"
            )
            self.request_stop(number)
        elif time.monotonic() - self.noticed_at >= REPEATED and not self.writing:
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def poke_after(self) -> float:
        """Seconds until the main thread is interrupted. A process that has not joined the others
        yet first has to announce the signal to them."""
        if self.stop_signal is None:
            return 0.0
        if self.started:
            return FINISH
        return END if self.announced_at is None else self.announced_at - self.noticed_at + TELLING

    @property
    def end_after(self) -> float:
        return WRITING if self.writing else END

    def end(self) -> None:
        """Ends the process from a thread, because the main thread does not end."""
        seconds = time.monotonic() - self.noticed_at
        reason = (
            f"stopped by {self.stop_signal.name}"
            if self.stop_signal
            else str(LostProcess(str(self.lost)))
        )
        self.print_line(
            f"{reason}: ended after {seconds:.0f} s in which it did not come to an end by itself"
        )
        os._exit(128 + self.stop_signal if self.stop_signal else 2)

    # ---- the store -------------------------------------------------------------------------------

    def host(self, host: str) -> int:
        """Creates the store in the first process, and returns its port."""
        self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return self.store.port

    def join(self, host: str, port: int, rank: int, size: int) -> None:
        """Starts the thread that exchanges state with the other processes."""
        self.rank, self.size = rank, size
        self.last_contact = time.monotonic()
        if self.store is None:
            self.store = dist.TCPStore(host, port, timeout=timedelta(seconds=SILENCE))
        self.start(self.exchange_state)

    def exchange_state(self) -> None:
        beats = (
            {rank: (0, time.monotonic()) for rank in range(1, self.size)} if not self.rank else {}
        )
        heard = False
        try:
            while not self.closed.wait(POLL):
                self.store.add(f"beat {self.rank}", 1)
                self.last_contact = time.monotonic()
                if self.stop_signal:
                    self.store.set("asked", str(int(self.stop_signal)))
                    self.announced_at = self.announced_at or time.monotonic()
                elif self.store.check(["asked"]):
                    self.request_stop(signal.Signals(int(self.store.get("asked"))))
                if self.lost:
                    self.store.set("lost", self.lost)
                elif self.store.check(["lost"]):
                    self.report_lost(self.store.get("lost").decode())
                if (self.stop_signal or self.lost) and not heard:
                    heard = bool(self.store.add("heard", 1))
                for rank, (count, since) in beats.items():
                    now = self.store.add(f"beat {rank}", 0)
                    if now != count:
                        beats[rank] = now, time.monotonic()
                    elif time.monotonic() - since > SILENCE:
                        self.report_lost(f"nothing was heard of process {rank} for {SILENCE:.0f} s")
        except (RuntimeError, ValueError) as error:  # the first process has ended, and its store
            if not self.closed.wait(2 * POLL):  # the run has not ended
                self.report_lost(f"process 0: {error}")

    def wait_for_reason(self) -> None:
        """Waits a moment after a collective has failed, because the other process's stop signal may
        arrive only then."""
        until = time.monotonic() + TELLING
        while self.stop_signal is None and self.lost is None and time.monotonic() < until:
            time.sleep(POLL / 10)

    def wait_until_heard(self) -> None:
        """In the first process, wait before closing the store until all processes have read why the
        run ends, or have ended themselves."""
        until = time.monotonic() + TELLING
        while (self.stop_signal or self.lost) and time.monotonic() < until:
            if self.store.add("heard", 0) >= self.size:
                break
            time.sleep(POLL / 10)


@contextmanager
def watching(several: bool) -> Iterator[Watch]:
    """Watches this process and, with `several` processes, the others of the run. A signal that
    arrives before the processes have joined is announced as soon as they have."""
    watch = Watch()
    with watch.stack:
        if several and threading.current_thread() is threading.main_thread():
            watch.listen_for_signals()
        yield watch
