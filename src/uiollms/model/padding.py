"""What a tokenizer returns beside the ids: masks of rows padded on their right, and segments.

Shapes: B rows, T tokens with their padding, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from uiollms.model.state import MemoryState


def check_segments(token_type_ids: Tensor | None) -> None:
    """Raises ValueError unless all tokens are of segment 0, as some tokenizers say of any text."""
    if token_type_ids is not None and token_type_ids.any():
        raise ValueError(
            "token_type_ids: found other segments than 0, a causal model has one; "
            "leave them out: tokenizer(..., return_token_type_ids=False)"
        )


def row_lengths(mask: Tensor | None, ids: Tensor, num_seen: int) -> Tensor | None:
    """A mask of ids [B, T] -> the tokens of each row [B] int64; None where nothing is padded. The
    mask is [B, T], or [B, num_seen + T] where a state has seen so many tokens. Raises ValueError
    for another shape, values but 0 and 1, padding that is not on the right, empty rows."""
    if mask is None:
        return None
    batch, length = ids.shape
    whole = (batch, num_seen + length)
    if mask.shape not in ((batch, length), whole):
        allowed = f"{[batch, length]}, as input_ids" + (f", or {list(whole)}" if num_seen else "")
        raise ValueError(f"attention_mask: found {list(mask.shape)}, expected {allowed}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask: found other values than 1 for a token and 0 for padding")
    if mask.all():
        return None
    kept = mask.bool().to(ids.device)
    kept, seen = kept[:, -length:], kept[:, :-length]
    if not seen.all() or (kept[:, 1:] > kept[:, :-1]).any():
        raise ValueError(
            "attention_mask: found zeros in front of tokens; a call takes rows that are padded on "
            "their right (tokenizer.padding_side = 'right'); generate takes them padded on the left"
        )
    lengths = kept.sum(1)
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
    """`MemoryLM.forward` of ids [B, T] of which the first `lengths` [B] of every row are tokens. No
    token sees what stands behind it, so every row's logits and loss are those that it has alone.

    Labels at padding are not scored; logits there mean nothing. Rows of one length leave a state,
    rows of different lengths none: their chunks end at different places. Raises ValueError with
    `logits_to_keep`, which counts from an end where there is padding.
    """
    if logits_to_keep:
        raise ValueError(
            f"logits_to_keep {logits_to_keep} counts from the end of rows that are padded there; "
            f"leave it out, or give rows without padding"
        )
    longest, padding = int(lengths.max()), ids.shape[1] - int(lengths.max())
    if labels is not None:
        outside = torch.arange(longest, device=ids.device) >= lengths[:, None]
        labels = labels[:, :longest].to(ids.device).masked_fill(outside, -100)
    output = model(ids[:, :longest], state, labels)
    logits = F.pad(output.logits, (0, 0, 0, padding))
    left = None if (lengths < longest).any() else output.past_key_values
    return CausalLMOutputWithPast(loss=output.loss, logits=logits, past_key_values=left)
