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

# Any odd 64-bit constant spreads neighbouring seeds; this is the golden ratio's (Knuth, TAOCP 3,
# 6.4).
_SPREAD = 0x9E3779B97F4A7C15


class LoRA(nn.Module):
    """`update(x) = alpha / rank * B A dropout(x)`, to be added to what a frozen linear layer
    gives for `x`.

    dtype: of the parameters, see `master_dtype`. `A` [r, I] starts Kaiming-uniform and `B` [O,
    r] at zero, as in PEFT, so the update starts at zero.
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
        """x [C, T, I] -> update [C, T, O], in the dtype of `x`. `seeds`, one for each row,
        switch dropout on."""
        if self.dropout and seeds is not None:
            x = x * self._keep_mask(x, seeds)
        down = F.linear(x, self.lora_A.to(x.dtype))
        return F.linear(down, (self.scaling * self.lora_B).to(x.dtype))

    def _keep_mask(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        """[C, T, I] of 0 and 1/(1-p). A row's mask depends on its own seed only, never on the
        batch around it: a chunk that is encoded again, in whatever batch, meets the same mask."""
        keep = torch.empty_like(x, dtype=torch.float32)
        for row, seed in zip(keep, seeds, strict=True):
            generator = torch.Generator(x.device).manual_seed((seed * _SPREAD + self.salt) % 2**63)
            row.bernoulli_(1 - self.dropout, generator=generator)
        return keep.div_(1 - self.dropout).to(x.dtype)


def master_dtype(base_dtype: torch.dtype, masters: str = "fp32") -> torch.dtype:
    """The dtype trained parameters and sums of gradients are kept in: `masters` "fp32" is
    float32 for half-precision bases (small steps would vanish in bfloat16), else the base's own;
    "base" is the base's own always, as in the released program."""
    half = base_dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and masters == "fp32" else base_dtype


_seeds: ContextVar[Sequence[int] | None] = ContextVar("dropout seeds of this call", default=None)


@contextmanager
def dropout_seeds(seeds: Sequence[int] | None) -> Iterator[None]:
    """While open, in this thread, an `AddedLoRA` drops inputs by `seeds`, one for each row;
    None: drops nothing. A forward that activation checkpointing runs again must open it inside
    the function that is run again."""
    token = _seeds.set(seeds)
    try:
        yield
    finally:
        _seeds.reset(token)


class AddedLoRA(nn.Module):
    """A frozen linear layer, shared with the base, and the update of a LoRA added to what it
    gives.

    `requires_grad` is never touched (PEFT's `set_adapter` would switch the other role's
    gradients off).
    """

    def __init__(self, linear: nn.Module, lora: LoRA) -> None:
        super().__init__()
        self.linear, self.lora = linear, lora

    def forward(self, x: Tensor) -> Tensor:
        """[C, T, I] -> [C, T, O]"""
        return self.linear(x) + self.lora(x, _seeds.get())
