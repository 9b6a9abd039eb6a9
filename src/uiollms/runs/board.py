"""Write a run's numbers for TensorBoard. They are a second copy of metrics.jsonl, so an error
causes one warning and the run continues.

The event file is opened for every line of metrics and written in the calling thread. The writer of
the tensorboard package is not used: nobody catches the exceptions of its thread, and it does not
notice that its folder has been removed.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uiollms.files.atomic import make_folder

log = logging.getLogger("uiollms")


class Board:
    """A new event file in `folder`. `purge` is None for a new run. For a resumed run it is the
    first iteration after the checkpoint: TensorBoard drops what it has read from that iteration on
    in older files of the folder. `constants` are the run's hyperparameters."""

    def __init__(
        self, folder: Path, purge: int | None = None, constants: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.works = folder, True
        began = time.time()
        process = f"{socket.gethostname()}.{os.getpid()}.{time.time_ns() % 10**9}"
        name = f"events.out.tfevents.{int(began)}.{process}"
        self.path = folder / name
        with self.reporting_errors():
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import

            events = [Event(wall_time=began, file_version="brain.Event:2")]
            if purge is not None:
                start = SessionLog(status=SessionLog.START)
                events.append(Event(wall_time=began, step=purge, session_log=start))
            if constants:
                from tensorboard.plugins.hparams.summary_v2 import hparams_pb

                values = {
                    name: value
                    if isinstance(value, bool | int | float | str)
                    else json.dumps(value)
                    for name, value in constants.items()
                }
                events.append(Event(wall_time=began, summary=hparams_pb(values, name)))
            make_folder(folder)
            self.append(events, "xb")

    def add(self, iteration: int, scalars: Iterable[tuple[str, float]]) -> None:
        """Writes the numbers of one iteration, given as (name, number)."""
        if not self.works:
            return
        with self.reporting_errors():
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary

            values = [Summary.Value(tag=name, simple_value=number) for name, number in scalars]
            summary = Summary(value=values)
            self.append([Event(wall_time=time.time(), step=iteration, summary=summary)], "r+b")

    def close(self) -> None:
        """Does nothing: no file is open between two calls of `add`."""

    def append(self, events: Iterable[object], mode: str) -> None:
        """Appends events to the file, opened in `mode`. The mode "r+b" creates no file, so it fails
        if the file has been removed."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        for event in events:
            RecordWriter(buffer).write(event.SerializeToString())  # type: ignore[attr-defined]
        with self.path.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(buffer.getbuffer())

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Turns any error of a block, such as a missing package or a full disk, into a warning, and
        write nothing more."""
        try:
            yield
        except Exception as error:  # no error of any kind is worth the run
            self.works = False
            reason = " ".join(str(error).split()) or type(error).__name__
            effect = "the run continues without TensorBoard, metrics.jsonl has all numbers"
            log.warning("%s: cannot be written (%s); %s", self.folder, reason, effect)
