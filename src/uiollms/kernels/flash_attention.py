"""flash-attn 2 on CUDA: whether it can run for a base, and its plain causal call. Who sees whom in
encoder and decoder stands in model/attention_patterns.py.

Shapes: B rows, T new tokens of a row, S keys, N attention heads, H key/value heads, K head size.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from uiollms.files.errors import ConfigError

ASKED = "flash_attention_2"  # what the user says to transformers
DEVICE_TYPES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256


def asked(base: Any) -> bool:
    return base.config._attn_implementation == ASKED


def unfit(dtype: torch.dtype, config: Any = None) -> str | None:
    """Why flash-attn cannot compute in `dtype` (a base of this transformers config, if given);
    None if it can."""
    if dtype not in DTYPES:
        return (
            "flash-attn computes in bfloat16 and float16, found "
            f"{str(dtype).removeprefix('torch.')}"
        )
    if config is None:
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        f"flash-attn takes heads of at most {LARGEST_HEAD} numbers, found {head}"
        if head > LARGEST_HEAD
        else None
    )


def missing() -> str | None:
    """Why flash-attn cannot run on this machine; None if it can."""
    try:
        importlib.import_module("flash_attn")
    except ModuleNotFoundError:
        return (
            "the package flash-attn is not installed; run: pip install --no-build-isolation "
            "flash-attn"
        )
    except ImportError as error:  # built against another torch
        return (
            f"the package flash-attn cannot be imported ({' '.join(str(error).split())}); install "
            "it again for this torch"
        )
    if not torch.cuda.is_available():
        return "flash-attn needs a CUDA device, this machine has none"
    return (
        None
        if is_flash_attn_2_available()
        else "flash-attn is too old or not version 2; install flash-attn>=2.3.3,<3"
    )


def check_request(
    implementation: str | None, where: str, dtype: torch.dtype, device_map: Any, config: Any = None
) -> None:
    """Raises ConfigError, one line, if flash-attn is asked for in the field `where` and cannot
    be used for a base in `dtype` (of this transformers config, if it is known). Without the
    package transformers would raise ImportError or ask the hub."""
    if implementation != ASKED:
        return
    fault = unfit(dtype, config) or missing()
    if fault is None and device_map == "cpu":
        fault = 'flash-attn needs a CUDA device, device_map is "cpu"'
    if fault:
        raise ConfigError(f'{where}: "{ASKED}": {fault}; or use "sdpa"')


def can(query: Tensor) -> bool:
    """Whether flash-attn takes tensors from where this one is."""
    return query.device.type in DEVICE_TYPES


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """[B, N, T, K], twice [B, H, S, K] -> [B, T, N, K]; query i of T sees the keys up to S - T + i,
    with a `window` the last so many of them."""
    before = -1 if window is None else window - 1  # keys before a query's own, -1: all
    return importlib.import_module("flash_attn").flash_attn_func(
        *(t.transpose(1, 2) for t in (query, key, value)),
        softmax_scale=scaling,
        causal=True,
        window_size=(before, -1 if window is None else 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
