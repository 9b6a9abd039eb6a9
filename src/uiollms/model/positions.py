"""How the base tells positions apart: schemes of rotary embeddings, their reach, their tables.

Two schemes of transformers look at the length of a call, and keep what they have chosen in a module
that all calls share: a text cut into calls, or other rows beside it, would change what is computed.
Here the choice is a row's own, whatever came before it:

    dynamic   the plain frequencies, which hold up to max_position_embeddings; no row goes further
    longrope  a row that reads memory, and every slot, is rotated by the long factors, however few
              slots there are; a chunk without memory, or one that is encoded, by the short ones, as
              the base does; a raw text by those that the base takes for its length

Shapes: B rows, T tokens, K head size.
Source: Peng et al. 2023 (YaRN, arXiv 2309.00071), Ding et al. 2024 (LongRoPE, arXiv 2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from uiollms.kernels.devices import to_device

SCHEMES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
STRETCHED = ("yarn", "longrope")  # by a factor, from original_max_position_embeddings
BY_LENGTH = ("dynamic", "longrope")
ORIGINAL = "original_max_position_embeddings"


def scheme_of(config: Any) -> tuple[Any, Mapping[str, Any]]:
    """The name of the scheme, None where there is none for all layers, and its parameters."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_type"), parameters


def num_positions(config: Any) -> int:
    """How many positions a base of this transformers config serves: max_position_embeddings, or,
    under yarn and longrope, whose model cards name a factor and the positions of the first training
    (and may leave max_position_embeddings as it was), the product of these if that is more."""
    most: int = config.max_position_embeddings
    scheme, parameters = scheme_of(config)
    if scheme in STRETCHED and parameters.get("factor") is not None:
        most = max(most, int(parameters["factor"] * parameters[ORIGINAL]))
    return most


def describe_positions(config: Any) -> str:
    """`num_positions` and where they come from, for a message."""
    most = num_positions(config)
    if most == config.max_position_embeddings:
        return f"max_position_embeddings {most}"
    scheme, parameters = scheme_of(config)
    product = f"factor {parameters['factor']:g} * {ORIGINAL} {parameters[ORIGINAL]}"
    return f"{most} positions ({scheme}: {product})"


def rope_fault(config: Any, chunk_size: int, recent_tokens: int = 0) -> str | None:
    """Why a base of this transformers config cannot tell the positions of a chunk, with the recent
    tokens in front of it, apart; None if it can."""
    scheme, parameters = scheme_of(config)
    if scheme not in SCHEMES:
        found = f"rope_type {scheme!r}" if scheme else "no rope_type for all layers"
        return f"{found} in rope_parameters; supported are {', '.join(SCHEMES)}"
    for name in ("rope_theta", "factor", ORIGINAL):
        if (value := parameters.get(name)) is not None and not is_positive(value):
            return f"{name} {value!r} in rope_parameters must be more than 0; correct config.json"
    if scheme != "longrope":
        return None
    half = head_size(config) // 2
    for name in ("short_factor", "long_factor"):
        factors: Any = parameters.get(name)
        counted = isinstance(factors, list) and len(factors) == half
        if not counted or not all(map(is_positive, factors)):
            return f"{name} in rope_parameters must be {half} numbers > 0; correct config.json"
    original = parameters[ORIGINAL]
    if original < min(chunk_size + recent_tokens, num_positions(config)):
        and_recent = f" and recent_tokens {recent_tokens}" if recent_tokens else ""
        together = ", both together" if recent_tokens else ""
        return (
            f"the base reads texts of up to {original} tokens ({ORIGINAL} of longrope) by other "
            f"factors than longer ones, chunk_size {chunk_size}{and_recent} takes both; "
            f"use chunks of at most {original} tokens{together}"
        )
    return None


def is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def find_long_rows(config: Any, num_slots: Sequence[int], length: int) -> list[bool]:
    """Which rows, behind `num_slots` slots and ending with their own token number `length`, are
    rotated as parts of a long text. A chunk's cut into calls changes nothing: without memory it is
    no longer than what the base calls short, see `rope_fault`."""
    scheme, parameters = scheme_of(config)
    if scheme != "longrope":
        return [False] * len(num_slots)
    reaches_far = num_positions(config) > parameters[ORIGINAL]
    return [reaches_far if slots else length > parameters[ORIGINAL] for slots in num_slots]


def rotary_tables(
    base: Any,
    like: Tensor,
    positions: Tensor,
    far: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Cosines and sines [B, T, K] of positions [B or 1, T], in the dtype and on the device of
    `like`, as the base's rotary module gives them; where its choice hangs on lengths, its state is
    neither read nor changed. far: see `find_long_rows`, by row, or one for all."""
    rotary, (scheme, parameters) = base.model.rotary_emb, scheme_of(base.config)
    if scheme not in BY_LENGTH:
        return tuple(rotary(like, positions))
    short_frequencies = rotary.original_inv_freq
    short = tables_by(rotary, like, positions, short_frequencies)
    if not any(far):
        return short
    length = parameters[ORIGINAL] + 1  # the shortest long text
    frequencies, _ = ROPE_INIT_FUNCTIONS[scheme](base.config, like.device, seq_len=length)
    long = tables_by(rotary, like, positions, frequencies.to(short_frequencies.dtype))
    rows = to_device(torch.tensor(far), like.device)[:, None, None]
    return tuple(torch.where(rows, *pair) for pair in zip(long, short, strict=True))


def tables_by(
    rotary: Any,
    like: Tensor,
    positions: Tensor,
    frequencies: Tensor,
) -> tuple[Tensor, ...]:
    """What a rotary module makes of positions by these frequencies [K / 2]: the library's own
    arithmetic, in a module of our own that does not look at lengths."""
    fixed: Any = type(rotary)(rotary.config)
    fixed.rope_type = "default"
    fixed.inv_freq = frequencies.to(like.device)
    return tuple(fixed(like, positions))
