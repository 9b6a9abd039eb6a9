"""A run's numbers for TensorBoard. They are a second copy of metrics.jsonl, so whatever goes wrong
with them is one warning, and the run goes on.

The event file is opened for every line of metrics and written in this thread: the package's own
writer has a thread whose exceptions nobody catches, and does not notice that its folder is gone.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from uiollms.files.atomic import make_folder

log = logging.getLogger("uiollms")


class Board:
    """One event file in `folder`. purge: the first iteration of which TensorBoard is to forget what
    it has read from older files in the folder (the run has gone back), None for a new run."""

    def __init__(self, folder: Path, purge: int | None = None) -> None:
        self.folder, self.works = folder, True
        began = time.time()
        place = f"{socket.gethostname()}.{os.getpid()}.{time.time_ns() % 10**9}"
        name = f"events.out.tfevents.{int(began)}.{place}"
        self.path = folder / name
        with self.trying():
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import

            events = [Event(wall_time=began, file_version="brain.Event:2")]
            if purge is not None:
                start = SessionLog(status=SessionLog.START)
                events.append(Event(wall_time=began, step=purge, session_log=start))
            make_folder(folder)
            self.append(events, "xb")

    def add(self, iteration: int, scalars: Iterable[tuple[str, float]]) -> None:
        """The numbers of one iteration, (name, number)."""
        if not self.works:
            return
        with self.trying():
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary

            values = [Summary.Value(tag=name, simple_value=number) for name, number in scalars]
            summary = Summary(value=values)
            self.append([Event(wall_time=time.time(), step=iteration, summary=summary)], "r+b")

    def append(self, events: Iterable[object], mode: str) -> None:
        """mode: of `open`; one that makes no file shows when the file has gone."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        for event in events:
            RecordWriter(buffer).write(event.SerializeToString())  # type: ignore[attr-defined]
        with self.path.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(buffer.getbuffer())

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Around whatever needs the package, its folder or room on the disk."""
        try:
            yield
        except Exception as error:  # of any kind: none is worth a run
            self.works = False
            reason = " ".join(str(error).split()) or type(error).__name__
            said = "the run goes on without TensorBoard, metrics.jsonl has all numbers"
            log.warning("%s: cannot be written (%s); %s", self.folder, reason, said)
