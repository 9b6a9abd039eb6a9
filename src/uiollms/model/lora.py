"""LoRA: the low-rank updates that turn one frozen base into an encoder and a decoder.

Shapes: C rows of a batch (chunks), T tokens of a row, I inputs, O outputs, r rank. Source: Hu et
al. 2021 (arXiv 2106.09685); the roles are UIO-LLMs section 3.1 (encoder) and 3.2 (transfer
head).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uiollms.kernels.devices import device_of

# A multiplication by any odd 64-bit constant spreads neighbouring seeds. This one comes from the
# golden ratio (Knuth, TAOCP 3, 6.4).
_SPREAD = 0x9E3779B97F4A7C15


class LoRA(nn.Module):
    """Computes `alpha / rank * B A dropout(x)`, the update that is added to the output of a frozen
    linear layer for `x`.

    dtype: the dtype of the parameters, see `master_dtype`. salt: a number that differs between the
    LoRAs of a model, so that their dropout masks differ. `A` [r, I] is initialized
    Kaiming-uniform and `B` [O, r] with zeros, as in PEFT, so the update starts at zero.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float,
        salt: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        device = device_of(linear)
        self.lora_A = nn.Parameter(
            torch.empty(rank, linear.in_features, dtype=dtype, device=device)
        )
        self.lora_B = nn.Parameter(
            torch.zeros(linear.out_features, rank, dtype=dtype, device=device)
        )
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank
        self.dropout = dropout
        self.salt = salt

    def forward(self, x: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Returns the update [C, T, O] for `x` [C, T, I], in the dtype of `x`. `seeds`, one for
        each row, switch dropout on."""
        if torch.compiler.is_compiling():  # the compiled graph contains the conversions
            down = F.linear(x, self.lora_A.to(x.dtype))
            return F.linear(down, (self.scaling * self.lora_B).to(x.dtype))
        if self.dropout and seeds is not None:
            x = x * self._dropout_mask(x, seeds)
        A, B = self._converted(x.dtype)
        if torch.is_grad_enabled():
            A = _LeadTo.apply(A, self.lora_A, 1.0)
            B = _LeadTo.apply(B, self.lora_B, self.scaling)
        return F.linear(F.linear(x, A), B)

    @torch.no_grad()
    def _converted(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns A [r, I] and `scaling` * B [O, r] in `dtype`, inside `convert_once` always the
        same two tensors."""
        converted = _converted.get()
        if converted is not None and (self, dtype) in converted:
            return converted[self, dtype]
        weights = self.lora_A.to(dtype), (self.scaling * self.lora_B).to(dtype)
        if converted is not None:
            converted[self, dtype] = weights
        return weights

    def _dropout_mask(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        """Returns a mask [C, T, I] of 0 and 1/(1-p). The mask of a row depends only on the row's
        seed. So a chunk that is encoded again, in another batch, gets the same mask."""
        mask = torch.empty_like(x, dtype=torch.float32)
        for row, seed in zip(mask, seeds, strict=True):
            generator = torch.Generator(x.device).manual_seed((seed * _SPREAD + self.salt) % 2**63)
            row.bernoulli_(1 - self.dropout, generator=generator)
        return mask.div_(1 - self.dropout).to(x.dtype)


class _LeadTo(torch.autograd.Function):
    """Returns `converted`, which is `factor * parameter` in another dtype, and passes its gradient
    on to the parameter, in the parameter's dtype. It does what autograd does for the conversion
    itself. Each use of a converted tensor gets a node of its own, so that their gradients are
    added in the parameter's dtype."""

    @staticmethod
    def forward(ctx, converted, parameter, factor):  # type: ignore[no-untyped-def]
        ctx.factor, ctx.dtype = factor, parameter.dtype
        return converted.detach()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = grad.to(ctx.dtype)
        return None, grad if ctx.factor == 1 else ctx.factor * grad, None


_converted: ContextVar[dict[tuple[LoRA, torch.dtype], tuple[Tensor, Tensor]] | None] = ContextVar(
    "LoRA weights in the dtype of the base", default=None
)


@contextmanager
def convert_once() -> Iterator[None]:
    """Inside the context, and in this thread only, every LoRA scales its weights and converts them
    to the dtype of its input at its first call, and not again. Values and gradients are the same
    to the bit. The parameters must not change inside."""
    token = _converted.set({})
    try:
        yield
    finally:
        _converted.reset(token)


def master_dtype(base_dtype: torch.dtype, masters: str = "fp32") -> torch.dtype:
    """Returns the dtype of the trained parameters and of sums of gradients.

    With `masters` "fp32" it is float32 for a base in bfloat16 or float16, because small steps
    would vanish in bfloat16, and the base's dtype otherwise. With "base" it is always the base's
    dtype, as in the released program.
    """
    is_half = base_dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and masters == "fp32" else base_dtype


_seeds: ContextVar[Sequence[int] | None] = ContextVar("dropout seeds of this call", default=None)


@contextmanager
def dropout_seeds(seeds: Sequence[int] | None) -> Iterator[None]:
    """Inside the context, and in this thread only, every `AddedLoRA` drops inputs by `seeds`, one
    for each row. With None it drops nothing. A function that activation checkpointing runs again
    must enter the context itself."""
    token = _seeds.set(seeds)
    try:
        yield
    finally:
        _seeds.reset(token)


class AddedLoRA(nn.Module):
    """Adds the update of a LoRA to the output of a frozen linear layer, which the base and both
    roles share.

    It does not change `requires_grad`, as PEFT's `set_adapter` does, which would switch off the
    gradients of the other role.
    """

    def __init__(self, linear: nn.Module, lora: LoRA) -> None:
        super().__init__()
        self.linear, self.lora = linear, lora

    def forward(self, x: Tensor) -> Tensor:
        """Maps [C, T, I] to [C, T, O]."""
        # torch.compile cannot read the variable, so compiled layers have no dropout.
        seeds = None if torch.compiler.is_compiling() else _seeds.get()
        return self.linear(x) + self.lora(x, seeds)
