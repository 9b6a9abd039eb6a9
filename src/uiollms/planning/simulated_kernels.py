"""Results of kernels on simulated devices: cached shapes, and the attention kernel that a device
would choose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
META = torch.device("meta")


class ShapeCache:
    """Shapes, strides and dtypes of results, by kernel and arguments."""

    def __init__(self) -> None:
        self.results: dict[Any, Any] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a meta kernel. Meta kernels are slow Python code, and their results depend
        on shapes only. So a kernel whose results alias no argument is called once per shape."""
        if not _is_functional(func):
            return func(*args, **kwargs)
        key = (func, _signature(args), _signature(tuple(kwargs.items())))
        if key not in self.results:
            result = func(*args, **kwargs)
            self.results[key] = tree_map_only(Tensor, _Layout.of, result)
            return result
        return tree_map_only(_Layout, _Layout.make_tensor, self.results[key])


@dataclass(frozen=True)
class _Layout:
    """Shape, strides and dtype of a tensor."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def make_tensor(self) -> Tensor:
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


def simulated_attention(
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
    """Scaled dot product attention with the kernel that the device would choose. (Meta tensors
    choose the plain product, which stores T x T weights as no real kernel does.)

    On a CPU it is the kernel that torch's function for this choice returns. On CUDA it is flash
    attention without a mask in half precision, else the memory-efficient kernel, also for cards
    that have neither.
    """
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
    """Whether torch chooses flash attention for small real tensors of the same kind."""
    q, k = (torch.empty(1, t.shape[1], 2, t.shape[3], dtype=t.dtype) for t in (query, key))
    small = None if mask is None else torch.ones(2, 2, dtype=mask.dtype)
    return torch._fused_sdp_choice(q, k, k, small, 0.0, is_causal, enable_gqa=enable_gqa) == 1
