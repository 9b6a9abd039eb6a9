"""RMS norms that compute a float64 base in full precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uiollms.kernels.devices import has_offloaded_weights


class FullPrecisionNorm(nn.Module):
    """An RMS norm that computes in the dtype of its input, for float64 bases. transformers' norms
    round to float32 inside, an error of 1e-7 that would hide a wrong gradient. The weight and its
    name are those of the replaced norm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))


def promote_norms(base: nn.Module) -> None:
    """Replaces every RMS norm of a float64 `base` by a `FullPrecisionNorm`. Raises ValueError if
    weights are offloaded already."""
    for parent in list(base.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                if has_offloaded_weights(child):
                    raise ValueError(
                        "a float64 base whose weights are offloaded is not supported; load it in "
                        "float32 or bfloat16"
                    )
                setattr(parent, name, FullPrecisionNorm(child))
