"""The log of a training run: log.txt, metrics.jsonl and trackers, and the clock of its steps."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from uiollms.files.atomic import reporting_write_errors, sync
from uiollms.files.json_files import replace_nonfinite
from uiollms.runs.board import Board
from uiollms.runs.metrics import cut_metrics, machine_use, scalars
from uiollms.runs.trackers import Tracker

log = logging.getLogger("uiollms")
Item = TypeVar("Item")


class RunLog:
    """The log in a run folder. It writes nothing until `open`, which only the first of a run's
    processes calls; all of them measure the time of their steps.

    loss: the protocol of the training loss, part of a name in the trackers
    echo: called with every line of metrics.jsonl as it is written
    gpus: the GPUs of the model, whose memory is measured
    """

    def __init__(self, folder: Path, loss: str) -> None:
        self.folder, self.loss = folder, loss
        self.metrics = folder / "metrics.jsonl"
        self.echo: Callable[[str], None] = lambda line: None
        self.gpus: Sequence[torch.device] = ()
        self.trackers: list[Board | Tracker] = []
        self.handler: logging.FileHandler | None = None

    def open(
        self, iteration: int, resumed: bool, log_with: Sequence[str], constants: Mapping[str, Any]
    ) -> None:
        """Removes the metrics after `iteration`, at which the run begins or is resumed, opens
        log.txt, and begins or continues a run in each tracker of `log_with`. `constants` are the
        hyperparameters that the trackers show."""
        with reporting_write_errors(self.folder):
            seconds = cut_metrics(self.folder, iteration)
            self.handler = logging.FileHandler(self.folder / "log.txt", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(self.handler)
        log.setLevel(logging.INFO)
        for name in log_with:
            if name == "tensorboard":
                purge = iteration + 1 if resumed else None
                self.trackers.append(Board(self.folder / "tensorboard", purge, constants))
            else:
                self.trackers.append(Tracker(name, self.folder, constants))
        self.began = time.time() - seconds

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        if self.handler is not None:
            log.removeHandler(self.handler)
            self.handler.close()

    def add(self, **values: Any) -> None:
        """Appends a line with these values and the run's seconds so far to metrics.jsonl, and adds
        its numbers to the trackers. Numbers that are not finite become null. The value `tokens`
        counts a step's tokens; from it follow the tokens per second."""
        if self.handler is None:
            return
        line = {"seconds": round(time.time() - self.began, 2), **values}
        if "tokens" in values:
            line["machine"] = machine_use(values["tokens"], self.step_seconds, self.gpus)
        line = replace_nonfinite(line)
        text = json.dumps(line)
        with reporting_write_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.echo(text)
        for tracker in self.trackers:
            tracker.add(values["iteration"], scalars(line, self.loss))

    def sync(self) -> None:
        """Synchronises metrics.jsonl to the disk."""
        with reporting_write_errors(self.metrics):
            sync(self.metrics)

    def timed(self, steps: Iterable[Item]) -> Iterator[Item]:
        """Yields the steps and restart the clock at each, so that the time of evaluations and
        checkpoints, which follow a step, is not counted."""
        for step in steps:
            self.step_began = time.perf_counter()
            yield step

    @property
    def step_seconds(self) -> float:
        """Seconds since `timed` yielded the current step."""
        return time.perf_counter() - self.step_began
