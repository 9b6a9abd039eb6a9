"""The fingerprint of the model that made a memory: hashes of everything that its encoder and
decoder compute with.

Numbers are hashed in bfloat16, so a checkpoint has the same fingerprint in every dtype and on every
device that it is loaded to.
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
from uiollms.kernels.quantized import quantization_tensors

SLICE_LENGTH = 2**24  # how many numbers of a tensor are converted at a time
# Smaller numbers count as 0. Float16 cannot represent every bfloat16 number below this, so a base
# would have another fingerprint in float16.
SMALLEST = 2.0**-16

Hash = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class Fingerprint(Checked):
    """Identifies the models that can read a memory: those with the same base, the same trained
    tensors and the same compressor config.

    covers "all": base_weights is the hash of all tensors of the base, base_config that of what its
    layers compute besides them, adapter that of the trained tensors in bfloat16. The name of the
    base, `base`, may differ.
    covers "samples", of version 0.1: base_weights is the hash of two vectors of the base, adapter
    that of the trained tensors in float32. The last part of the base's name, `base`, must be the
    same.
    """

    base: str
    base_weights: Hash
    adapter: Hash
    compressor: MemoryConfig
    base_config: Hash | None = None
    covers: Literal["all", "samples"] = "samples"

    def differences(self, model: Any) -> list[str]:
        """Returns a phrase for each field that differs from the fingerprint of `model`."""
        other = fingerprint(model, self.covers)
        fields = [
            name for name in Fingerprint.model_fields if name != "base" or self.covers == "samples"
        ]
        return [
            f"{name} {getattr(self, name)}, this model's is {getattr(other, name)}"
            for name in fields
            if getattr(self, name) != getattr(other, name)
        ]


def fingerprint(model: Any, covers: Literal["all", "samples"] = "all") -> Fingerprint:
    """Computes the fingerprint of a MemoryLM as it is now.

    The hash of the base is cached until one of its tensors is replaced or changed in place. A
    change through `.data` is not noticed. The trained tensors are hashed in every call.
    """
    trained = dict(sorted(model.memory_state_dict().items()))
    # Dropout matters in training only, and the schema only to editors.
    compressor = model.memory_config.model_copy(update={"lora_dropout": 0.0, "schema_": None})
    common = dict(
        base=Path(model.base.config._name_or_path).name or "unnamed", compressor=compressor
    )
    if covers == "samples":
        adapter = hash_bytes(t.float() for t in trained.values())
        return Fingerprint(**common, base_weights=hash_samples(model.base), adapter=adapter)
    return Fingerprint(
        **common,
        base_weights=hash_base(model.base),
        adapter=hash_tensors(trained),
        base_config=hash_architecture(model.base),
        covers="all",
    )


# Base -> the versions of its tensors when it was hashed, and the hash.
_BASE_HASHES: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def hash_base(base: nn.Module) -> str:
    """Hashes the names, shapes and numbers of all parameters. Tied parameters count under each of
    their names. Offloaded parameters are read from the disk."""
    parameters: dict[str, Tensor] = dict(base.named_parameters(remove_duplicate=False))
    for name, parameter in list(parameters.items()):
        parameters |= quantization_tensors(name, parameter)
    if any(p.is_inference() for p in parameters.values()):  # these have no version to compare
        return hash_tensors(parameters, base)
    versions = [(name, p.data_ptr(), p._version, p.dtype) for name, p in parameters.items()]
    cached_versions, cached = _BASE_HASHES.get(base, (None, ""))
    if cached_versions == versions:
        return cached
    computed = hash_tensors(parameters, base)
    _BASE_HASHES[base] = versions, computed
    return computed


def hash_tensors(tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> str:
    """Hashes names, shapes and numbers of tensors, on several cores. If `base` is given, they are
    its parameters, which may be offloaded to the disk, and what quantises them."""

    def hash_one(name: str) -> str:
        tensor = tensors[name]
        return hash_tensor(tensor if base is None else load_offloaded(base, name, tensor))

    first = {id(tensor): name for name, tensor in tensors.items()}  # tied tensors are read once
    # In a forked process, torch makes its thread pool again at the first use, which two threads
    # must not do at the same time. This call is that first use.
    torch.set_num_threads(torch.get_num_threads())
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(first, pool.map(hash_one, first.values()), strict=True))
    lines = [f"{name} {list(t.shape)} {hashes[id(t)]}\n" for name, t in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def load_offloaded(base: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Returns a parameter of a base. If it is offloaded to the disk, it is read from there."""
    owner, _, key = name.rpartition(".")
    if key not in ("weight", "bias"):  # a scale or code of a 4-bit weight
        return parameter
    module: Any = base.get_submodule(owner)
    return module._hf_hook.weights_map[key] if has_offloaded_params(module) else parameter


def hash_architecture(base: Any) -> str:
    """Hashes what the layers of the base compute besides their weights and what can change a
    memory: the activation, heads, the epsilon of norms, sliding windows and RoPE."""
    config = base.config
    names = (
        "model_type",
        "hidden_act",
        "num_attention_heads",
        "num_key_value_heads",
        "sliding_window",
    )
    settings = {name: getattr(config, name, None) for name in names}
    if settings["sliding_window"] is not None:
        settings["layer_types"] = getattr(config, "layer_types", None)
    settings["head_dim"] = base.model.layers[0].self_attn.head_dim
    settings["rms_norm_eps"] = f"{config.rms_norm_eps:.3g}"  # some formats store it in float32
    rope = {name: value for name, value in config.rope_parameters.items() if value is not None}
    text = json.dumps(settings | {"rope_parameters": rope}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_tensor(tensor: Tensor) -> str:
    """Hashes the numbers of a tensor in bfloat16."""
    sha256 = hashlib.sha256()
    for part in tensor.detach().reshape(-1).split(SLICE_LENGTH):
        half = part.bfloat16()
        half = half.masked_fill(half.abs() < SMALLEST, 0.0)
        sha256.update(half.cpu().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


# ---- the fingerprint of version 0.1 --------------------------------------------------------------


def hash_samples(base: Any) -> str:
    """Hashes the final norm and the first embedding, in bfloat16."""
    names = ("model.norm.weight", "model.embed_tokens.weight")
    norm, embedding = (load_offloaded(base, name, base.get_parameter(name)) for name in names)
    return hash_bytes(t.detach().bfloat16() for t in (norm, embedding[0]))


def hash_bytes(tensors: Iterable[Tensor]) -> str:
    """Hashes the bytes of tensors in their dtype."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha256.hexdigest()[:16]
