"""Products with frozen float32 weights on a CPU by oneDNN instead of MKL, which torch's linear
layer calls.

The results are the same except for rounding. oneDNN was faster wherever it was measured for the
rows of one or a few chunks, and for the single row of a new token (docs/benchmarks.md). torch
itself calls oneDNN in half precision only. oneDNN allocates half a MiB for every new shape of a
product and holds it until the process ends, so only shapes that occur again and again are given
to it. `torch.backends.mkldnn.enabled = False`, torch's own switch, leaves every product to MKL.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import TorchFunctionMode

MIN_ROWS = 64  # the fewest rows that are worth a new shape, except for the one row of a new token


def use_onednn(
    function: Callable[[Tensor], Tensor], module: nn.Module
) -> Callable[[Tensor], Tensor]:
    """Wraps a function of one tensor that runs `module`. Inside, every linear layer multiplies
    with `linear`, the layers of the frozen base among them.

    Without a graph an MLP's silu(gate) * up is computed in the memory of `gate`, unless the MLP
    has forward hooks, which might hold a reference to it. Encoding four chunks of SmolLM2's shape
    took 0.99 of the time, with one tensor [B, T, I] less alive.
    """

    def run(hidden: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled() and not has_forward_hooks(module)
        with _FrozenProducts(in_place):
            return function(hidden)

    return run


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether the parts of the module's MLP, or all modules of torch, have forward hooks."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return True
    mlp = getattr(module, "mlp", None)
    return mlp is not None and any(
        part._forward_hooks or part._forward_pre_hooks for part in mlp.modules()
    )


class _FrozenProducts(TorchFunctionMode):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        # With `in_place` these two are the last product and the last gate. Only the code that
        # computed them has a reference to them.
        self.product: Tensor | None = None
        self.gate: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            product = linear(*args, **(kwargs or {}))
            self.product = product if self.in_place else None
            return product
        if self.product is not None:
            if func is F.silu and args[0] is self.product:
                self.gate, self.product = F.silu(self.product, inplace=True), None
                return self.gate
            if (
                func is Tensor.mul
                and self.gate is not None
                and args[0] is self.gate
                and args[1] is self.product
            ):
                gate, self.gate = self.gate, None
                return gate.mul_(self.product)
        return func(*args, **(kwargs or {}))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies [..., N, I] by a weight [O, I], as `F.linear` does. Returns [..., N, O]."""
    if not supports_onednn(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and input.requires_grad:
        return _Linear.apply(input, weight, bias)
    return onednn_linear(input, weight, bias)


def supports_onednn(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN may compute the product: input and weight are plain float32 tensors on a
    CPU, there is one row or there are many, and neither weight nor bias is trained."""
    trained = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    plain = all(
        t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)
        for t in (input, weight)
    )
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    rows = input.shape[-2:-1] == (1,) or input.shape[:-1].numel() >= MIN_ROWS
    return plain and rows and onednn and not trained and not torch.is_autocast_enabled("cpu")


def choose_linear(rows: int) -> Callable[..., Tensor]:
    """Returns the function that multiplies `rows` rows, where that number depends on the text:
    `linear` for multiples of MIN_ROWS, else `F.linear`, so that shapes stay few."""
    return F.linear if rows % MIN_ROWS else linear


def count_padding_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    """Returns how many rows of zeros to append to an input [N, I] so that `choose_linear` gives
    the product to oneDNN. Returns 0 where they would be more than an eighth of the rows, or
    where oneDNN may not compute the product."""
    padding = -len(input) % MIN_ROWS
    return padding if 8 * padding <= len(input) and supports_onednn(input, weight, bias) else 0


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight)
        return onednn_linear(input, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        return onednn_linear(grad, weight.T), None, None


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # torch.compile turns a linear layer on a CPU into this call. It has no public name.
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
