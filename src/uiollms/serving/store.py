"""The documents on disk, in one folder that one server uses.

    mem-0123456789abcdef.json  the record; a document without one does not exist
    mem-0123456789abcdef.txt   the text, until it is compressed
    mem-0123456789abcdef.mem   the memory, once it is complete

Each file is written atomically: the text before its record, the memory before the record that calls
it ready. So a server that is killed finds every document waiting, ready or failed. The name of a
document is in its record only and never a part of a path.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from uiollms.config.corpora import Checked
from uiollms.files.atomic import atomic_file, make_folder, replace_text, reporting_write_errors
from uiollms.files.errors import ConfigError
from uiollms.files.reading import read_text
from uiollms.model.fingerprint import Fingerprint
from uiollms.serving.settings import ApiError

log = logging.getLogger("uiollms")
FILE = re.compile(r"(mem-[0-9a-f]{16})\.(json|txt|mem)")
LONGEST_NAME = 255  # characters
MOST_RECORD = 2**20  # bytes


class Record(Checked):
    """What is stored about a document. tokens, chunks, slots: of the whole document, once it is
    ready. made_by: the model that can read it."""

    name: str
    created: int
    bytes: int
    status: Literal["waiting", "ready", "failed"] = "waiting"
    error: str | None = None
    tokens: int | None = None
    chunks: int | None = None
    slots: int | None = None
    made_by: Fingerprint | None = None


@dataclass
class Document:
    """A record, and what happens to the document now. `cancelled` ends its compression."""

    id: str
    record: Record
    is_active: bool = False
    tokens: int | None = None
    chunks: int | None = None
    chunks_done: int = 0
    cancelled: bool = False


class Store:
    """The documents of `folder`. made_by: the model of this server. Raises ConfigError if the
    folder cannot be used, or if another server uses it."""

    def __init__(self, folder: Path, made_by: Fingerprint, max_memories: int) -> None:
        self.folder, self.made_by, self.max_memories = folder, made_by, max_memories
        self._mutex = threading.Lock()
        self._lock = FileLock(folder / ".lock", thread_local=False)  # another thread releases it
        with reporting_write_errors(folder):
            make_folder(folder)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise ConfigError(
                    f"--folder {folder}: another server uses it; choose another folder"
                ) from None
            self._documents = {d.id: d for d in self._restore()}

    def close(self) -> None:
        self._lock.release()

    def path(self, id: str, suffix: str) -> Path:
        return self.folder / f"{id}{suffix}"

    # ---- documents -------------------------------------------------------------------------------

    def documents(self) -> list[Document]:
        """Returns all documents, the oldest first."""
        with self._mutex:
            return sorted(self._documents.values(), key=lambda d: (d.record.created, d.id))

    def get(self, id: str) -> Document:
        """Raises ApiError if there is no such document."""
        with self._mutex:
            document = self._documents.get(id)
        if document is None:
            raise ApiError(404, "memory_not_found", f"there is no memory {id!r}", "memory")
        return document

    def get_ready(self, id: str) -> Document:
        """Raises ApiError if the document cannot be read, or not yet."""
        document = self.get(id)
        status, error = self.status(document)
        if status != "ready":
            reason = error or "wait until its status is ready"
            raise ApiError(
                409, "memory_not_ready", f"memory {id!r} is {status}: {reason}", "memory"
            )
        return document

    def add(self, name: str, file: BinaryIO) -> Document:
        """Stores a text of which nothing is checked yet. Raises ApiError for one too many."""
        id = f"mem-{secrets.token_hex(8)}"
        path = self.path(id, ".txt")
        with atomic_file(path) as work, work.open("wb") as target:
            shutil.copyfileobj(file, target, 2**20)
        document = Document(id, Record(name=name, created=int(time.time()), bytes=file.tell()))
        try:
            with self._mutex:
                if len(self._documents) >= self.max_memories:
                    raise ApiError(
                        409,
                        "too_many_memories",
                        f"there are {self.max_memories} memories, the most that this server "
                        "stores; delete one",
                    )
                self._write(document)
                self._documents[id] = document
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return document

    def delete(self, id: str) -> None:
        """Raises ApiError if there is no such document."""
        document = self.get(id)
        with self._mutex:
            document.cancelled = True
            self._documents.pop(id, None)
            for suffix in (".json", ".txt", ".mem"):  # without its record it does not exist
                self.path(id, suffix).unlink(missing_ok=True)

    def finish(self, document: Document, **changes: Any) -> None:
        """Writes what has become of a document, unless it was deleted meanwhile."""
        with self._mutex:
            if document.cancelled:
                self.path(document.id, ".mem").unlink(missing_ok=True)
                return
            document.record = document.record.model_copy(update=changes)
            self._write(document)
            self.path(document.id, ".txt").unlink(missing_ok=True)

    def text(self, document: Document) -> str:
        """Raises ConfigError if the file is not text. The message begins with the name."""
        path = self.path(document.id, ".txt")
        try:
            return read_text(path, document.record.bytes)
        except ConfigError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise ConfigError(f"the document cannot be read: {reason}") from None

    def status(self, document: Document) -> tuple[str, str | None]:
        """Returns the status and the reason of a failure."""
        record = document.record
        if record.status == "ready" and record.made_by != self.made_by:
            return "failed", "another model made it; upload the document again"
        if record.status == "waiting" and document.is_active:
            return "compressing", None
        return record.status, record.error

    # ---- files -----------------------------------------------------------------------------------

    def _write(self, document: Document) -> None:
        replace_text(self.path(document.id, ".json"), document.record.model_dump_json())

    def _restore(self) -> list[Document]:
        """Returns the documents of the folder, and removes files that a killed server left."""
        files = [match for path in self.folder.iterdir() if (match := FILE.fullmatch(path.name))]
        names = {match[0] for match in files}
        found = []
        for match in files:
            id, suffix = match.groups()
            if suffix != "json":
                if f"{id}.json" not in names:
                    (self.folder / match[0]).unlink()
                continue
            try:
                text = read_text(self.folder / match[0], MOST_RECORD)
                record = Record.model_validate_json(text)
            except (ConfigError, ValidationError):
                log.warning("%s: is not a record of this server; ignored", self.folder / match[0])
                continue
            needed = {"waiting": "txt", "ready": "mem"}.get(record.status)
            if needed and f"{id}.{needed}" not in names:
                changes = dict(status="failed", error="its file is missing; upload it again")
                record = record.model_copy(update=changes)
            found.append(Document(id, record))
        return found
