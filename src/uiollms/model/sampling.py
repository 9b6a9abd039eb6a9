"""The random numbers of a call to `generate`."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class IsolatedSampling(TorchFunctionMode):
    """Inside the context, and in this thread only, `torch.multinomial`, with which transformers
    samples, draws from a new generator on `device`.

    One draw from `source` seeds the new generator. Without a source it comes from torch's global
    generator on the CPU, so that `torch.manual_seed` determines it.
    """

    def __init__(self, device: torch.device, source: torch.Generator | None) -> None:
        super().__init__()
        source_device = "cpu" if source is None else source.device
        seed = torch.randint(2**63 - 1, (1,), generator=source, device=source_device)
        self.generator = torch.Generator(device).manual_seed(int(seed))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.multinomial and kwargs.get("generator") is None:
            kwargs = kwargs | {"generator": self.generator}
        return func(*args, **kwargs)
