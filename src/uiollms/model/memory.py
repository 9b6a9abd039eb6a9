"""Compressed documents. A model makes a `Memory`, which is saved, loaded, joined with others, and
read by streams.

It contains the encoder's outputs, before the decoder's projection rotates them to positions. So the
memories of several documents can be joined in any order without encoding them again.

Shapes: L layers, C chunks, l chunk_size, m num_memory, D hidden size, p tokens that do not fill a
chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uiollms.data.limits import check_ids
from uiollms.files.errors import ConfigError
from uiollms.model.fingerprint import Fingerprint, fingerprint
from uiollms.model.memory_file import FLOATS, OLD_FORMAT, Source, read_memory, write_memory
from uiollms.model.peft_prefix import save_prefix
from uiollms.model.state import MemoryState, join_slots, select_recent_ids
from uiollms.weights.fitness import not_finite

log = logging.getLogger("uiollms")


@dataclass(frozen=True, eq=False)
class Memory:
    """Compressed documents.

    slots [L, C, m, D]: the memory of every chunk, in the dtype of the model that made it, on the
    CPU. open_ids [p] int64: the tokens after the last full chunk of each document; a state reads
    them as they are, after all slots. sources: the documents, in order. made_by: the fingerprint
    of the models that can read it. chunk_ids [C, l] int64: the tokens of the chunks. Options of
    `generate` that process the text need them, and the last `recent_tokens` are fed again with the
    next chunk. They are None in files of version 0.1, which do not contain them.
    """

    slots: Tensor
    open_ids: Tensor
    sources: tuple[Source, ...]
    made_by: Fingerprint
    chunk_ids: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all documents."""
        return sum(source.num_tokens for source in self.sources)

    @property
    def num_slots(self) -> int:
        """The number of memory slots in each layer."""
        return self.slots.shape[1] * self.slots.shape[2]

    def check(self, model: Any, name: str | Path = "the memory") -> None:
        """Raises ConfigError if `model` cannot read the memory: another model made it, chunk_ids
        are missing that the model needs, or token ids are outside its vocabulary. The message
        begins with `name` and lists what differs."""
        differences = self.made_by.differences(model)
        size = len(self.slots), self.slots.shape[-1]
        model_size = model.base.config.num_hidden_layers, model.base.config.hidden_size
        if not differences and size != model_size:
            differences = [
                f"slots of {size[0]} layers of {size[1]} numbers, this model's are "
                f"{model_size[0]} of {model_size[1]}"
            ]
        if differences:
            raise ConfigError(
                f"{name}: made by another model: {'; '.join(differences)}; compress the text again "
                "with this one"
            )
        recent = model.memory_config.recent_tokens
        if recent and self.chunk_ids is None and self.num_slots:
            raise ConfigError(
                f"{name}: holds no chunk_ids, whose last {recent} are fed again (recent_tokens); "
                "compress the text again"
            )
        try:
            check_ids(self.open_ids, model.base.config.vocab_size)
            if self.chunk_ids is not None:
                check_ids(self.chunk_ids, model.base.config.vocab_size)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None

    @torch.no_grad()
    def state(self, model: Any) -> MemoryState:
        """Returns the state of a stream of one row that has read the documents, for
        `model.generate(ids, state=...)` and `model(ids, state)`. Raises ConfigError if another
        model made the memory, and ValueError if the documents together exceed the capacity."""
        self.check(model)
        model.check_length(self.num_tokens)
        state = model.new_state()
        num_chunks = self.slots.shape[1]
        if num_chunks:
            layers = [
                slots.to(empty) for slots, empty in zip(self.slots, state.memory_keys, strict=True)
            ]
            keys, values = model.project(layers, range(num_chunks))
            state.memory_keys = [join_slots(k, 1) for k in keys]
            state.memory_values = [join_slots(v, 1) for v in values]
            state.num_tokens = num_chunks * model.memory_config.chunk_size
            state.text = None
            if self.chunk_ids is not None:
                state.text = self.chunk_ids.reshape(1, -1).to(state.open_ids.device)
                state.recent_ids = select_recent_ids(state.text, model.memory_config)
        if not len(self.open_ids):
            return state
        return model(self.open_ids[None], state, logits_to_keep=1).past_key_values

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with a checksum of all its bytes. If it fails, a file that was
        at `path` stays as it was. Raises ConfigError if slots are NaN or infinite."""
        path = Path(path)
        if not_finite([("slots", self.slots)]):
            raise ConfigError(
                f"{path}: not saved: the memory holds NaN or infinite numbers; compress with the "
                "base in another dtype (float16 ends at 65504), or with other weights"
            )
        tensors = {"slots": self.slots, "open_ids": self.open_ids}
        if self.chunk_ids is not None:
            tensors["chunk_ids"] = self.chunk_ids
        write_memory(path, tensors, self.made_by, self.sources)

    def to_peft(self, folder: str | Path, model: Any) -> None:
        """Writes the documents as an adapter that PEFT loads onto the plain base, see
        model/peft_prefix.py. `model` is needed because a memory contains the encoder's outputs; the
        keys and values of the adapter are their projections with the decoder's LoRA. Raises
        ConfigError as `state` does, and if there are no slots."""
        save_prefix(self.state(model), model, folder)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Memory:
        """Reads a file that `save` wrote. If `model` is given, it is checked that it can read the
        memory. Warns of files of version 0.1, of which less can be checked.

        Raises ConfigError, whose message begins with the path, if a byte of the file has changed,
        if a field or tensor is not as `save` writes it, or if another model made the memory.
        """
        header, tensors = read_memory(Path(path))
        memory = cls(
            tensors["slots"],
            tensors["open_ids"],
            header.sources,
            header.made_by,
            tensors.get("chunk_ids"),
        )
        if fault := memory.find_fault():
            raise ConfigError(f"{path}: {fault}; compress the text again")
        if model is not None:
            memory.check(model, path)
        if header.format == OLD_FORMAT:
            log.warning(
                "%s: written by version 0.1, without a checksum and without its text. A damaged "
                "file or another base may not be noticed, and generation cannot avoid repeating "
                "the text. Compress it again.",
                path,
            )
        return memory

    def find_fault(self) -> str | None:
        """Returns the reason why tensors, sources and fingerprint do not fit together, or None if
        they do."""
        compressor, shape = self.made_by.compressor, tuple(self.slots.shape)
        if self.slots.dtype not in FLOATS or len(shape) != 4 or not shape[0] or not shape[3]:
            return f"slots: {self.slots.dtype} {list(shape)} are no memory slots"
        if shape[2] != compressor.num_memory:
            return (
                f"slots: {shape[2]} a chunk, but made_by.compressor.num_memory is "
                f"{compressor.num_memory}"
            )
        l = compressor.chunk_size
        num_chunks = sum(source.num_tokens // l for source in self.sources)
        num_open = sum(source.num_tokens % l for source in self.sources)
        if shape[1] != num_chunks:
            return f"slots: of {shape[1]} chunks, but the sources have {num_chunks}"
        expected = {
            "open_ids": (self.open_ids, [num_open]),
            "chunk_ids": (self.chunk_ids, [num_chunks, l]),
        }
        for name, (ids, ids_shape) in expected.items():
            if ids is None:
                continue
            if ids.dtype != torch.int64 or list(ids.shape) != ids_shape:
                return (
                    f"{name}: {ids.dtype} {list(ids.shape)}, but by the sources it must be int64 "
                    f"{ids_shape}"
                )
            if ids.numel() and ids.min() < 0:
                return f"{name}: {int(ids.min())} is no token id"
        return None


@torch.no_grad()
def compress(
    model: Any, ids: Tensor, source: str, progress: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> Memory:
    """Compresses a document of token ids, [T] or [1, T]. source: the name of the document.
    progress: wraps the batches of chunks, to show a progress bar. Raises ValueError if the
    document exceeds the capacity, and for more than one document."""
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(
            f"compress takes one document [T], found {list(ids.shape)}; compress each, then join "
            "them"
        )
    model.check_length(len(ids))
    check_ids(ids, model.base.config.vocab_size)
    config, ids = model.memory_config, ids.cpu()
    num_full = len(ids) // config.chunk_size * config.chunk_size  # tokens of full chunks
    chunks = ids[:num_full].view(-1, config.chunk_size)
    shape = model.base.config.num_hidden_layers, 0, config.num_memory, model.base.config.hidden_size
    parts = [torch.empty(shape, dtype=model.dtype)]
    for batch in progress(chunks.split(model.chunk_batch) if len(chunks) else ()):
        layers = model.encode_layers(batch)
        parts.append(torch.stack([layer.cpu() for layer in layers]))
    # A file name that is not valid UTF-8 contains surrogates, which cannot be written to a file.
    name = source.encode("utf-8", "backslashreplace").decode()
    return Memory(
        slots=torch.cat(parts, dim=1),
        open_ids=ids[num_full:].clone(),
        sources=(Source(name=name, num_tokens=len(ids)),),
        made_by=fingerprint(model),
        chunk_ids=chunks.clone(),
    )


def join(memories: Sequence[Memory]) -> Memory:
    """Joins documents without encoding anything again: all full chunks in order, then the tokens
    that are left over of each document. Raises ConfigError for memories of different models."""
    first, *others = memories
    for other in others:
        if other.made_by != first.made_by:
            names = f"{other.sources[0].display_name} and {first.sources[0].display_name}"
            reason = "were compressed by different models"
            if other.made_by.covers != first.made_by.covers:
                reason = "were written by different versions of this program"
            raise ConfigError(
                f"{names} {reason} and cannot be joined; compress both again with one"
            )
    chunk_ids = [memory.chunk_ids for memory in memories if memory.chunk_ids is not None]
    return Memory(
        slots=torch.cat([memory.slots for memory in memories], dim=1),
        open_ids=torch.cat([memory.open_ids for memory in memories]),
        sources=tuple(source for memory in memories for source in memory.sources),
        made_by=first.made_by,
        chunk_ids=torch.cat(chunk_ids) if len(chunk_ids) == len(memories) else None,
    )
