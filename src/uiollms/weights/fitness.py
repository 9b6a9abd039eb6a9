"""Check whether saved models and weights are usable: tensors that are missing, of other shapes or
not finite, and configs without an EOS token or with a too small sliding window."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Names of tensors that every causal LM here uses. Unknown tensors of other names, such as those of
# a value head or a rotary table, are ignored.
CAUSAL_LM = re.compile(r"((model\.)?(layers|embed_tokens|norm)|lm_head)\.")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Returns the name of the first tensor with NaN or an infinite number, or None."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            # Both are NaN if a number is NaN. Unlike isfinite, this allocates no large tensor.
            low, high = tensor.aminmax()
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                return name
    return None


def loading_fault(info: Mapping[str, Any]) -> str | None:
    """Describes the faults in transformers' loading info, or returns None if there are none.
    Without an error, transformers initialises missing tensors and those of other shapes at random,
    and ignores unknown ones. Tied tensors do not count as missing."""
    misshapen = [
        f"{name} {list(found)} where the config has {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    unknown = sorted(info["unexpected_keys"])
    missing = sorted(info["missing_keys"])
    left_over = unknown if missing else [name for name in unknown if CAUSAL_LM.match(name)]
    kinds = {
        "missing": missing,
        "of another shape": misshapen,
        "not of the model that config.json describes": left_over,
    }
    faults = [
        f"{count_tensors(names)} {what}: {list_names(names)}"
        for what, names in kinds.items()
        if names
    ]
    return "; ".join(faults) or None


def count_tensors(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def list_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", .." * (len(names) > 3)


def attention_window(config: Any, layer: int) -> int | None:
    """The sliding window of a layer of a base with this transformers config: the number of last
    tokens, itself included, to which a token attends. None means all tokens."""
    if config.model_type == "llama":  # llama ignores sliding_window
        return None
    slides = config.model_type == "mistral" or config.layer_types[layer] == "sliding_attention"
    return config.sliding_window if slides else None


def smallest_window(config: Any) -> int | None:
    """The smallest sliding window of all layers; None if all layers attend to all tokens."""
    windows = (attention_window(config, layer) for layer in range(config.num_hidden_layers))
    return min((window for window in windows if window is not None), default=None)


def window_fault(config: Any, chunk_size: int) -> str | None:
    """Describes why a base of this transformers config cannot attend to a whole chunk, or returns
    None if it can."""
    named = config.model_type not in ("llama", "mistral")
    kinds = set(config.layer_types) if named else set()
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        allowed = "full_attention and sliding_attention"
        return f"layer_types contains {unknown[0]!r}; allowed are {allowed}; correct config.json"
    if "sliding_attention" in kinds and config.sliding_window is None:
        return (
            "layer_types contains sliding_attention, but no window is set; set use_sliding_window "
            "and sliding_window in config.json, or make the layers full_attention"
        )
    window = smallest_window(config)
    if window is None or window >= chunk_size:
        return None
    return (
        f"the base attends to {window} tokens (sliding_window), fewer than chunk_size "
        f"{chunk_size}; "
        f"use chunks of at most {window} tokens, or another base"
    )


def rank_fault(config: Any, rank: int) -> str | None:
    """Describes why a LoRA rank is too large for a base of this transformers config, or returns
    None. A product of matrices has at most the rank of the smaller side of the weight matrix."""
    if rank <= config.hidden_size:
        return None
    return f"lora_rank {rank} exceeds the base's hidden_size {config.hidden_size}; use at most that"


def eos_fault(config: Any) -> str | None:
    """Describes why the base has no embedding of EOS, or returns None if it has one."""
    eos = first_eos(config)
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


def first_eos(config: Any) -> int | None:
    """The id of the end-of-sequence token, the first one if a model has several."""
    eos = config.eos_token_id
    if isinstance(eos, list | tuple):
        return eos[0] if eos else None
    return eos


TOKEN = "encoder.retrieval_token"


def slot_input_fault(learned: bool) -> str:
    """Describes why weights with a learned memory token (`learned`), or without one, do not fit the
    compressor."""
    found, expected = ("token", "last") if learned else ("last", "token")
    return (
        f'slot_input: the config has "{expected}", these weights were trained with "{found}" '
        f"({'a' if learned else 'no'} tensor {TOKEN}); set slot_input to "
        f'"{found}" in the compressor config'
    )


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], strict: bool
) -> None:
    """Raises ValueError with a list of the tensors whose shapes differ from the model's
    (`expected`) and, with `strict`, of missing and unknown ones. If only the memory token is, the
    message is one line."""
    if strict and expected.keys() ^ tensors.keys() == {TOKEN}:
        raise ValueError(slot_input_fault(TOKEN in tensors))
    faults = [
        f"{name}: shape {list(tensors[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected.keys() & tensors.keys()
        if tensors[name].shape != expected[name].shape
    ]
    if strict:
        faults += [f"{name}: missing" for name in expected.keys() - tensors.keys()]
        faults += [f"{name}: unknown" for name in tensors.keys() - expected.keys()]
    if faults:
        raise ValueError(
            "these memory weights do not fit the model:\n  " + "\n  ".join(sorted(faults))
        )
