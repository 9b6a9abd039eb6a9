"""Bases whose linear layers store 4-bit weights: bitsandbytes' layers, frozen and shared like any
other. They compute in the dtype of their input, through which gradients pass. Their packed weight
is no matrix, so nothing here reads its dtype or shape."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

# Bits of a weight in nf4: 4, and a float32 scale for every block of 64 weights.
NF4_BITS = 4 + 32 / 64


def missing_package() -> str | None:
    """Returns how to get bitsandbytes if it is not installed, or None if it is."""
    if find_spec("bitsandbytes"):
        return None
    return "the package bitsandbytes is not installed; run: pip install bitsandbytes, or set null"


def quantization_settings(dtype: torch.dtype) -> dict[str, Any]:
    """Returns the settings with which transformers' from_pretrained loads a base in nf4, on the
    CPU: device maps are applied later."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def keep_differentiable(base: nn.Module) -> None:
    """Prevents bitsandbytes' 4-bit layers from packing their weights for inference.

    On CPUs with AVX512-BF16 a layer does so at its first call in evaluation mode without a graph.
    From then on its results have no gradient, while a frozen base is always in evaluation mode.
    """
    for module in base.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # saving undoes the packing of an earlier call
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantization_tensors(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the scales and codes with which a 4-bit weight is read, by their names in a state
    dict. Other weights have none."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        for key, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{key}", tensor


def count_weights(base: nn.Module) -> int:
    """Counts the numbers that a base's parameters represent. A packed weight represents the matrix
    of its linear layer."""
    total = 0
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = name == "weight" and not parameter.is_floating_point()
            if packed and isinstance(module, nn.Linear):
                total += module.in_features * module.out_features
            else:
                total += parameter.numel()
    return total
