"""Flash attention of packed rows, with its log-sum-exp: two functions over torch's own kernels.

Rows are packed one after another, without padding. A causal call is aligned at the bottom right:
the last query of a row sees all its keys. `flash_backward` accepts an output and a log-sum-exp
that were joined from several calls. It then yields the gradients of its own part.

On CUDA both functions are one variable-length call of the flash kernels in torch. On a CPU, whose
kernel has neither packed rows nor that alignment, they are several calls.

Shapes: R rows, Q queries of all rows, S keys of all rows, T queries of one row, N attention
heads, H key/value heads, K head size. Source: Dao et al. 2022 (FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from uiollms.kernels.devices import upload

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256


@dataclass(frozen=True, eq=False)
class Packing:
    """The numbers of queries and keys of packed rows, and on the device where each row begins:
    `query_starts` and `key_starts`, [R + 1] int32 each."""

    num_queries: tuple[int, ...]
    num_keys: tuple[int, ...]
    query_starts: Tensor
    key_starts: Tensor

    @classmethod
    def of(
        cls, num_queries: Sequence[int], num_keys: Sequence[int], device: torch.device
    ) -> Packing:
        starts = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            for lengths in (num_queries, num_keys)
        ]
        return cls(tuple(num_queries), tuple(num_keys), *upload(starts, device))

    def rows(self) -> Iterator[tuple[slice, slice]]:
        """Yields the queries and the keys of each row."""
        queries, keys = (slices_of(lengths) for lengths in (self.num_queries, self.num_keys))
        return zip(queries, keys, strict=True)


def slices_of(lengths: Sequence[int]) -> list[slice]:
    """lengths 3, 2 -> 0 .. 2, 3 .. 4"""
    return [slice(*pair) for pair in pairwise(accumulate(lengths, initial=0))]


def supports_flash(tensor: Tensor) -> bool:
    """Whether the two functions can compute on the device of this tensor [..., K], in its dtype:
    on a CPU always, on CUDA in half precision with heads of at most 256 numbers, a multiple of 8,
    on cards of compute capability 8.0 or higher."""
    if tensor.device.type != "cuda":
        return tensor.device.type == "cpu"
    head = tensor.shape[-1]
    fits = tensor.dtype in HALF and head <= LARGEST_HEAD and head % 8 == 0
    return fits and torch.backends.cuda.flash_sdp_enabled() and _card_has_flash(tensor.device)


@cache
def _card_has_flash(device: torch.device) -> bool:
    if not torch.cuda.is_available():  # a simulated device stands for a recent card
        return True
    recent = torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and torch.backends.cuda.is_flash_attention_available()


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attends from queries [Q, N, K] to the keys and values [S, H, K] of their own row. Returns
    the output [Q, N, K] and the log-sum-exp [N, Q] in float32 or wider."""
    return KERNELS[query.device.type][0](query, key, value, packing, causal, scaling)


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, given the gradient [Q, N, K] of the output
    and the output and log-sum-exp, of this call or of several joined."""
    backward = KERNELS[query.device.type][1]
    return backward(grad, query, key, value, out, lse, packing, causal, scaling)


# ---- CUDA ----------------------------------------------------------------------------------------


def _cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._flash_attention_forward(
        query,
        key,
        value,
        packing.query_starts,
        packing.key_starts,
        max(packing.num_queries),
        max(packing.num_keys),
        0.0,  # dropout
        causal,
        False,  # no debug mask
        scale=scaling,
    )
    return out, lse


def _cuda_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # The state of the dropout's generator, which the kernel does not read without dropout.
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)
    return aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        lse,
        packing.query_starts,
        packing.key_starts,
        max(packing.num_queries),
        max(packing.num_keys),
        0.0,
        causal,
        unused,
        unused,
        scale=scaling,
    )


# ---- CPU -----------------------------------------------------------------------------------------

_cpu_kernel = aten._scaled_dot_product_flash_attention_for_cpu
_cpu_kernel_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    if not causal:
        parts = [
            _cpu_kernel(*_as_batch(query[queries], key[keys], value[keys]), scale=scaling)
            for queries, keys in packing.rows()
        ]
        if len(parts) == 1:
            return _unbatch(parts[0][0]), parts[0][1][0]
        return torch.cat([_unbatch(out) for out, _ in parts]), torch.cat(
            [lse[0] for _, lse in parts], dim=-1
        )
    own_key, own_value = (_last_keys(kv, packing) for kv in (key, value))
    batch = _split_rows(query, packing)
    own_out, own_lse = _cpu_kernel(batch, own_key, own_value, 0.0, True, scale=scaling)
    out = own_out.transpose(1, 2).flatten(0, 1)  # [Q, N, K]
    lse = own_lse.transpose(0, 1).flatten(1)  # [N, Q]
    for queries, earlier in _earlier_keys(packing):
        part_out, part_lse = _cpu_kernel(
            *_as_batch(query[queries], key[earlier], value[earlier]), scale=scaling
        )
        join_(out[queries], lse[:, queries], _unbatch(part_out), part_lse[0])
    return out, lse


def _cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))

    def backward_part(queries: slice, keys: slice) -> tuple[Tensor, ...]:
        parts = _cpu_kernel_backward(
            *_as_batch(grad[queries], query[queries], key[keys], value[keys], out[queries]),
            lse[None, :, queries],
            0.0,
            False,
            scale=scaling,
        )
        d_key[keys], d_value[keys] = _unbatch(parts[1]), _unbatch(parts[2])
        return parts

    if not causal:
        for queries, keys in packing.rows():
            d_query[queries] = _unbatch(backward_part(queries, keys)[0])
        return d_query, d_key, d_value
    batched = (_split_rows(x, packing) for x in (grad, query))
    own = (_last_keys(kv, packing) for kv in (key, value))
    joined = _split_rows(out, packing), lse.unflatten(1, (len(packing.num_queries), -1))
    parts = _cpu_kernel_backward(
        *batched, *own, joined[0], joined[1].transpose(0, 1), 0.0, True, scale=scaling
    )
    d_query = parts[0].transpose(1, 2).flatten(0, 1)
    for row, (_, keys) in enumerate(packing.rows()):
        own_keys = slice(keys.stop - packing.num_queries[row], keys.stop)
        d_key[own_keys], d_value[own_keys] = (d[row].transpose(0, 1) for d in parts[1:])
    for queries, earlier in _earlier_keys(packing):
        d_query[queries] += _unbatch(backward_part(queries, earlier)[0])
    return d_query, d_key, d_value


def _as_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[T, N, K] -> [1, N, T, K], views."""
    return tuple(tensor.transpose(0, 1)[None] for tensor in tensors)


def _unbatch(tensor: Tensor) -> Tensor:
    """[1, N, T, K] -> [T, N, K], a view."""
    return tensor[0].transpose(0, 1)


def _split_rows(tensor: Tensor, packing: Packing) -> Tensor:
    """[Q, N, K] -> [R, N, T, K], a view. All rows have T queries."""
    return tensor.unflatten(0, (len(packing.num_queries), -1)).transpose(1, 2)


def _last_keys(kv: Tensor, packing: Packing) -> Tensor:
    """The last T keys of every row, [S, H, K] -> [R, H, T, K]."""
    if packing.num_keys == packing.num_queries:
        return _split_rows(kv, packing)
    T = packing.num_queries[0]
    return torch.stack([kv[keys.stop - T : keys.stop] for _, keys in packing.rows()]).transpose(
        1, 2
    )


def _earlier_keys(packing: Packing) -> Iterator[tuple[slice, slice]]:
    """Yields the queries of each row, and its keys before the last T, if there are any."""
    for queries, keys in packing.rows():
        stop = keys.stop - (queries.stop - queries.start)
        if stop > keys.start:
            yield queries, slice(keys.start, stop)


def join_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Joins the results of two calls for the same queries, out [Q, N, K] and lse [N, Q], in place
    of the first: the results of one call with the keys of both."""
    weight = torch.sigmoid(other_lse - lse)  # the part of the softmax that falls to the other keys
    out.lerp_(other_out, weight.T[..., None].to(out.dtype))
    torch.logaddexp(lse, other_lse, out=lse)


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (_cpu_forward, _cpu_backward),
    "cuda": (_cuda_forward, _cuda_backward),
}
