"""The rotary position embeddings (RoPE) of the base: the supported schemes, the number of positions
that a base serves, and the tables of cosines and sines. Positions are in model/positions.py.

Two schemes of transformers choose their frequencies by the length of a call and store the choice
in a module that all calls share. There, cutting a text into calls, or other rows in the batch,
would change the results. Here the choice depends only on the row itself:

    dynamic   All rows use the plain frequencies, which are valid up to max_position_embeddings.
              No row is longer.
    longrope  A row that reads memory, and every slot, uses the long factors, however few slots
              there are. A chunk that is encoded, or that reads no memory, uses the short factors,
              as the base does. A raw text uses those that the base chooses for its length.

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
# These stretch the positions of the first training, original_max_position_embeddings, by a factor.
STRETCHED = ("yarn", "longrope")
LENGTH_DEPENDENT = ("dynamic", "longrope")
ORIGINAL = "original_max_position_embeddings"


def rope_scheme(config: Any) -> tuple[Any, Mapping[str, Any]]:
    """Returns the name of the RoPE scheme of a transformers config, None if it has no scheme for
    all layers, and the parameters of the scheme."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_type"), parameters


def num_positions(config: Any) -> int:
    """Returns how many positions a base of this transformers config serves.

    It is max_position_embeddings. Model cards of yarn and longrope give a factor and the positions
    of the first training, and some leave max_position_embeddings as it was. For these schemes it
    is the product of factor and positions if that is greater.
    """
    most: int = config.max_position_embeddings
    scheme, parameters = rope_scheme(config)
    if scheme in STRETCHED and parameters.get("factor") is not None:
        most = max(most, int(parameters["factor"] * parameters[ORIGINAL]))
    return most


def describe_num_positions(config: Any) -> str:
    """Returns a phrase for messages with `num_positions` and the fields that it comes from."""
    most = num_positions(config)
    if most == config.max_position_embeddings:
        return f"max_position_embeddings {most}"
    scheme, parameters = rope_scheme(config)
    product = f"factor {parameters['factor']:g} * {ORIGINAL} {parameters[ORIGINAL]}"
    return f"{most} positions ({scheme}: {product})"


def find_rope_fault(config: Any, chunk_size: int, recent_tokens: int = 0) -> str | None:
    """Returns the reason why a base of this transformers config cannot rotate a chunk and the
    recent tokens before it, or None if it can."""
    scheme, parameters = rope_scheme(config)
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
        has_length = isinstance(factors, list) and len(factors) == half
        if not has_length or not all(map(is_positive, factors)):
            return f"{name} in rope_parameters must be {half} numbers > 0; correct config.json"
    original = parameters[ORIGINAL]
    if original < min(chunk_size + recent_tokens, num_positions(config)):
        and_recent = f" and recent_tokens {recent_tokens}" if recent_tokens else ""
        together = ", both together" if recent_tokens else ""
        return (
            f"longrope uses one set of factors up to {original} tokens ({ORIGINAL}) and another "
            f"beyond, and chunk_size {chunk_size}{and_recent} would need both; "
            f"use chunks of at most {original} tokens{together}"
        )
    return None


def is_positive(value: Any) -> bool:
    """Returns whether `value` is a finite number greater than 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def head_size(config: Any) -> int:
    """Returns K, the head size."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def uses_long_factors(config: Any, num_slots: Sequence[int], length: int) -> list[bool]:
    """Returns which rows are rotated by the long factors of longrope. Row b reads `num_slots[b]`
    slots, and its last token is token number `length` of its chunk or raw text.

    How a chunk is cut into calls does not matter: a chunk without memory is never longer than
    what the base counts as short, see `find_rope_fault`.
    """
    scheme, parameters = rope_scheme(config)
    if scheme != "longrope":
        return [False] * len(num_slots)
    is_extended = num_positions(config) > parameters[ORIGINAL]
    return [is_extended if slots else length > parameters[ORIGINAL] for slots in num_slots]


def rotary_tables(
    base: Any,
    like: Tensor,
    positions: Tensor,
    long_factors: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns the cosines and sines [B, T, K] of positions [B or 1, T], in the dtype and on the
    device of `like`. long_factors: see `uses_long_factors`; one for each row, or one for all.

    The base's rotary module computes them. If its choice depends on lengths, its state is neither
    read nor changed.
    """
    rotary, (scheme, parameters) = base.model.rotary_emb, rope_scheme(base.config)
    if scheme not in LENGTH_DEPENDENT:
        return tuple(rotary(like, positions))
    short_frequencies = rotary.original_inv_freq
    short = tables_with(rotary, like, positions, short_frequencies)
    if not any(long_factors):
        return short
    length = parameters[ORIGINAL] + 1  # the shortest long text
    frequencies, _ = ROPE_INIT_FUNCTIONS[scheme](base.config, like.device, seq_len=length)
    long = tables_with(rotary, like, positions, frequencies.to(short_frequencies.dtype))
    rows = to_device(torch.tensor(long_factors), like.device)[:, None, None]
    return tuple(torch.where(rows, *pair) for pair in zip(long, short, strict=True))


def tables_with(
    rotary: Any,
    like: Tensor,
    positions: Tensor,
    frequencies: Tensor,
) -> tuple[Tensor, ...]:
    """Returns the tables that a rotary module computes with the frequencies [K / 2]. The
    arithmetic is the library's, in a new module whose scheme does not depend on lengths."""
    fixed: Any = type(rotary)(rotary.config)
    fixed.rope_type = "default"
    fixed.inv_freq = frequencies.to(like.device)
    return tuple(fixed(like, positions))
