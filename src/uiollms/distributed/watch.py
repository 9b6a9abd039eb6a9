"""Signals to a training run, and what its processes must know of each other whatever each of
them is doing: that one was asked to stop, and that one is gone.

A process alone has handlers of SIGINT and SIGTERM and nothing else. Of several processes each has
two threads, because the main thread may sit in a collective, which no Python code interrupts:
    listen    hears signals by a pipe that the C library writes into, and sees that what was asked
              for happens: at first the main thread finishes its step by itself; after FINISH
              seconds an exception is raised in it; after END seconds the process is ended
    talk      tells the others through a small store in the first process (torch's TCPStore), and
              that this process lives
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
FINISH = 15.0  # that a step, or an evaluation's document, has to end by itself
END = 45.0  # after which a process ends whatever it does, but for writing a checkpoint
WRITING = 600.0  # after which it ends then too
# between telling the others of a request to stop and the end of a process that has nothing to
# finish
TELLING = 3.0
REPEATED = 5.0  # in which a launcher sends its processes what the terminal has sent them already
POLL = 0.5
SILENCE = 300.0  # after which a process of which nothing was heard counts as lost

ASKED = (signal.SIGINT, signal.SIGTERM)
POKE = signal.SIGURG  # interrupts the main thread; ignored by default, and nobody else's


class LostProcess(ConfigError):
    """Another process of the run has ended."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "another process of this run has ended or cannot be reached, its own last lines say "
            "why; "
            f"this one stops, the last checkpoint is whole: go on with --resume ({reason[:160]})"
        )


class Watch:
    """What this process was asked for, or has heard. Made by `watching`.

    asked: the first signal that reached any process of the run; lost: why the run cannot go on.
    Both may appear at any moment: what all processes are to do alike they must agree upon first.
    """

    def __init__(self) -> None:
        self.stop_signal: signal.Signals | None = None
        self.lost: str | None = None
        self.noticed_at = 0.0  # when either appeared, in seconds of time.monotonic
        self.announced_at: float | None = (
            None  # when the others could first know that this process was asked
        )
        self.started = False  # there is something to finish and to save
        self.writing = 0  # depth of `undisturbed`
        self.leaving = False  # the main thread is on its way out
        self.multi_process = False
        self.rank, self.size = 0, 1
        self.store: Any = None
        self.last_contact = time.monotonic()
        self.closed = threading.Event()
        self.stack = ExitStack()

    # ---- the main thread -------------------------------------------------------------------------

    def begin(self) -> None:
        """From here on a signal lets the step finish, and it can be saved."""
        self.started = True
        if not self.multi_process and threading.current_thread() is threading.main_thread():
            for each in ASKED:
                before = signal.signal(each, self.on_signal)
                self.stack.callback(signal.signal, each, before)

    def on_signal(self, number: int, frame: Any) -> None:
        """Of a process alone."""
        if self.stop_signal is None:
            self.print_line(f"{self.announcement}; a second signal ends it at once")
            self.request_stop(signal.Signals(number))
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Around what is whole only at its end: no exception of this watch is raised inside, no
        further signal ends it, and the end of the process waits for it, up to WRITING seconds."""
        self.writing += 1
        try:
            yield
        finally:
            self.writing -= 1

    def exit_exception(self) -> SystemExit | LostProcess:
        """What the main thread ends with."""
        return (
            SystemExit(128 + self.stop_signal) if self.stop_signal else LostProcess(str(self.lost))
        )

    @property
    def announcement(self) -> str:
        return "finishes the step, saves and stops" if self.started else "stops"

    def print_line(self, line: str) -> None:
        """A line on stderr, from any thread and in a signal handler."""
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
        """Hear signals from now on, in a thread."""
        self.multi_process = True
        read, write = os.pipe()
        for end in (read, write):
            self.stack.callback(os.close, end)
            os.set_blocking(end, False)
        self.stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write))
        for number, handler in (*((each, self.ignore) for each in ASKED), (POKE, self.interrupt)):
            self.stack.callback(self.restore, number, signal.signal(number, handler))
        self.start(partial(self.listen, read), wake=partial(os.write, write, b"\0"))

    def start(self, run: Callable[[], None], wake: Callable[[], object] = bool) -> None:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        for at_the_end in (partial(thread.join, 2 * POLL), wake, self.closed.set):  # last first
            self.stack.callback(at_the_end)

    def restore(self, number: int, before: Any) -> None:
        """A handler as it was; but a process that stops because it was asked to is on its way
        out, and what a launcher sends once more must not change its exit code."""
        signal.signal(number, signal.SIG_IGN if self.stop_signal and number in ASKED else before)

    def ignore(self, number: int, frame: Any) -> None:
        """The thread that listens has heard it."""

    def interrupt(self, number: int, frame: Any) -> None:
        if not (self.writing or self.leaving or self.closed.is_set()):
            raise self.exit_exception()

    def listen(self, pipe: int) -> None:
        poked = 0.0
        while not self.closed.is_set():
            if select.select([pipe], [], [], POLL)[0]:
                for number in os.read(pipe, 4096):
                    if number in ASKED:
                        self.handle_signal(signal.Signals(number))
            now = time.monotonic()
            if self.store is not None and self.rank and now - self.last_contact > SILENCE:
                self.report_lost(f"nothing was heard of process 0 for {SILENCE:.0f} s")
            if self.stop_signal is None and self.lost is None:
                continue
            if now - self.noticed_at >= self.end_after and not self.closed.is_set():
                self.end()
            # Once more after a while: an exception can get lost in a destructor.
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
        """Seconds until the main thread is interrupted. One that has not met the others yet is
        not: it has to tell them."""
        if self.stop_signal is None:
            return 0.0
        if self.started:
            return FINISH
        return END if self.announced_at is None else self.announced_at - self.noticed_at + TELLING

    @property
    def end_after(self) -> float:
        return WRITING if self.writing else END

    def end(self) -> None:
        """End the process from a thread, the main one does not come back."""
        seconds = time.monotonic() - self.noticed_at
        said = (
            f"stopped by {self.stop_signal.name}"
            if self.stop_signal
            else str(LostProcess(str(self.lost)))
        )
        self.print_line(
            f"{said}: ended after {seconds:.0f} s in which it did not come to an end by itself"
        )
        os._exit(128 + self.stop_signal if self.stop_signal else 2)

    # ---- the store -------------------------------------------------------------------------------

    def host(self, host: str) -> int:
        """Make the store, in the first process: its port."""
        self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return self.store.port

    def join(self, host: str, port: int, rank: int, size: int) -> None:
        """Talk to the other processes from now on, in a thread."""
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
        except (RuntimeError, ValueError) as error:  # the first process is gone, and its store
            if not self.closed.wait(2 * POLL):  # not because the run is over
                self.report_lost(f"process 0: {error}")

    def wait_for_reason(self) -> None:
        """Once a message has failed: whether the other process was asked to stop may be heard a
        moment later."""
        until = time.monotonic() + TELLING
        while self.stop_signal is None and self.lost is None and time.monotonic() < until:
            time.sleep(POLL / 10)

    def wait_until_heard(self) -> None:
        """In the first process, before its store goes: until all have heard why, or no longer
        are."""
        until = time.monotonic() + TELLING
        while (self.stop_signal or self.lost) and time.monotonic() < until:
            if self.store.add("heard", 0) >= self.size:
                break
            time.sleep(POLL / 10)


@contextmanager
def watching(several: bool) -> Iterator[Watch]:
    """A watch over this process, and over the run's others where there are `several`, from the
    first moment: a signal before they have met is passed on as soon as they have."""
    watch = Watch()
    with watch.stack:
        if several and threading.current_thread() is threading.main_thread():
            watch.listen_for_signals()
        yield watch
