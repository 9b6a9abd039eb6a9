"""The thread that compresses documents, one after another, a batch of chunks in each turn."""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from uiollms.data.tokens import tokenize
from uiollms.files.errors import ConfigError
from uiollms.model.memory_lm import MemoryLM
from uiollms.serving.store import Document, Store
from uiollms.serving.turns import Turns

log = logging.getLogger("uiollms")


class Interrupted(Exception):
    """The document was deleted, or the server ends."""


class Compression(threading.Thread):
    """Compresses the waiting documents of `store`, then those that are added. The tokenizer is
    copied, since the one of the answers may not be used at the same time."""

    def __init__(self, model: MemoryLM, tokenizer: Any, store: Store, turns: Turns) -> None:
        super().__init__(name="compression", daemon=True)
        self.model, self.tokenizer = model, copy.deepcopy(tokenizer)
        self.store, self.turns = store, turns
        self._ended = False
        self._queue: queue.SimpleQueue[Document | None] = queue.SimpleQueue()
        for document in store.documents():
            if document.record.status == "waiting":
                self._queue.put(document)

    def add(self, document: Document) -> None:
        self._queue.put(document)

    def close(self) -> None:
        """Ends the thread after the batch of chunks that it works on. A document that is not
        complete is compressed again when the server starts again."""
        self._ended = True
        self._queue.put(None)
        if self.is_alive():
            self.join()

    def run(self) -> None:
        while (document := self._queue.get()) is not None and not self._ended:
            try:
                self.compress(document)
            except Interrupted:
                continue
            except Exception as error:
                known = isinstance(error, ConfigError | ValueError)
                if not known:
                    log.exception("%s: compression failed", document.id)
                reason = str(error) if known else f"internal error ({type(error).__name__})"
                self.finish(document, status="failed", error=reason)

    def compress(self, document: Document) -> None:
        def progress(batches: Sequence[Tensor]) -> Iterator[Tensor]:
            for batch in batches:
                if document.cancelled or self._ended:
                    raise Interrupted
                yield batch
                document.chunks_done += len(batch)
                self.turns.pass_on()

        if document.cancelled:
            raise Interrupted
        document.is_active = True
        ids = tokenize(self.tokenizer, self.store.text(document))
        document.tokens = len(ids)
        document.chunks = len(ids) // self.model.memory_config.chunk_size
        with self.turns:
            memory = self.model.compress(ids, source=document.record.name, progress=progress)
        memory.save(self.store.path(document.id, ".mem"))
        self.finish(
            document,
            status="ready",
            tokens=memory.num_tokens,
            chunks=memory.slots.shape[1],
            slots=memory.num_slots,
            made_by=memory.made_by,
        )

    def finish(self, document: Document, **changes: Any) -> None:
        try:
            self.store.finish(document, **changes)
        except OSError as error:  # such as a full disk; the record still says that it waits
            log.error("%s: cannot be written (%s)", document.id, error.strerror)
            document.record = document.record.model_copy(
                update=dict(status="failed", error="the server cannot write to its disk")
            )
        finally:
            document.is_active = False
