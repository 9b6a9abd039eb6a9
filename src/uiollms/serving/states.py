"""The loaded memories. A state is a value that any number of answers continue."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from uiollms.files.errors import ConfigError
from uiollms.model.memory import Memory, join
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState
from uiollms.serving.settings import ApiError
from uiollms.serving.store import Store


@dataclass(frozen=True, eq=False)
class Loaded:
    """A state that has read memories. chunks: for every chunk of `state`, the memory's id and the
    number of the chunk in it."""

    state: MemoryState
    chunks: list[tuple[str, int]]

    @property
    def num_bytes(self) -> int:
        state = self.state
        buffers = [t for b in state.buffers.values() for t in (b.keys, b.values)]
        tensors = buffers or [*state.memory_keys, *state.memory_values]
        return sum(t.untyped_storage().nbytes() for t in tensors)


class States:
    """The states that were used last, up to `size` bytes. A larger one is used and not stored.
    Only the thread whose turn it is may call the methods."""

    def __init__(self, model: MemoryLM, store: Store, size: int) -> None:
        self.model, self.store, self.size = model, store, size
        self._loaded: OrderedDict[tuple[str, ...], Loaded] = OrderedDict()
        self.num_bytes = 0

    @torch.no_grad()
    def get(self, ids: tuple[str, ...]) -> Loaded:
        """Returns the state after the documents, in this order. Raises ApiError if one is not
        there or not ready, or if they exceed the capacity together."""
        documents = [self.store.get_ready(id) for id in ids]
        if not ids:
            return Loaded(self.model.new_state(), [])
        if ids in self._loaded:
            self._loaded.move_to_end(ids)
            return self._loaded[ids]
        length = sum(document.record.tokens or 0 for document in documents)
        if length > self.model.capacity:
            raise ApiError(
                400,
                "context_length_exceeded",
                f"the memories have {length} tokens together, the capacity is "
                f"{self.model.capacity}",
                "memory",
            )
        loaded = self._load(ids)
        if loaded.num_bytes <= self.size:
            self._make_room(loaded.num_bytes)
            self._loaded[ids] = loaded
            self.num_bytes += loaded.num_bytes
        return loaded

    def _load(self, ids: tuple[str, ...]) -> Loaded:
        try:
            memories = [Memory.load(self.store.path(id, ".mem"), self.model) for id in ids]
        except ConfigError as error:
            reason = str(error).removeprefix(f"{self.store.folder}/")
            raise ApiError(409, "memory_damaged", reason, "memory") from None
        counts = zip(ids, (memory.slots.shape[1] for memory in memories), strict=True)
        chunks = [(id, number) for id, count in counts for number in range(count)]
        return Loaded(join(memories).state(self.model), chunks)

    def _make_room(self, num_bytes: int) -> None:
        while self._loaded and self.num_bytes + num_bytes > self.size:
            _, oldest = self._loaded.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def forget(self, id: str) -> None:
        """Removes the states that contain a document."""
        for ids in [ids for ids in self._loaded if id in ids]:
            self.num_bytes -= self._loaded.pop(ids).num_bytes
