"""flash-attn 2 on CUDA: checks that a base can use it, and its causal call. The patterns of
encoder and decoder are in model/attention_patterns.py.

Shapes: B rows, T new tokens of a row, S keys, N attention heads, H key/value heads, K head size.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from uiollms.files.errors import ConfigError

NAME = "flash_attention_2"  # the attn_implementation of transformers
DEVICE_TYPES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256


def uses_flash_attention(base: Any) -> bool:
    return base.config._attn_implementation == NAME


def unsupported_reason(dtype: torch.dtype, config: Any = None) -> str | None:
    """Returns why flash-attn cannot compute in `dtype`, for a base with the transformers config
    `config` if it is given, or None if it can."""
    if dtype not in DTYPES:
        found = str(dtype).removeprefix("torch.")
        return f"flash-attn computes in bfloat16 and float16, found {found}"
    if config is None:
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head > LARGEST_HEAD:
        return f"flash-attn supports heads of at most {LARGEST_HEAD} numbers, found {head}"
    return None


def unavailable_reason() -> str | None:
    """Returns why flash-attn cannot run on this machine, or None if it can."""
    try:
        importlib.import_module("flash_attn")
    except ModuleNotFoundError:
        command = "pip install --no-build-isolation flash-attn"
        return f"the package flash-attn is not installed; run: {command}"
    except ImportError as error:  # the package was built against another torch
        reason = " ".join(str(error).split())
        again = "install it again for this torch"
        return f"the package flash-attn cannot be imported ({reason}); {again}"
    if not torch.cuda.is_available():
        return "flash-attn needs a CUDA device, this machine has none"
    if not is_flash_attn_2_available():
        return "flash-attn is too old or not version 2; install flash-attn>=2.3.3,<3"
    return None


def check_request(
    implementation: str | None, where: str, dtype: torch.dtype, device_map: Any, config: Any = None
) -> None:
    """Raises ConfigError, in one line, if `implementation`, the value of the field `where`, is
    flash-attn and a base in `dtype` cannot use it. `config` is the base's transformers config,
    where it is known. (Without the package transformers would raise ImportError, or download a
    kernel from the hub.)"""
    if implementation != NAME:
        return
    fault = unsupported_reason(dtype, config) or unavailable_reason()
    if fault is None and device_map == "cpu":
        fault = 'flash-attn needs a CUDA device, device_map is "cpu"'
    if fault:
        raise ConfigError(f'{where}: "{NAME}": {fault}; or use "sdpa"')


def supports_device_of(query: Tensor) -> bool:
    """Whether flash-attn can compute on the device of this tensor."""
    return query.device.type in DEVICE_TYPES


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attends from queries [B, N, T, K] to keys and values [B, H, S, K]. Query i of T sees the keys
    0 .. S - T + i, with a sliding window the last `sliding_window` of them. Returns [B, T, N, K].
    """
    # The window counts the keys before a query's own; -1 is no limit.
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    return importlib.import_module("flash_attn").flash_attn_func(
        *(t.transpose(1, 2) for t in (query, key, value)),
        softmax_scale=scaling,
        causal=True,
        window_size=window,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
