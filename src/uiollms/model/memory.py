"""Documents compressed once and kept: a Memory is made by a model, saved, loaded, joined with
others, and asked.

What is kept is what the encoder leaves behind, before the decoder's projection gives it
positions. So memories of several documents can stand one behind the other in any order, without
being encoded again. Shapes: L layers, C chunks, m num_memory, D hidden size, p tokens that do
not fill a chunk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor

from uiollms.config.corpora import Checked
from uiollms.config.load import parse
from uiollms.data.limits import check_ids
from uiollms.files.atomic import atomic_file, make_folder
from uiollms.files.errors import ConfigError, shortened
from uiollms.files.json_files import loads
from uiollms.files.reading import check_tree
from uiollms.model.fingerprint import Fingerprint, fingerprint
from uiollms.model.state import MemoryState, join_slots, select_recent_ids
from uiollms.weights.fitness import not_finite

log = logging.getLogger("uiollms")


class Source(Checked):
    """A document that went into a memory."""

    name: str
    num_tokens: Annotated[int, Field(ge=0, lt=2**63)]

    @property
    def shown(self) -> str:
        """The name as a terminal may have it: quoted, what is not printable escaped, not too
        long."""
        return repr(self.name if len(self.name) <= LONGEST else f"{self.name[:LONGEST]}..")


class Header(Checked):
    """What stands in the file beside the tensors. sha256: of the whole file, with zeros in its
    place."""

    format: Literal["uiollms memory 1", "uiollms memory 2"]
    made_by: Fingerprint
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    sha256: str = ""


OLD, FORMAT = "uiollms memory 1", "uiollms memory 2"
UNKNOWN = "0" * 64  # where the file's sha256 goes
SUM = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
LONGEST = 60  # letters of a name that are shown
LONGEST_HEADER = 100 * 2**20  # bytes, as safetensors has it
DAMAGED = "damaged: not the bytes that were written (sha256); copy it, or compress the text, again"
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OVERFLOW = "compress with the base in another dtype (float16 ends at 65504), or with other weights"


@dataclass(frozen=True, eq=False)
class Memory:
    """Compressed documents.

    slots [L, C, m, D]: every chunk's memory, in the dtype of the model that made it, on the CPU;
    open_ids [p] int64: the tokens behind each document's last full chunk, which stay as they
    are: a state reads them last; sources: the documents, in order; made_by: the model that can
    read it; chunk_ids [C, l] int64: the tokens of the chunks, for what looks at the text while
    an answer is generated, the last of them to be fed again in front of the next chunk
    (recent_tokens); None in files of version 0.1, which do not keep them.
    """

    slots: Tensor
    open_ids: Tensor
    sources: tuple[Source, ...]
    made_by: Fingerprint
    chunk_ids: Tensor | None = None

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
        differing = self.made_by.differing(model)
        size = len(self.slots), self.slots.shape[-1]
        own = model.config.num_hidden_layers, model.config.hidden_size
        if not differing and size != own:
            differing = [
                f"slots of {size[0]} layers of {size[1]} numbers, this model's are {own[0]} of "
                f"{own[1]}"
            ]
        if differing:
            raise ConfigError(
                f"{name}: made by another model: {'; '.join(differing)}; compress the text again "
                "with this one"
            )
        recent = model.memory_config.recent_tokens
        if recent and self.chunk_ids is None and self.num_slots:
            lacks = f"holds no chunk_ids, whose last {recent} are fed again (recent_tokens)"
            raise ConfigError(f"{name}: {lacks}; compress the text again")
        try:
            check_ids(self.open_ids, model.config.vocab_size)
            if self.chunk_ids is not None:
                check_ids(self.chunk_ids, model.config.vocab_size)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None

    @torch.no_grad()
    def state(self, model: Any) -> MemoryState:
        """A stream of one row that has read the documents, for `model.generate(ids, state=...)`
        and `model(ids, state)`. Raises ConfigError for another model's memory, ValueError where
        the documents together are past the capacity."""
        self.check(model)
        model.check_length(self.num_tokens)
        state = model.new_state()
        chunks = self.slots.shape[1]
        if chunks:
            layers = [
                slots.to(empty) for slots, empty in zip(self.slots, state.memory_keys, strict=True)
            ]
            keys, values = model.project(layers, range(chunks))
            state.memory_keys, state.memory_values = (
                [join_slots(k, 1) for k in keys],
                [join_slots(v, 1) for v in values],
            )
            state.num_tokens = chunks * model.memory_config.chunk_size
            if self.chunk_ids is not None:
                state.text = self.chunk_ids.reshape(1, -1).to(state.open_ids.device)
                state.recent_ids = select_recent_ids(state.text, model.memory_config)
            else:
                state.text = None
        return (
            model(self.open_ids[None], state, logits_to_keep=1).past_key_values
            if len(self.open_ids)
            else state
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a checksum of all of it; a save that fails leaves what
        was at `path`. Raises ConfigError for slots that hold NaN or infinite numbers."""
        path = Path(path)
        if not_finite([("slots", self.slots)]):
            raise ConfigError(
                f"{path}: not saved: the memory holds NaN or infinite numbers; {OVERFLOW}"
            )
        make_folder(path.parent)
        header = Header(
            format="uiollms memory 2", made_by=self.made_by, sources=self.sources, sha256=UNKNOWN
        )
        tensors = {"slots": self.slots.contiguous(), "open_ids": self.open_ids.contiguous()}
        if self.chunk_ids is not None:
            tensors["chunk_ids"] = self.chunk_ids.contiguous()
        data = as_bytes(tensors, metadata={"uiollms": header.model_dump_json()})
        end = 8 + int.from_bytes(data[:8], "little")
        start, rest = data[:end], memoryview(data)[end:]
        place = SUM.search(start)
        assert place
        summed = start[: place.start(1)] + checksum(start, [rest]).encode() + start[place.end(1) :]
        with atomic_file(path) as work, work.open("wb") as file:
            file.write(summed)
            file.write(rest)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Memory:
        """Read a file of `save`, and check that `model`, if given, made it. Warns of files of
        version 0.1, of which less can be checked. Raises ConfigError naming the file: where a
        byte has changed, a field or tensor is not what `save` writes, or another model made it."""
        header, tensors = read(Path(path))
        memory = cls(
            tensors["slots"],
            tensors["open_ids"],
            header.sources,
            header.made_by,
            tensors.get("chunk_ids"),
        )
        if fault := memory.fault():
            raise ConfigError(f"{path}: {fault}; compress the text again")
        if model is not None:
            memory.check(model, path)
        if header.format == OLD:
            log.warning(
                "%s: written by version 0.1, without a checksum and without its text: a damaged "
                "file or another "
                "base may pass unnoticed, and answers cannot be kept from repeating the text; "
                "compress it again",
                path,
            )
        return memory

    def fault(self) -> str | None:
        """Why tensors and header are not those of one memory; None if they are."""
        compressor, shape = self.made_by.compressor, tuple(self.slots.shape)
        if self.slots.dtype not in FLOATS or len(shape) != 4 or not shape[0] or not shape[3]:
            return f"slots: {self.slots.dtype} {list(shape)} are no memory slots"
        if shape[2] != compressor.num_memory:
            return (
                f"slots: {shape[2]} a chunk, but made_by.compressor.num_memory is "
                f"{compressor.num_memory}"
            )
        size = compressor.chunk_size
        full = sum(source.num_tokens // size for source in self.sources)
        left = sum(source.num_tokens % size for source in self.sources)
        if shape[1] != full:
            return f"slots: of {shape[1]} chunks, but the sources have {full}"
        wanted = {"open_ids": (self.open_ids, (left,)), "chunk_ids": (self.chunk_ids, (full, size))}
        for name, (ids, expected) in wanted.items():
            if ids is None:
                continue
            if ids.dtype != torch.int64 or tuple(ids.shape) != expected:
                return (
                    f"{name}: {ids.dtype} {list(ids.shape)}, but the sources make it int64 "
                    f"{list(expected)}"
                )
            if ids.numel() and ids.min() < 0:
                return f"{name}: {int(ids.min())} is no token id"
        return None


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """The header and tensors of a memory's file. Raises ConfigError for what is no such file, for
    numbers that are none, and for a checksum that is another."""
    try:
        check_tree(path)  # a pipe would be waited for
        with path.open("rb") as file:
            start, written = read_start(file, path)
            found = checksum(start, iter(partial(file.read, 2**20), b""))
        header = read_header(written, path, damaged=sum_in(start) != found)
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # another's file fails in any way that the library knows
        raise ConfigError(f"{path}: not a memory, or damaged ({words_of(error)})") from None
    if not_finite((name, t) for name, t in tensors.items() if t.dtype in FLOATS):
        raise ConfigError(
            f"{path}: the memory holds NaN or infinite numbers; compress the text again"
        )
    if header.format == FORMAT and found != header.sha256:
        raise ConfigError(f"{path}: {DAMAGED}")
    if tensors.keys() - {"chunk_ids"} != {"slots", "open_ids"}:
        raise ConfigError(f"{path}: a safetensors file, but not a memory made by `compress`")
    return header, tensors


def read_start(file: BinaryIO, path: Path) -> tuple[bytes, str]:
    """All bytes of a memory's file up to the tensors, and what `save` has written there. Raises
    ConfigError for another file, of which no more is read."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    try:
        if len(first) < 8 or length > LONGEST_HEADER:
            raise ValueError("no safetensors header")
        start = first + file.read(length)
        metadata = json.loads(start[8:]).get("__metadata__")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a memory, or damaged ({words_of(error)})") from None
    written = metadata.get("uiollms") if isinstance(metadata, dict) else None
    if not isinstance(written, str):
        raise ConfigError(f"{path}: a safetensors file, but not a memory made by `compress`")
    return start, written


def read_header(written: str, path: Path, damaged: bool) -> Header:
    """damaged: the file has another checksum, which says more than what is wrong with the
    header."""
    try:
        header = parse(Header, loads(written, f"{path}: header"), path)
    except (ValueError, RecursionError) as error:
        if damaged:
            raise ConfigError(f"{path}: {DAMAGED}") from None
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a memory, or damaged ({words_of(error)})") from None
    if (header.format == FORMAT) != bool(header.sha256):
        raise ConfigError(f"{path}: {DAMAGED}")
    return header


def checksum(start: bytes, rest: Iterable[bytes | memoryview]) -> str:
    """The SHA-256 of a memory's file, with zeros where it stands itself, in the header; "" where it
    has no place. start: up to the header's end; rest: what is behind it, in parts."""
    place = SUM.search(start)
    if place is None:
        return ""
    hashed = hashlib.sha256(start[: place.start(1)] + UNKNOWN.encode() + start[place.end(1) :])
    for part in rest:
        hashed.update(part)
    return hashed.hexdigest()


def sum_in(start: bytes) -> str:
    """The checksum that stands in a memory's file; "" where there is none."""
    place = SUM.search(start)
    return place[1].decode() if place else ""


def words_of(error: Exception) -> str:
    """An error's words on one line; they may hold what is in a file."""
    return shortened(ascii(str(error))[1:-1], 200)


@torch.no_grad()
def compress(
    model: Any, ids: Tensor, source: str, progress: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> Memory:
    """[T] or [1, T] token ids -> Memory. progress: wraps the batches of chunks, to show how far
    it is. Raises ValueError past the capacity, and for more than one document."""
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(
            f"compress takes one document [T], found {list(ids.shape)}; compress each, then join "
            "them"
        )
    model.check_length(len(ids))
    check_ids(ids, model.config.vocab_size)
    config = model.memory_config
    full = len(ids) // config.chunk_size * config.chunk_size
    parts = [
        torch.empty(
            model.config.num_hidden_layers,
            0,
            config.num_memory,
            model.config.hidden_size,
            dtype=model.dtype,
        )
    ]
    ids = ids.cpu()
    chunks = ids[:full].view(-1, config.chunk_size)
    for batch in progress(chunks.split(model.chunk_batch) if len(chunks) else ()):
        layers = model.encode_layers(batch)
        parts.append(torch.stack([layer.cpu() for layer in layers]))
    # A name of bytes that are no text has halves of surrogate pairs, which no file can hold.
    named = Source(name=source.encode("utf-8", "backslashreplace").decode(), num_tokens=len(ids))
    slots = torch.cat(parts, dim=1)
    return Memory(slots, ids[full:].clone(), (named,), fingerprint(model), chunks.clone())


def join(memories: Sequence[Memory]) -> Memory:
    """Documents one behind the other, nothing encoded again: all full chunks in order, then,
    raw, what was left over of each. Raises ConfigError for memories of different models."""
    first, *others = memories
    for other in others:
        if other.made_by != first.made_by:
            both = f"{other.sources[0].shown} and {first.sources[0].shown}"
            why = "were compressed by different models"
            if other.made_by.covers != first.made_by.covers:
                why = "were written by different versions of this program"
            raise ConfigError(f"{both} {why} and cannot be joined; compress both again with one")
    slots = torch.cat([memory.slots for memory in memories], dim=1)
    open_ids = torch.cat([memory.open_ids for memory in memories])
    known = [memory.chunk_ids for memory in memories if memory.chunk_ids is not None]
    chunk_ids = torch.cat(known) if len(known) == len(memories) else None
    sources = tuple(source for memory in memories for source in memory.sources)
    return Memory(slots, open_ids, sources, first.made_by, chunk_ids)
