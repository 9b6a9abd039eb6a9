"""Which model made a memory: hashes of all that its encoder and decoder compute with.

Numbers are compared in bfloat16, so that a checkpoint is the same model in whatever dtype, on
whatever device it was loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import has_offloaded_params
from pydantic import Field
from torch import Tensor, nn

from uiollms.config.corpora import Checked
from uiollms.config.sections import MemoryConfig

SLICE = 2**24  # numbers of a tensor that are converted at once
# Below this float16 does not hold every bfloat16 number: such numbers count as 0, or a base would
# be another one in float16.
LEAST = 2.0**-16

Hash = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class Fingerprint(Checked):
    """What a memory can be read by: the same base, the same trained tensors, the same compressor.

    covers "all": base_weights is of all tensors of the base, base_config of what its layers compute
    beside them, adapter of the trained tensors in bfloat16; base, its name, may differ.
    covers "samples", of version 0.1: base_weights is of two vectors of the base, adapter of the
    trained tensors in float32; base, the last part of its name, must be the same.
    """

    base: str
    base_weights: Hash
    adapter: Hash
    compressor: MemoryConfig
    base_config: Hash | None = None
    covers: Literal["all", "samples"] = "samples"

    def differing(self, model: Any) -> list[str]:
        """What differs from `model`, a phrase each."""
        own = fingerprint(model, self.covers)
        fields = [
            name for name in Fingerprint.model_fields if name != "base" or self.covers == "samples"
        ]
        return [
            f"{name} {getattr(self, name)}, this model's is {getattr(own, name)}"
            for name in fields
            if getattr(self, name) != getattr(own, name)
        ]


def fingerprint(model: Any, covers: Literal["all", "samples"] = "all") -> Fingerprint:
    """The fingerprint of a MemoryLM as it is now. The base's part is computed once and kept
    until one of its tensors is replaced or changes in place (a change through `.data` is not
    seen); the trained part is computed at every call."""
    trained = dict(sorted(model.memory_state_dict().items()))
    # Dropout is a matter of training, the schema one of editors.
    compressor = model.memory_config.model_copy(update={"lora_dropout": 0.0, "schema_": None})
    named = dict(base=Path(model.config._name_or_path).name or "unnamed", compressor=compressor)
    if covers == "samples":
        adapter = bytes_hash(t.float() for t in trained.values())
        return Fingerprint(**named, base_weights=samples_hash(model.base), adapter=adapter)
    return Fingerprint(
        **named,
        base_weights=base_hash(model.base),
        adapter=tensors_hash(trained),
        base_config=config_hash(model.base),
        covers="all",
    )


# Base -> what its tensors were when it was hashed, and the hash.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def base_hash(base: nn.Module) -> str:
    """Of the names, shapes and numbers of all parameters; those that are tied count under each of
    their names, those that rest on disk are read from there."""
    parameters = dict(base.named_parameters(remove_duplicate=False))
    if any(p.is_inference() for p in parameters.values()):  # has no record of changes
        return tensors_hash(parameters, base)
    key = [(name, p.data_ptr(), p._version, p.dtype) for name, p in parameters.items()]
    known, found = _KNOWN.get(base, (None, ""))
    if known != key:
        found = tensors_hash(parameters, base)
        _KNOWN[base] = key, found
    return found


def tensors_hash(tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> str:
    """Of names, shapes and numbers of tensors, on several cores; those of `base` may rest on
    disk."""

    def hashed(name: str) -> str:
        return tensor_hash(tensors[name] if base is None else at_hand(base, name, tensors[name]))

    first = {id(tensor): name for name, tensor in tensors.items()}  # tied tensors are read once
    # A forked process makes torch's own pool anew at first use, which two threads must not do at
    # once.
    torch.set_num_threads(torch.get_num_threads())
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(first, pool.map(hashed, first.values()), strict=True))
    lines = [f"{name} {list(t.shape)} {hashes[id(t)]}\n" for name, t in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def at_hand(base: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter of a base, or, where it rests on disk, its numbers from there."""
    owner, _, own = name.rpartition(".")
    module: Any = base.get_submodule(owner)
    return module._hf_hook.weights_map[own] if has_offloaded_params(module) else parameter


def config_hash(base: Any) -> str:
    """Of what the layers compute beside their weights, as far as it can reach a memory: the
    activation, heads, the norms' epsilon, sliding windows, and the rotation of positions."""
    config = base.config
    names = (
        "model_type",
        "hidden_act",
        "num_attention_heads",
        "num_key_value_heads",
        "sliding_window",
    )
    facts = {name: getattr(config, name, None) for name in names}
    if facts["sliding_window"] is not None:
        facts["layer_types"] = getattr(config, "layer_types", None)
    facts["head_dim"] = base.model.layers[0].self_attn.head_dim
    facts["rms_norm_eps"] = f"{config.rms_norm_eps:.3g}"  # some formats keep it in float32
    rotation = {name: value for name, value in config.rope_parameters.items() if value is not None}
    text = json.dumps(facts | {"rope_parameters": rotation}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensor_hash(tensor: Tensor) -> str:
    """Of a tensor's numbers in bfloat16."""
    hashed = hashlib.sha256()
    for part in tensor.detach().reshape(-1).split(SLICE):
        half = part.bfloat16()
        half = half.masked_fill(half.abs() < LEAST, 0.0)
        hashed.update(half.cpu().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


# ---- as version 0.1 had it -----------------------------------------------------------------------


def samples_hash(base: Any) -> str:
    """Of the final norm and the first embedding, in bfloat16."""
    names = ("model.norm.weight", "model.embed_tokens.weight")
    norm, embedding = (at_hand(base, name, base.get_parameter(name)) for name in names)
    samples = norm, embedding[0]
    return bytes_hash(t.detach().bfloat16() for t in samples)


def bytes_hash(tensors: Iterable[Tensor]) -> str:
    """Of the bytes of tensors as they are."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]
