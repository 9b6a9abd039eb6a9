"""How a training run ends after SIGINT or SIGTERM: all of its processes finish the step together,
the first process saves it, and each exits with 128 + the signal's number.

distributed/watch.py receives the signals and passes them on to the other processes. A signal may
come at any moment, so two processes may learn of it in different steps. Here they agree on it at
the same line of the program: train.py calls `agree` after every step, saves, and stops.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

from uiollms.distributed.groups import World

log = logging.getLogger("uiollms")
Item = TypeVar("Item")


class StopSignals:
    """The signal that ends a run. `agreed` is None until all processes have agreed on one."""

    def __init__(self, world: World) -> None:
        self.world, self.watch = world, world.watch
        self.agreed: signal.Signals | None = None

    def agree(self) -> None:
        """Sets `agreed` in all processes if any of them has received a signal. All processes must
        call this at the same line. Raises LostProcess, or SystemExit after a signal, if another
        process has ended."""
        if self.watch.lost:
            raise self.watch.exit_exception()
        number = self.world.max(self.watch.stop_signal or 0)
        if number:
            self.agreed = signal.Signals(number)
            self.watch.request_stop(self.agreed)

    def exit_if_agreed(self) -> None:
        """Raises SystemExit with the exit code of the signal if the processes have agreed on
        one."""
        if self.agreed is not None:
            raise SystemExit(128 + self.agreed)

    def until_signal(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields items until this process learns of a signal, then raises SystemExit. An evaluation
        reads its documents through this, so that a signal interrupts it; the resumed run repeats
        it. The other processes wait meanwhile, so no agreement is needed."""
        for item in items:
            if self.watch.stop_signal:
                raise self.watch.exit_exception()
            yield item

    def log_signal(self, resumable: bool) -> None:
        """Logs which signal has ended the run, if one has. `resumable` is False if the signal came
        before the first step could be trained."""
        if self.watch.stop_signal:
            remedy = "--resume continues the run" if resumable else "nothing was trained yet"
            log.info("stopped by %s; %s", self.watch.stop_signal.name, remedy)
