"""A stream of tokens through a MemoryLM: any split of a text into calls, every chunk compressed
once it is full.

Shapes: B documents, T tokens, C chunks, l chunk_size, m num_memory, w recent_tokens, D hidden
size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from uiollms.data.limits import check_ids
from uiollms.kernels.linear_cross_entropy import shifted_nll
from uiollms.model.generation import RaggedState
from uiollms.model.layers import layer_device
from uiollms.model.padding import check_segments, forward_padded, row_lengths
from uiollms.model.state import MemoryState, join_slots, recent_of


class Streaming:
    """Methods of MemoryLM."""

    def new_state(self: Any, batch_size: int = 1) -> MemoryState:
        """An empty stream for `batch_size` documents of equal length."""
        attention = self.base.model.layers[0].self_attn
        heads = self.config.num_key_value_heads

        def empty() -> list[Tensor]:
            return [
                torch.empty(
                    batch_size,
                    heads,
                    0,
                    attention.head_dim,
                    dtype=self.dtype,
                    device=layer_device(layer),
                )
                for layer in self.base.model.layers
            ]

        ids = torch.empty(batch_size, 0, dtype=torch.int64, device=self.device)
        return MemoryState(empty(), empty(), empty(), empty(), ids, 0)

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
        """Feed [B, T] tokens, any T, to a stream: `.logits` [B, T, V], `.past_key_values` the
        advanced state, `.loss` where labels are given.

        The input is cut at chunk boundaries; a chunk that fills up is encoded and its local keys
        and values dropped, so any split of a text into calls gives the same logits.
        Differentiable through the memories when grad is enabled. labels [B, T]: as in
        transformers (shifted inside, -100 = not scored); `.loss` is the mean NLL over the scored
        tokens, which is the document protocol: a chunk's first token is predicted from the chunk
        before it. logits_to_keep: only the last so many positions' logits (0 = all); chunks that
        only feed memory are then encoded and not decoded. Raises ValueError past the capacity.
        attention_mask [B, T]: where rows are padded on their right, see
        `padding.forward_padded`; ones change nothing, nor do token_type_ids of zeros. Raises
        ValueError for others.
        """
        check_segments(token_type_ids)
        if isinstance(state, RaggedState):
            return state.forward(self, input_ids, labels, attention_mask)
        state = self.new_state(len(input_ids)) if state is None else state
        lengths = row_lengths(attention_mask, input_ids, state.num_tokens)
        if lengths is not None:
            output = forward_padded(self, input_ids, lengths, state, labels, logits_to_keep)
            return output if return_dict else output.to_tuple()
        self.check_length(state.num_tokens + input_ids.shape[1])
        check_ids(input_ids, self.config.vocab_size)
        input_ids = input_ids.to(self.device)
        l, past = self.memory_config.chunk_size, state.open_ids.shape[1]
        ids = torch.cat([state.open_ids, input_ids], dim=1)  # from the start of the open chunk
        recent = state.recent_ids.shape[1]  # w, or 0 in the first chunk
        text = torch.cat([state.recent_ids, ids], dim=1)
        first_kept = ids.shape[1] - logits_to_keep if logits_to_keep and labels is None else past

        full, tail = divmod(ids.shape[1], l)
        slots_before = state.num_slots
        after = self._remember(state, ids[:, : full * l])
        after.open_ids = ids[:, full * l :]
        after.recent_ids = state.recent_ids
        if full:
            after.recent_ids = recent_of(text[:, : recent + full * l], self.memory_config)
        after.num_tokens = state.num_tokens + input_ids.shape[1]
        after.text = state.text_with(input_ids)

        pieces = []
        for start in range(0, ids.shape[1], l):
            stop = min(start + l, ids.shape[1])
            before = recent if start == 0 else self.memory_config.recent_tokens
            local_past = before + past if start == 0 and past else 0
            if stop <= first_kept and stop - start == l:
                continue
            num_slots = slots_before + start // l * self.memory_config.num_memory
            tokens = (stop - start) % l  # that stay open
            num_local, reserved = (before + tokens, l - tokens) if tokens else (0, 0)
            prefix = after.prefix(num_slots, start == 0, num_local, reserved)
            fed = text[:, recent + start - before + local_past : recent + stop]
            hidden = self.decode(fed, prefix, [num_slots] * len(ids), local_past)
            pieces.append(hidden if local_past else hidden[:, before:])
            if prefix.num_local:
                after.take_local(prefix)
        if not tail:
            empty = self.new_state(len(ids))
            after.local_keys, after.local_values = empty.local_keys, empty.local_values

        hidden = torch.cat([piece.to(pieces[-1].device) for piece in pieces], dim=1)
        loss = None if labels is None else shifted_nll(hidden, labels, self.base.lm_head)
        as_base = state.num_tokens == 0 and input_ids.shape[1] <= l  # no memory is read
        logits = self.logits(hidden[:, -logits_to_keep:], as_base)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=after)
        return output if return_dict else output.to_tuple()

    def _remember(self: Any, state: MemoryState, ids: Tensor) -> MemoryState:
        """A copy of `state` with the memories of `ids` [B, C*l], complete chunks, appended."""
        keys, values = [[k] for k in state.memory_keys], [[v] for v in state.memory_values]
        batch, l, m = len(ids), self.memory_config.chunk_size, self.memory_config.num_memory
        first, count = state.num_slots // m, ids.shape[1] // l
        per_call = max(1, self.chunks_per_batch // batch)
        for start in range(0, count, per_call):
            chunks = range(start, min(start + per_call, count))
            rows = ids[:, start * l : chunks.stop * l].reshape(-1, l)  # document-major: [B * C, l]
            new_keys, new_values = self.project(
                self.encode_layers(rows), [first + c for c in chunks] * batch
            )
            for parts, new in zip((*keys, *values), (*new_keys, *new_values), strict=True):
                parts.append(join_slots(new, batch))
        all_keys, all_values = (
            [torch.cat(p, dim=2) if count else p[0] for p in parts] for parts in (keys, values)
        )
        after = MemoryState(
            all_keys,
            all_values,
            state.local_keys,
            state.local_values,
            state.open_ids,
            state.num_tokens,
        )
        after.buffers = state.buffers
        return after
