"""Whether what others have saved can be used at all: tensors that are not there, do not fit or
are no numbers; a config that names no such tokens or attends to too few."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Of a causal LM's own names those that a model of another shape or kind leaves over; a value head's
# or a rotary table's may be left over.
OWN = re.compile(r"((model\.)?(layers|embed_tokens|norm)|lm_head)\.")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite number; None if there is none."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            # NaN is passed on to both; nothing of the tensor's size is made, as isfinite would.
            low, high = tensor.aminmax()
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                return name
    return None


def unfilled(info: Mapping[str, Any]) -> str | None:
    """What is wrong with a load, from transformers' loading info: without an error it draws what is
    missing or misshapen at random and leaves out what the model has no place for. None: nothing.
    Tied tensors are not missing."""
    misshapen = [
        f"{name} {list(found)} where the config has {list(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    unknown = sorted(info["unexpected_keys"])
    missing = sorted(info["missing_keys"])
    left_over = unknown if missing else [name for name in unknown if OWN.match(name)]
    kinds = {
        "missing": missing,
        "of another shape": misshapen,
        "not of the model that config.json describes": left_over,
    }
    faults = [f"{counted(names)} {what}: {few(names)}" for what, names in kinds.items() if names]
    return "; ".join(faults) or None


def counted(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", .." * (len(names) > 3)


def window_of(config: Any, layer: int) -> int | None:
    """To how many of the last tokens, its own included, a token attends in layer number `layer` of
    a base of this transformers config; None: to all."""
    if config.model_type == "llama":  # knows no windows, whatever its config holds
        return None
    slides = config.model_type == "mistral" or config.layer_types[layer] == "sliding_attention"
    return config.sliding_window if slides else None


def smallest_window(config: Any) -> int | None:
    """Of all layers; None: they attend to all tokens."""
    windows = (window_of(config, layer) for layer in range(config.num_hidden_layers))
    return min((window for window in windows if window is not None), default=None)


def narrow_window(config: Any, chunk_size: int) -> str | None:
    """Why a base of this transformers config cannot attend within a chunk; None if it can."""
    named = config.model_type not in ("llama", "mistral")
    kinds = set(config.layer_types) if named else set()
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        allowed = "full_attention and sliding_attention"
        return f"layer_types holds {unknown[0]!r}; allowed are {allowed}; correct config.json"
    if "sliding_attention" in kinds and config.sliding_window is None:
        return (
            "layer_types holds sliding_attention, but no window is set; set use_sliding_window and "
            "sliding_window in config.json, or make the layers full_attention"
        )
    window = smallest_window(config)
    if window is None or window >= chunk_size:
        return None
    return (
        f"the base attends to {window} tokens (sliding_window), fewer than chunk_size "
        f"{chunk_size}; "
        f"use chunks of at most {window} tokens, or another base"
    )


def wide_rank(config: Any, rank: int) -> str | None:
    """Why LoRA of this rank has no meaning on a base of this transformers config; None if it has: a
    product of matrices has no higher rank than the smaller side of what it is added to."""
    if rank <= config.hidden_size:
        return None
    return f"lora_rank {rank} is past the base's hidden_size {config.hidden_size}; use at most that"


def eos_fault(config: Any) -> str | None:
    """Why there is no embedding of the end of a text; None if there is."""
    eos = eos_of(config)
    if eos is None:
        return (
            "the base's config names no eos_token_id, from whose embedding the memory token "
            "starts; set it in config.json"
        )
    if not 0 <= eos < config.vocab_size:
        return (
            f"eos_token_id {eos} is outside of the base's {config.vocab_size} embeddings; correct "
            "it in config.json"
        )
    return None


def eos_of(config: Any) -> int | None:
    """The id of the end-of-sequence token; the first where a model names several."""
    eos = config.eos_token_id
    if isinstance(eos, list | tuple):
        return eos[0] if eos else None
    return eos


TOKEN = "encoder.retrieval_token"


def other_slots(learned: bool) -> str:
    """Why weights with (`learned`), or without, a memory token do not fit the other compressor."""
    found, wanted = ("token", "last") if learned else ("last", "token")
    return (
        f'slot_input: the config has "{wanted}", these weights were trained with "{found}" '
        f"({'a' if learned else 'no'} tensor {TOKEN}); set slot_input to "
        f'"{found}" in the compressor config'
    )


def check_tensors(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], strict: bool) -> None:
    """Raises ValueError that lists the tensors whose shapes are not those of the model's `own`
    and, with `strict`, those that are missing or unknown; it is one line where the memory token
    alone is."""
    if strict and own.keys() ^ tensors.keys() == {TOKEN}:
        raise ValueError(other_slots(TOKEN in tensors))
    faults = [
        f"{name}: shape {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    if strict:
        faults += [f"{name}: missing" for name in own.keys() - tensors.keys()]
        faults += [f"{name}: unknown" for name in tensors.keys() - own.keys()]
    if faults:
        raise ValueError(
            "these memory weights do not fit the model:\n  " + "\n  ".join(sorted(faults))
        )
