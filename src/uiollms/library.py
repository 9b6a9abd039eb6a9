"""Documents compressed once and kept: a Memory is made by a model, saved, loaded, joined with others, and asked.

What is kept is what the encoder leaves behind, before the decoder's projection gives it positions. So memories of several
documents can stand one behind the other in any order, without being encoded again.
Shapes: L layers, C chunks, m num_memory, D hidden size, p tokens that do not fill a chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor

from uiollms.config import Checked, ConfigError, MemoryConfig, parse
from uiollms.fitness import check_ids, not_finite
from uiollms.integrity import replacing
from uiollms.memory import MemoryState, join_slots
from uiollms.reading import check_tree


class Fingerprint(Checked):
    """What a memory can be read by: the same base, the same trained tensors, the same compressor."""

    base: str
    base_weights: str
    adapter: str
    compressor: MemoryConfig


class Source(Checked):
    """A document that went into a memory."""

    name: str
    num_tokens: int


class Header(Checked):
    """What stands in the file beside the tensors."""

    format: str
    made_by: Fingerprint
    sources: tuple[Source, ...]


FORMAT = "uiollms memory 1"
OVERFLOW = "compress with the base in another dtype (float16 ends at 65504), or with other weights"


@dataclass(frozen=True, eq=False)
class Memory:
    """Compressed documents.

    slots [L, C, m, D]: every chunk's memory, in the dtype of the model that made it, on the CPU;
    open_ids [p] int64: the tokens behind each document's last full chunk, which stay as they are: a state reads them last;
    sources: the documents, in order; made_by: the model that can read it.
    """

    slots: Tensor
    open_ids: Tensor
    sources: tuple[Source, ...]
    made_by: Fingerprint

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(source.num_tokens for source in self.sources)

    @property
    def num_slots(self) -> int:
        """Memory slots a layer holds."""
        return self.slots.shape[1] * self.slots.shape[2]

    def check(self, model: Any, name: str | Path = "the memory") -> None:
        """Raises ConfigError, saying what differs, if another model than `model` made it."""
        own = fingerprint(model)
        differing = [
            f"{field} {getattr(self.made_by, field)}, this model's is {getattr(own, field)}"
            for field in Fingerprint.model_fields
            if getattr(self.made_by, field) != getattr(own, field)
        ]
        if differing:
            raise ConfigError(f"{name}: made by another model: {'; '.join(differing)}; compress the text again with this one")

    @torch.no_grad()
    def state(self, model: Any) -> MemoryState:
        """A stream of one row that has read the documents, for `model.generate(ids, state=...)` and `model(ids, state)`.
        Raises ConfigError for another model's memory, ValueError where the documents together are past the capacity."""
        self.check(model)
        model.check_length(self.num_tokens)
        state = model.new_state()
        chunks = self.slots.shape[1]
        if chunks:
            layers = [slots.to(empty) for slots, empty in zip(self.slots, state.memory_keys, strict=True)]
            keys, values = model.project(layers, range(chunks))
            state.memory_keys, state.memory_values = [join_slots(k, 1) for k in keys], [join_slots(v, 1) for v in values]
            state.num_tokens = chunks * model.memory_config.chunk_size
        return model(self.open_ids[None], state, logits_to_keep=1).past_key_values if len(self.open_ids) else state

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a save that fails leaves what was at `path`. Raises ConfigError for
        slots that hold NaN or infinite numbers."""
        path = Path(path)
        if not_finite([("slots", self.slots)]):
            raise ConfigError(f"{path}: not saved: the memory holds NaN or infinite numbers; {OVERFLOW}")
        path.parent.mkdir(parents=True, exist_ok=True)
        header = Header(format=FORMAT, made_by=self.made_by, sources=self.sources)
        tensors = {"slots": self.slots.contiguous(), "open_ids": self.open_ids.contiguous()}
        with replacing(path) as work:
            work.write_bytes(as_bytes(tensors, metadata={"uiollms": header.model_dump_json()}))

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Memory:
        """Read a file of `save`, and check that `model`, if given, made it. Raises ConfigError naming the file."""
        check_tree(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
        except SafetensorError as error:
            raise ConfigError(f"{path}: not a memory, or damaged ({error})") from None
        if "uiollms" not in metadata or tensors.keys() != {"slots", "open_ids"}:
            raise ConfigError(f"{path}: a safetensors file, but not a memory made by `compress`")
        header = parse(Header, json.loads(metadata["uiollms"]), path)
        if header.format != FORMAT:
            raise ConfigError(f"{path}: format {header.format!r}, this program reads {FORMAT!r}")
        if not_finite(tensors.items()):
            raise ConfigError(f"{path}: the memory holds NaN or infinite numbers; compress the text again")
        memory = cls(tensors["slots"], tensors["open_ids"], header.sources, header.made_by)
        if model is not None:
            memory.check(model, path)
        return memory


@torch.no_grad()
def compress(model: Any, ids: Tensor, source: str, progress: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> Memory:
    """[T] or [1, T] token ids -> Memory. progress: wraps the batches of chunks, to show how far it is. Raises ValueError past
    the capacity, and for more than one document."""
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"compress takes one document [T], found {list(ids.shape)}; compress each, then join them")
    model.check_length(len(ids))
    check_ids(ids, model.config.vocab_size)
    config = model.memory_config
    full = len(ids) // config.chunk_size * config.chunk_size
    parts = [torch.empty(model.config.num_hidden_layers, 0, config.num_memory, model.config.hidden_size, dtype=model.dtype)]
    chunks = ids[:full].view(-1, config.chunk_size)
    for batch in progress(chunks.split(model.chunk_batch) if len(chunks) else ()):
        layers = model.encode_layers(batch)
        parts.append(torch.stack([layer.cpu() for layer in layers]))
    named = Source(name=source, num_tokens=len(ids))
    return Memory(torch.cat(parts, dim=1), ids[full:].cpu().clone(), (named,), fingerprint(model))


def join(memories: Sequence[Memory]) -> Memory:
    """Documents one behind the other, nothing encoded again: all full chunks in order, then, raw, what was left over of
    each. Raises ConfigError for memories of different models."""
    first, *others = memories
    for other in others:
        if other.made_by != first.made_by:
            raise ConfigError(
                f"{other.sources[0].name} and {first.sources[0].name} were compressed by different models and cannot be joined"
            )
    slots = torch.cat([memory.slots for memory in memories], dim=1)
    open_ids = torch.cat([memory.open_ids for memory in memories])
    return Memory(slots, open_ids, tuple(source for memory in memories for source in memory.sources), first.made_by)


def fingerprint(model: Any) -> Fingerprint:
    """Names and hashes of what a memory depends on. Of the base: the last part of its name, its final norm and one
    embedding, in bfloat16, so that the same weights loaded in another dtype are the same base."""
    base = model.base.model
    samples = (base.norm.weight, base.embed_tokens.weight[0])
    trained = (t for _, t in sorted(model.memory_state_dict().items()))
    return Fingerprint(
        base=Path(model.config._name_or_path).name or "unnamed",
        base_weights=digest(t.detach().bfloat16() for t in samples),
        adapter=digest(t.float() for t in trained),
        compressor=model.memory_config.model_copy(update={"lora_dropout": 0.0}),  # dropout is a matter of training
    )


def digest(tensors: Any) -> str:
    """The first 16 hex digits of the SHA-256 of the tensors' bytes."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]
