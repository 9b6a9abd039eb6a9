"""A stream of tokens through a MemoryLM. A text may be split into calls in any way, and every chunk
is compressed once it is full.

Shapes: B documents, T new tokens of a call, p tokens of the open chunk before the call, C chunks,
l chunk_size, m num_memory, w recent_tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from uiollms.data.limits import check_ids
from uiollms.kernels.linear_cross_entropy import shifted_nll
from uiollms.model.layers import layer_device
from uiollms.model.padding import (
    check_token_types,
    forward_padded,
    forward_ragged,
    row_lengths,
)
from uiollms.model.state import MemoryState, RaggedState, join_slots, select_recent_ids


class Streaming:
    """Mixin of MemoryLM with `new_state` and `forward`."""

    def new_state(self: Any, batch_size: int = 1) -> MemoryState:
        """Returns the empty state of a stream of `batch_size` documents of equal length."""
        ids = torch.empty(batch_size, 0, dtype=torch.int64, device=self.device)
        keys, values, local_keys, local_values = (self._empty_kv(batch_size) for _ in range(4))
        return MemoryState(keys, values, local_keys, local_values, ids, 0)

    def _empty_kv(self: Any, batch_size: int) -> list[Tensor]:
        """Returns keys or values of no tokens, for every layer [B, H, 0, K]."""
        head_dim = self.base.model.layers[0].self_attn.head_dim
        shape = (batch_size, self.base.config.num_key_value_heads, 0, head_dim)
        return [
            torch.empty(shape, dtype=self.dtype, device=layer_device(layer))
            for layer in self.base.model.layers
        ]

    def forward(
        self: Any,
        input_ids: Tensor,
        state: MemoryState | RaggedState | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Any:
        """Feeds tokens [B, T], any T, to a stream. Returns an output with `.logits` [B, T, V], the
        new state `.past_key_values`, and `.loss` if labels are given.

        The input is cut at chunk boundaries. A chunk that becomes full is encoded, and its local
        keys and values are dropped, so any split of a text into calls gives the same logits. If
        grad is enabled, the output is differentiable through the memories.

        labels [B, T]: as in transformers; they are shifted inside, and -100 is not scored. The
        loss is the mean NLL of the scored tokens in nats. It follows the document protocol: the
        first token of a chunk is predicted from the chunk before it. logits_to_keep: how many of
        the last positions get logits; 0 means all. Chunks before them are encoded and not decoded.
        attention_mask [B, T]: marks padding on the right of rows, see `padding.forward_padded`.
        A mask of ones and token_type_ids of zeros change nothing.

        Raises ValueError if the text exceeds the capacity, for token ids outside the vocabulary,
        and for other masks and token types.
        """
        check_token_types(token_type_ids)
        if isinstance(state, RaggedState):
            return forward_ragged(self, input_ids, state, labels, attention_mask)
        state = self.new_state(len(input_ids)) if state is None else state
        lengths = row_lengths(attention_mask, input_ids, state.num_tokens)
        if lengths is not None:
            output = forward_padded(self, input_ids, lengths, state, labels, logits_to_keep)
            return output if return_dict else output.to_tuple()
        self.check_length(state.num_tokens + input_ids.shape[1])
        check_ids(input_ids, self.base.config.vocab_size)
        input_ids = input_ids.to(self.device)

        next_state = self._advance(state, input_ids)
        num_kept = logits_to_keep if labels is None else 0
        hidden = self._decode_chunks(state, next_state, input_ids, num_kept)
        loss = None if labels is None else shifted_nll(hidden, labels, self.base.lm_head)
        reads_no_memory = (
            state.num_tokens == 0 and input_ids.shape[1] <= self.memory_config.chunk_size
        )
        logits = self.logits(hidden[:, -logits_to_keep:], as_base=reads_no_memory)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=next_state)
        return output if return_dict else output.to_tuple()

    def _advance(self: Any, state: MemoryState, input_ids: Tensor) -> MemoryState:
        """Returns the state after tokens [B, T]: it encodes the chunks that become full and appends
        their memories. The local keys and values are still those of `state`."""
        l = self.memory_config.chunk_size
        ids = torch.cat([state.open_ids, input_ids], dim=1)  # from the start of the open chunk
        num_full = ids.shape[1] // l * l  # tokens of chunks that are full now
        recent_ids = state.recent_ids
        if num_full:
            text = torch.cat([recent_ids, ids[:, :num_full]], dim=1)
            recent_ids = select_recent_ids(text, self.memory_config)
        keys, values = self._append_memories(state, ids[:, :num_full])
        next_state = MemoryState(
            keys,
            values,
            state.local_keys,
            state.local_values,
            ids[:, num_full:],
            state.num_tokens + input_ids.shape[1],
            recent_ids,
        )
        next_state.buffers = state.buffers
        next_state.text = state.text_with(input_ids)
        return next_state

    def _append_memories(
        self: Any, state: MemoryState, ids: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the memory keys and values of `state` with those of ids [B, C * l], full chunks,
        appended."""
        keys, values = [[k] for k in state.memory_keys], [[v] for v in state.memory_values]
        batch, l, m = len(ids), self.memory_config.chunk_size, self.memory_config.num_memory
        first, count = state.num_slots // m, ids.shape[1] // l
        if not count:
            return list(state.memory_keys), list(state.memory_values)
        per_call = max(1, self.chunks_per_batch // batch)
        for start in range(0, count, per_call):
            chunks = range(start, min(start + per_call, count))
            rows = ids[:, start * l : chunks.stop * l].reshape(-1, l)  # document-major: [B * C, l]
            new_keys, new_values = self.project(
                self.encode_layers(rows), [first + c for c in chunks] * batch
            )
            for parts, new in zip((*keys, *values), (*new_keys, *new_values), strict=True):
                parts.append(join_slots(new, batch))
        return [torch.cat(k, dim=2) for k in keys], [torch.cat(v, dim=2) for v in values]

    def _decode_chunks(
        self: Any, state: MemoryState, next_state: MemoryState, input_ids: Tensor, num_kept: int
    ) -> Tensor:
        """Decodes tokens [B, T] after `state`, chunk by chunk, each with the memories before it.
        Returns their hidden states [B, T, D], or at least those of the last `num_kept` tokens if it
        is not 0. Puts the local keys and values of the open chunk into `next_state`."""
        config, past = self.memory_config, state.open_ids.shape[1]
        l, m = config.chunk_size, config.num_memory
        num_recent = state.recent_ids.shape[1]  # w, or 0 in the first chunk of the document
        text = torch.cat([state.recent_ids, state.open_ids, input_ids], dim=1)
        # Indices of tokens count from the start of the open chunk, `num_recent` tokens into `text`.
        end = text.shape[1] - num_recent
        first_kept = end - num_kept if num_kept else past
        pieces = []
        for start in range(0, end, l):
            stop = min(start + l, end)
            is_full = stop - start == l
            if is_full and stop <= first_kept:
                continue  # nothing reads the hidden states of this chunk
            num_slots = state.num_slots + start // l * m
            # The recent tokens are fed again before the chunk. If the chunk has tokens in `state`,
            # their keys and values and those of the recent tokens are in its local ones.
            num_before = num_recent if start == 0 else config.recent_tokens
            local_past = num_before + past if start == 0 and past else 0
            fed = text[:, num_recent + start - num_before + local_past : num_recent + stop]
            num_local, num_reserved = 0, 0
            if not is_full:  # it stays open, so the next call reads its keys and values
                num_local, num_reserved = num_before + stop - start, l - (stop - start)
            prefix = next_state.prefix(num_slots, start == 0, num_local, num_reserved)
            hidden = self.decode(fed, prefix, [num_slots] * len(text), local_past)
            pieces.append(hidden if local_past else hidden[:, num_before:])
            if not is_full:
                next_state.take_local(prefix)
        if end % l == 0:  # no chunk is open
            batch = len(text)
            next_state.local_keys = self._empty_kv(batch)
            next_state.local_values = self._empty_kv(batch)
        return torch.cat([piece.to(pieces[-1].device) for piece in pieces], dim=1)
