"""The memory and the open chunk that a stream carries from one call to the next.

Shapes: B documents, H key/value heads, M memory slots so far, w recent tokens, p tokens of the
open chunk, l chunk_size, T new tokens, K head size.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from uiollms.config.sections import MemoryConfig
from uiollms.kernels.flash_attention import uses_flash_attention
from uiollms.kernels.flash_calls import supports_flash
from uiollms.kernels.memory_attention import GradientSink, expand_rows

_BUFFER_LOCK = threading.Lock()


@dataclass(eq=False)
class KVBuffer:
    """Keys and values [B, H, M + w + l, K] of one layer: the memory, then the open chunk. There
    is space for the whole chunk, so a new token is appended without copying the tokens before it.

    States share a buffer. Each state reads its first entries only. The state that reads all
    `length` claimed entries may append to them; any other state must copy the buffer.
    """

    keys: Tensor
    values: Tensor
    length: int

    def contains(self, keys: Tensor) -> bool:
        """Whether `keys` is a view of this buffer (the fields of a state may be replaced)."""
        storage = self.keys.untyped_storage().data_ptr()
        return not keys.numel() or keys.untyped_storage().data_ptr() == storage

    def claim(self, start: int, count: int) -> bool:
        """Reserves the entries start .. start + count - 1 for the caller. Returns False if another
        state, in any thread, has reserved them before."""
        with _BUFFER_LOCK:
            free = self.length == start
            self.length += count if free else 0
            return free

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values


@dataclass(eq=False)
class KVPrefix:
    """The keys and values that a decoder call reads before its own, layer by layer. The layers
    receive it as their `past_key_values`.

    keys, values: for every layer number a list of [B, H, ?, K] tensors, oldest first.
    num_local: how many of a call's last entries belong to the open chunk; `update` puts their
    keys and values into `local`, by layer. num_reserved: how many more tokens the open chunk may
    take; if it is not 0 and no graph is built, `update` appends to `buffers`, by layer.
    """

    keys: Sequence[list[Tensor]] | Mapping[int, list[Tensor]]
    values: Sequence[list[Tensor]] | Mapping[int, list[Tensor]]
    num_local: int = 0
    local: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    num_reserved: int = 0
    buffers: dict[int, KVBuffer] = field(default_factory=dict)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object
    ) -> tuple[Tensor, Tensor]:
        """Appends a call's keys and values [B, H, T, K]. Returns all keys and values that the
        layer attends to, [B, H, M + w + p + T, K]."""
        if self.num_reserved and not torch.is_grad_enabled():
            keys, values = self._append(keys, values, layer)
        else:
            keys = torch.cat([*self.keys[layer], keys], dim=2)
            values = torch.cat([*self.values[layer], values], dim=2)
        if self.num_local:
            self.local[layer] = (keys[:, :, -self.num_local :], values[:, :, -self.num_local :])
        return keys, values

    def _append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        batch, heads, length, size = keys.shape
        start = sum(part.shape[2] for part in self.keys[layer])
        stop = start + length
        buffer = self.buffers.get(layer)
        if (
            buffer is None
            or not all(buffer.contains(part) for part in self.keys[layer])
            or not buffer.claim(start, length)
        ):
            shape = (batch, heads, stop + self.num_reserved, size)
            buffer = KVBuffer(keys.new_empty(shape), values.new_empty(shape), stop)
            self.buffers[layer] = buffer
            copied = 0
            for part in zip(self.keys[layer], self.values[layer], strict=True):
                buffer.write(copied, *part)
                copied += part[0].shape[2]
        buffer.write(start, keys, values)
        return buffer.keys[:, :, :stop], buffer.values[:, :, :stop]


class MemoryState(Cache):
    """The state of a stream after some tokens. It is a value: a call returns a new state and
    does not change the one that it was given, so several continuations may start from one state.

    memory_keys, memory_values: for every layer [B, H, M, K], rotated to their final positions
    0 .. M-1; they are never recomputed. local_keys, local_values: for every layer [B, H, w + p,
    K], the recent tokens, once the open chunk has a token, and the tokens of the open chunk.
    open_ids [B, p] int64: the tokens of the open chunk, p < chunk_size. recent_ids [B, w] int64:
    the tokens before the open chunk that are fed again with it (`recent_tokens`); none in the
    first chunk, w = 0. num_tokens: the number of tokens so far. text [B, num_tokens] int64: all
    these tokens, for logits processors; None where they are not known.
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
        # By layer, the buffers that the memory and the local keys and values are views of.
        self.buffers: dict[int, KVBuffer] = {}

    # On a Mac transformers generates one token too many and crops the cache, which it assumes to
    # be possible for a cache without layers.
    is_croppable = False

    @property
    def batch_size(self) -> int:
        """B, the number of documents."""
        return len(self.open_ids)

    @property
    def num_slots(self) -> int:
        """M, the number of memory slots."""
        return self.memory_keys[0].shape[2]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of tokens so far, the compressed ones included. The `generate` of
        transformers feeds only the tokens after them."""
        return self.num_tokens

    def text_with(self, ids: Tensor) -> Tensor | None:
        """Returns the text [B, num_tokens + T] that continues with ids [B, T], or None where its
        beginning is not known."""
        if self.text is None:
            return None
        return torch.cat([self.text, ids.to(self.text.device)], dim=1)

    def prefix(
        self, num_slots: int, with_local: bool, num_local: int = 0, num_reserved: int = 0
    ) -> KVPrefix:
        """Returns the prefix of a call that reads the first `num_slots` slots and, where
        `with_local`, the open chunk so far. num_local, num_reserved: see `KVPrefix`."""

        def parts(memory: list[Tensor], local: list[Tensor]) -> list[list[Tensor]]:
            return [
                [m[:, :, :num_slots], o] if with_local else [m[:, :, :num_slots]]
                for m, o in zip(memory, local, strict=True)
            ]

        return KVPrefix(
            parts(self.memory_keys, self.local_keys),
            parts(self.memory_values, self.local_values),
            num_local,
            num_reserved=num_reserved,
            buffers=dict(self.buffers) if with_local else {},
        )

    def take_local(self, prefix: KVPrefix) -> None:
        """Takes the open chunk's keys and values from the prefix of a call. Where they are in
        buffers, the memory becomes a view of these buffers too."""
        layers, num_slots = range(len(prefix.local)), self.num_slots
        self.local_keys = [prefix.local[i][0] for i in layers]
        self.local_values = [prefix.local[i][1] for i in layers]
        self.buffers = prefix.buffers
        if self.buffers:
            self.memory_keys = [self.buffers[i].keys[:, :, :num_slots] for i in layers]
            self.memory_values = [self.buffers[i].values[:, :, :num_slots] for i in layers]

    def select(self, rows: Tensor) -> MemoryState:
        """Returns a new state of the rows [B'] int64, in that order. Rows may be repeated."""

        def select_from(tensors: list[Tensor]) -> list[Tensor]:
            return [t.index_select(0, rows.to(t.device)) for t in tensors]

        open_ids, recent_ids = select_from([self.open_ids, self.recent_ids])
        state = MemoryState(
            select_from(self.memory_keys),
            select_from(self.memory_values),
            select_from(self.local_keys),
            select_from(self.local_values),
            open_ids,
            self.num_tokens,
            recent_ids,
        )
        state.text = None if self.text is None else select_from([self.text])[0]
        return state

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the rows in place, as the beam search of transformers expects it."""
        self.__dict__.update(self.select(beam_idx).__dict__)


class RowGroup(NamedTuple):
    """Rows of a batch that have read equally many tokens.

    rows [B'] int64: their indices in the batch, ascending. num_padding: how many leading tokens of
    these rows are padding in the next call. state: their stream, of B' rows, or of 1 row that all
    of them start from.
    """

    rows: Tensor
    num_padding: int
    state: MemoryState


class RaggedState(Cache):
    """The state of a batch of rows with different lengths, made from left-padded prompts.

    groups: the rows of equal length, with one state for each length. The chunk boundaries of rows
    of different lengths do not coincide, so each group is run in a separate call. This is right
    for any lengths, and its time grows with the number of different lengths.
    """

    is_croppable = False  # see MemoryState

    def __init__(self, groups: list[RowGroup]) -> None:
        super().__init__(layers=[])
        self.groups = groups

    @classmethod
    def from_mask(cls, mask: Tensor, state: MemoryState | RaggedState) -> RaggedState:
        """Returns the state of B prompts that start from the B rows of `state`. The mask [B, T]
        bool is false at the padding, which is on the left of the prompts."""
        padding = (~mask).sum(1).cpu()
        groups = []
        for rows, _, group_state in row_groups(state, len(mask)):
            for num_padding in padding[rows].unique().tolist():
                members = (padding[rows] == num_padding).nonzero().squeeze(1)
                groups.append(RowGroup(rows[members], num_padding, group_state.select(members)))
        return cls(groups)

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return sum(len(group.rows) for group in self.groups)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of tokens of the longest row so far."""
        return max(group.state.num_tokens for group in self.groups)

    def select(self, rows: Tensor) -> RaggedState:
        """Returns a new state of the rows [B'] int64, in that order. Rows may be repeated."""
        groups = []
        for group in self.groups:
            new_rows = torch.isin(rows, group.rows).nonzero().squeeze(1)
            if len(new_rows):
                members = torch.searchsorted(group.rows, rows[new_rows])
                groups.append(RowGroup(new_rows, group.num_padding, group.state.select(members)))
        return RaggedState(groups)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the rows in place, as the beam search of transformers expects it."""
        self.groups = self.select(beam_idx.cpu()).groups


def row_groups(state: MemoryState | RaggedState, num_rows: int) -> list[RowGroup]:
    """Returns the groups of a state that `num_rows` rows start from. A `MemoryState` is one group,
    without padding."""
    if isinstance(state, RaggedState):
        return state.groups
    return [RowGroup(torch.arange(num_rows), 0, state)]


def expand_state(state: MemoryState | RaggedState, num_rows: int) -> MemoryState | RaggedState:
    """Returns a state of `num_rows` rows, in which each row of `state` is repeated equally often
    for several prompts or beams."""
    times = num_rows // state.batch_size
    if times == 1:
        return state
    return state.select(torch.arange(state.batch_size).repeat_interleave(times))


def select_recent_ids(text: Tensor, config: MemoryConfig) -> Tensor:
    """Returns the ids [B, w] that are fed again after text [B, T], which ends with a full chunk."""
    return text[:, text.shape[1] - config.recent_tokens :]


def join_slots(kv: Tensor, batch: int) -> Tensor:
    """Joins the slots of each document's chunks: [B * C, H, m, K], document by document, becomes
    [B, H, C * m, K]."""
    _, heads, m, size = kv.shape
    return kv.view(batch, -1, heads, m, size).transpose(1, 2).reshape(batch, heads, -1, size)


class SharedPrefix:
    """The memory of one document that B rows read. The layers receive it as their
    `past_key_values`.

    keys, values: L x [1, H, M, K]; rows read at most the first `num_slots` of the M slots.
    in_place: layers attend to it with `memory_attention`, without a copy for every row, where
    `supports_flash`; see also `supports_in_place`. sinks: one for every layer, to which the
    gradients of its keys and values go instead of to autograd.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        in_place: bool,
        num_slots: int | None = None,
        sinks: Sequence[GradientSink] | None = None,
    ) -> None:
        self.keys, self.values, self.in_place = keys, values, in_place
        self.num_slots = keys[0].shape[2] if num_slots is None else num_slots
        self.sinks = sinks

    def reads_in_place(self, tensor: Tensor) -> bool:
        """Whether layers with queries like this tensor [..., K] read the memory in place."""
        return self.in_place and supports_flash(tensor)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object
    ) -> tuple[Tensor, Tensor]:
        """Returns the keys and values that the layer's attention function receives, given those
        of the rows' own tokens, [B, H, T, K] each."""
        if self.reads_in_place(keys):
            return keys, values
        return self.join(keys, values, layer)

    def join(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of the rows' own tokens, [B, H, T, K] each, to the
        memory's. Returns [B, H, num_slots + T, K] each."""
        memory = self.keys[layer], self.values[layer]
        before = expand_rows(*memory, len(keys), self.num_slots, self.sink(layer))
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)

    def sink(self, layer: int) -> GradientSink | None:
        return None if self.sinks is None else self.sinks[layer]


def supports_in_place(base: Any) -> bool:
    """Whether the attention implementation of the base can attend to a `SharedPrefix` in place."""
    return not uses_flash_attention(base)
