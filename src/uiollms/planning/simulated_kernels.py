"""What kernels give on pretended devices: which attention a device would choose, and remembered
shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
META = torch.device("meta")


class Shapes:
    """The outsides of results, remembered by kernel and arguments."""

    def __init__(self) -> None:
        self.seen: dict[Any, Any] = {}

    def of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the meta kernel returns. Its Python is slow, and without data it answers the same
        to the same shapes: kernels that alias nothing are asked once."""
        if not _is_functional(func):
            return func(*args, **kwargs)
        key = (func, _signature(args), _signature(tuple(kwargs.items())))
        if key not in self.seen:
            result = func(*args, **kwargs)
            self.seen[key] = tree_map_only(Tensor, _Blank.of, result)
            return result
        return tree_map_only(_Blank, _Blank.tensor, self.seen[key])


@dataclass(frozen=True)
class _Blank:
    """A tensor's outside."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Blank:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def tensor(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=META)


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return (
        tuple(map(_signature, value)) if isinstance(value, list | tuple) else (type(value), value)
    )


@cache
def _is_functional(func: Any) -> bool:
    return all(part.alias_info is None for part in (*func._schema.arguments, *func._schema.returns))


def attend(
    device: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot product attention by the kernel that the device would choose: a meta tensor's
    own choice is the plain product, whose T x T weights no real kernel keeps. CPU: what torch's
    own chooser answers. CUDA: flash attention without a mask in half precision, else the
    memory-efficient kernel (also where the card has neither)."""
    options: dict[str, Any] = dict(scale=scale)
    mask = attn_mask
    if device.type == "cpu" and not _cpu_is_flash(query, key, attn_mask, is_causal, enable_gqa):
        options |= dict(is_causal=is_causal, attn_mask=attn_mask, enable_gqa=enable_gqa)
        return aten._scaled_dot_product_attention_math(query, key, value, **options)[0]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(
            mask,
            torch.zeros((), dtype=query.dtype),
            torch.full((), float("-inf"), dtype=query.dtype),
        )
    if device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, **options
        )[0]
    if enable_gqa:
        key, value = (
            x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value)
        )
    if mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, **options
        )[0]
    bias = None if mask is None else mask.expand(len(query), query.shape[1], -1, -1)
    graph = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, graph, dropout_p, is_causal, **options
    )[0]


def _cpu_is_flash(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> bool:
    """Ask torch's chooser with small real tensors of the same kind."""
    q, k = (torch.empty(1, t.shape[1], 2, t.shape[3], dtype=t.dtype) for t in (query, key))
    small = None if mask is None else torch.ones(2, 2, dtype=mask.dtype)
    return torch._fused_sdp_choice(q, k, k, small, 0.0, is_causal, enable_gqa=enable_gqa) == 1
