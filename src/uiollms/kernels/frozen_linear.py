"""Products with frozen float32 weights on a CPU: oneDNN multiplies them, where torch's own
linear layer asks MKL.

The same numbers but for rounding. For the rows of a chunk or a few, and for the one row of a new
token, oneDNN is faster where it was measured (docs/benchmarks.md); torch asks it by itself in
half precision only. For every shape of a product it keeps half a MiB as long as the process
lives, so only shapes that come again and again are for it. Torch's own switch,
`torch.backends.mkldnn.enabled = False`, leaves everything to MKL.

While layers run so, and keep no graph, an MLP's product is also written over its gate: see
`use_onednn`.

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

FEWEST = 64  # rows worth a shape of their own, unless it is one new token


def use_onednn(
    function: Callable[[Tensor], Tensor], module: nn.Module
) -> Callable[[Tensor], Tensor]:
    """The same function of a tensor, which runs `module`; every linear layer inside, the base's
    own among them, multiplies by `linear`. Without a graph an MLP's `silu(gate) * up` is written
    over `gate`, unless hooks might have kept what that was."""

    def run(hidden: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled() and not has_forward_hooks(module)
        with _FrozenProducts(in_place):
            return function(hidden)

    return run


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether the module has an MLP whose parts, or all modules, have forward hooks, behind or
    before."""
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
        self.product: Tensor | None = (
            None  # in place: the last one, which nobody has but who asked for it
        )
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
    """[..., N, I] and a weight [O, I] -> [..., N, O], as `F.linear`."""
    if not supports_onednn(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and input.requires_grad:
        return _Linear.apply(input, weight, bias)
    return multiplied(input, weight, bias)


def supports_onednn(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN may have it: plain float32 tensors on a CPU, one row or many, nothing to
    learn in weight or bias."""
    learned = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    plain = all(
        t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)
        for t in (input, weight)
    )
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    rows = input.shape[-2:-1] == (1,) or input.shape[:-1].numel() >= FEWEST
    return plain and rows and onednn and not learned and not torch.is_autocast_enabled("cpu")


def choose_linear(rows: int) -> Callable[..., Tensor]:
    """What multiplies a number of rows that depends on the text: `linear` for one in `FEWEST` of
    all numbers, else `F.linear`."""
    return F.linear if rows % FEWEST else linear


def count_padding_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    """How many rows of zeros behind a number of rows that depends on the text, [N, I], make it
    one that `choose_linear` leaves to `linear`; none where they would be more than an eighth of
    all, or oneDNN may not have the product."""
    spare = -len(input) % FEWEST
    return spare if 8 * spare <= len(input) and supports_onednn(input, weight, bias) else 0


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight)
        return multiplied(input, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        return multiplied(grad, weight.T), None, None


def multiplied(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # What torch.compile makes of a linear layer on a CPU; there is no public name.
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
