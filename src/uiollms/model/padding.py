"""Forward passes over rows of different lengths, and checks of the masks and token types that a
tokenizer returns with its token ids.

Shapes: B rows, T tokens with their padding, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from uiollms.model.state import MemoryState, RaggedState, RowGroup


def check_token_types(token_type_ids: Tensor | None) -> None:
    """Raises ValueError unless all token types are 0. Some tokenizers return zeros for any text."""
    if token_type_ids is not None and token_type_ids.any():
        raise ValueError(
            "token_type_ids: found other values than 0, but a causal model has one segment; "
            "leave them out: tokenizer(..., return_token_type_ids=False)"
        )


def row_lengths(mask: Tensor | None, ids: Tensor, num_past: int) -> Tensor | None:
    """Returns the number of tokens of each row [B] int64 for the attention mask of ids [B, T], or
    None if nothing is padded.

    The mask is [B, T], or [B, num_past + T] if the stream has read `num_past` tokens before.
    Raises ValueError for another shape, for values other than 0 and 1, for padding that is not on
    the right, and for rows without a token.
    """
    if mask is None:
        return None
    batch, length = ids.shape
    with_past = (batch, num_past + length)
    if mask.shape not in ((batch, length), with_past):
        allowed = f"{[batch, length]}, as input_ids"
        allowed += f", or {list(with_past)}" if num_past else ""
        raise ValueError(f"attention_mask: found {list(mask.shape)}, expected {allowed}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask: found other values than 1 for a token and 0 for padding")
    if mask.all():
        return None
    is_token = mask.bool().to(ids.device)
    is_token, past_is_token = is_token[:, -length:], is_token[:, :-length]
    if not past_is_token.all() or (is_token[:, 1:] > is_token[:, :-1]).any():
        raise ValueError(
            "attention_mask: found zeros before tokens; a call takes rows that are padded on "
            "their right (tokenizer.padding_side = 'right'); generate takes them padded on the left"
        )
    lengths = is_token.sum(1)
    if not lengths.all():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} has no token; leave the row out")
    return lengths


def forward_padded(
    model: Any,
    ids: Tensor,
    lengths: Tensor,
    state: MemoryState,
    labels: Tensor | None,
    logits_to_keep: int,
) -> Any:
    """Calls `MemoryLM.forward` with ids [B, T], of which the first `lengths` [B] of every row are
    tokens. No token sees the tokens after it, so the logits and the loss of every row are those
    that it has alone.

    Labels at padding are not scored, and logits at padding have no meaning. The output has a
    state only if all rows have the same length, because the chunks of rows of different lengths
    end at different positions. Raises ValueError if `logits_to_keep` is given, which counts from
    the end of a row, where the padding is.
    """
    if logits_to_keep:
        raise ValueError(
            f"logits_to_keep {logits_to_keep} counts from the end of rows that are padded there; "
            f"leave it out, or give rows without padding"
        )
    longest = int(lengths.max())
    if labels is not None:
        is_padding = torch.arange(longest, device=ids.device) >= lengths[:, None]
        labels = labels[:, :longest].to(ids.device).masked_fill(is_padding, -100)
    output = model(ids[:, :longest], state, labels)
    logits = F.pad(output.logits, (0, 0, 0, ids.shape[1] - longest))
    next_state = None if (lengths < longest).any() else output.past_key_values
    return CausalLMOutputWithPast(loss=output.loss, logits=logits, past_key_values=next_state)


def forward_ragged(
    model: Any,
    ids: Tensor,
    state: RaggedState,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> CausalLMOutputWithPast:
    """Calls `MemoryLM.forward` with ids [B, T] for every group of rows of equal length. Returns
    the logits of the last position [B, 1, V] and the new state. Raises ValueError for labels and
    for a mask with padding."""
    if labels is not None or not (attention_mask is None or attention_mask.all()):
        argument = "attention_mask with zeros" if labels is None else "labels"
        raise ValueError(
            f"state: rows of different lengths cannot be combined with {argument}; call the model "
            "with one row at a time"
        )
    logits, groups = [], []
    for rows, num_padding, group_state in state.groups:
        group_ids = ids[rows.to(ids.device), num_padding:]
        output = model(group_ids, group_state, logits_to_keep=1)
        logits.append(output.logits)
        groups.append(RowGroup(rows, 0, output.past_key_values))
    order = torch.cat([group.rows for group in groups]).argsort()
    grouped = torch.cat(logits)
    return CausalLMOutputWithPast(
        logits=grouped[order.to(grouped.device)], past_key_values=RaggedState(groups)
    )
