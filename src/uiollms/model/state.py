"""What a stream carries from one call to the next: memories of finished chunks, and the chunk
that is still open.

Shapes: B documents, H key/value heads, M memory slots so far, p tokens of the open chunk, T new
tokens, K head size.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from uiollms.config.sections import MemoryConfig
from uiollms.kernels.flash_attention import asked
from uiollms.kernels.memory_attention import GradientSink

_CLAIMING = threading.Lock()


@dataclass(eq=False)
class KVBuffer:
    """Keys and values [B, H, M + w + l, K] of one layer, memory then open chunk, with room for
    all of the chunk, so that a new token is written behind the last instead of everything being
    copied. States share it: each reads only its own first entries, and only one that holds all
    `length` entries claimed so far may write behind them; another copies."""

    keys: Tensor
    values: Tensor
    length: int

    def holds(self, part: Tensor) -> bool:
        """Whether `part` of the keys is a view of this room's (a state's fields may have been
        replaced)."""
        return (
            not part.numel()
            or part.untyped_storage().data_ptr() == self.keys.untyped_storage().data_ptr()
        )

    def claim(self, taken: int, count: int) -> bool:
        """Whether the `count` entries behind the first `taken` are the caller's to write: nobody
        else's, in any thread."""
        with _CLAIMING:
            free = self.length == taken
            self.length += count if free else 0
            return free

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values


@dataclass(eq=False)
class KVPrefix:
    """Keys and values in front of one decoder call, layer by layer; handed to the layers as
    their `past_key_values`.

    keys, values: by layer number a list of [B, H, ?, K] tensors, oldest first, to which `update`
    joins the call's own. `local` receives, per layer, what of them belongs to the open chunk
    (the last `keep` entries). spare: how many more entries the open chunk may take; without a
    graph, if not 0, `buffers` (by layer) are used and filled.
    """

    keys: Sequence[list[Tensor]] | Mapping[int, list[Tensor]]
    values: Sequence[list[Tensor]] | Mapping[int, list[Tensor]]
    keep: int = 0
    local: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    spare: int = 0
    buffers: dict[int, KVBuffer] = field(default_factory=dict)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object
    ) -> tuple[Tensor, Tensor]:
        """New keys and values [B, H, T, K] -> all that the layer attends to [B, H, M + p + T,
        K]."""
        if self.spare and not torch.is_grad_enabled():
            keys, values = self._append(keys, values, layer)
        else:
            keys = torch.cat([*self.keys[layer], keys], dim=2)
            values = torch.cat([*self.values[layer], values], dim=2)
        if self.keep:
            self.local[layer] = (keys[:, :, -self.keep :], values[:, :, -self.keep :])
        return keys, values

    def _append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        buffer, taken = self.buffers.get(layer), sum(part.shape[2] for part in self.keys[layer])
        batch, heads, length, size = keys.shape
        stop = taken + length
        if (
            buffer is None
            or not all(buffer.holds(part) for part in self.keys[layer])
            or not buffer.claim(taken, length)
        ):
            shape = (batch, heads, stop + self.spare, size)
            buffer = self.buffers[layer] = KVBuffer(
                keys.new_empty(shape), values.new_empty(shape), stop
            )
            start = 0
            for part in zip(self.keys[layer], self.values[layer], strict=True):
                buffer.write(start, *part)
                start += part[0].shape[2]
        buffer.write(taken, keys, values)
        return buffer.keys[:, :, :stop], buffer.values[:, :, :stop]


class MemoryState(Cache):
    """The stream after some tokens. A value: a call returns a new state and leaves the one it
    was given as it was, so several continuations may start from one state.

    memory_keys, memory_values: per layer [B, H, M, K], rotated to their final positions 0 ..
    M-1, never recomputed; local_keys, local_values: per layer [B, H, w + p, K], of the recent
    tokens, once the open chunk holds a token, and its own; open_ids [B, p] int64: the tokens of
    the open chunk, p < chunk_size; recent_ids [B, w] int64: the tokens before the open chunk
    that are fed again in front of it (recent_tokens; none in the first chunk, w 0); num_tokens:
    tokens seen in all; text [B, num_tokens] int64: those tokens, for what looks at them while a
    text is generated; None where they are not known.
    """

    def __init__(
        self,
        memory_keys: list[Tensor],
        memory_values: list[Tensor],
        local_keys: list[Tensor],
        local_values: list[Tensor],
        open_ids: Tensor,
        num_tokens: int,
        recent_ids: Tensor | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.memory_keys, self.memory_values = memory_keys, memory_values
        self.local_keys, self.local_values = local_keys, local_values
        self.open_ids = open_ids
        self.recent_ids = open_ids[:, :0] if recent_ids is None else recent_ids
        self.num_tokens = num_tokens
        self.text = open_ids if open_ids.shape[1] == num_tokens else None
        self.buffers: dict[
            int, KVBuffer
        ] = {}  # where the local keys and values lie, if they do not lie alone

    # On a Mac, transformers runs one token too far and takes it back, which it believes of a cache
    # with no layers of its own.
    is_croppable = False

    @property
    def batch_size(self) -> int:
        """B, documents side by side."""
        return len(self.open_ids)

    @property
    def num_slots(self) -> int:
        """M, memory slots held."""
        return self.memory_keys[0].shape[2]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, compressed ones included (transformers' `generate` feeds only what comes
        after them)."""
        return self.num_tokens

    def text_with(self, ids: Tensor) -> Tensor | None:
        """The text [B, num_tokens + T] that goes on with ids [B, T]; None where its start is not
        known."""
        return (
            None if self.text is None else torch.cat([self.text, ids.to(self.text.device)], dim=1)
        )

    def prefix(self, num_slots: int, with_local: bool, keep: int = 0, spare: int = 0) -> KVPrefix:
        """What a call reads that sees the first `num_slots` slots and, if asked, the open chunk
        so far; `keep` and `spare` as in `AnyPrefix`."""

        def parts(memory: list[Tensor], local: list[Tensor]) -> list[list[Tensor]]:
            return [
                [m[:, :, :num_slots], o] if with_local else [m[:, :, :num_slots]]
                for m, o in zip(memory, local, strict=True)
            ]

        keys = parts(self.memory_keys, self.local_keys)
        buffers = dict(self.buffers) if with_local else {}
        return KVPrefix(
            keys, parts(self.memory_values, self.local_values), keep, spare=spare, buffers=buffers
        )

    def keep_open(self, prefix: KVPrefix) -> None:
        """Take over from a call what belongs to the open chunk; where it lies in rooms, the
        memory is read from there too."""
        layers, slots = range(len(prefix.local)), self.num_slots
        self.local_keys = [prefix.local[i][0] for i in layers]
        self.local_values = [prefix.local[i][1] for i in layers]
        self.buffers = prefix.buffers
        if self.buffers:
            self.memory_keys = [self.buffers[i].keys[:, :, :slots] for i in layers]
            self.memory_values = [self.buffers[i].values[:, :, :slots] for i in layers]

    def select(self, rows: Tensor) -> MemoryState:
        """A new state of the rows [B'] int64, in that order; a row may be taken several times."""

        def picked(tensors: list[Tensor]) -> list[Tensor]:
            return [t.index_select(0, rows.to(t.device)) for t in tensors]

        keys, values = picked(self.memory_keys), picked(self.memory_values)
        open_ids, recent_ids = picked([self.open_ids, self.recent_ids])
        local = picked(self.local_keys), picked(self.local_values)
        state = MemoryState(keys, values, *local, open_ids, self.num_tokens, recent_ids)
        state.text = None if self.text is None else picked([self.text])[0]
        return state

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order (beam search); in place, as transformers asks."""
        self.__dict__.update(self.select(beam_idx).__dict__)


def recent_of(text: Tensor, config: MemoryConfig) -> Tensor:
    """The ids [B, w] that are fed again behind text [B, T], which ends with a full chunk."""
    return text[:, text.shape[1] - config.recent_tokens :]


def join_slots(kv: Tensor, batch: int) -> Tensor:
    """[B * C, H, m, K], document-major -> [B, H, C * m, K]"""
    _, heads, m, size = kv.shape
    return kv.view(batch, -1, heads, m, size).transpose(1, 2).reshape(batch, heads, -1, size)


class SharedPrefix:
    """A document's memory in front of B rows, handed to the layers as their `past_key_values`.
    keys, values: L x [1, H, M, K]. apart: whether the layers attend to it where it lies, if they
    are on a CPU; see `supports_in_place`."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], in_place: bool) -> None:
        self.keys, self.values, self.in_place = keys, values, in_place

    def reads_in_place(self, device: torch.device) -> bool:
        return self.in_place and device.type == "cpu"

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object
    ) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values [B, H, T, K] -> what the layer's attention function
        gets."""
        return (
            (keys, values) if self.reads_in_place(keys.device) else self.joined(keys, values, layer)
        )

    def joined(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values [B, H, T, K] behind the memory's, [B, H, M + T, K]."""
        before = self.expand_rows(layer, len(keys))
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)

    def expand_rows(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values for each of B rows, [B, H, M, K]."""
        return self.keys[layer].expand(rows, -1, -1, -1), self.values[layer].expand(
            rows, -1, -1, -1
        )

    def sink(self, layer: int) -> GradientSink | None:
        """Who takes the gradients of a layer's keys and values; None: autograd."""
        return None


def supports_in_place(base: Any) -> bool:
    """Whether the attention function that the base was loaded with leaves a document's memory
    where it lies."""
    return not asked(base)
