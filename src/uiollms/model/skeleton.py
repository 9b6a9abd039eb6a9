"""The base's layers as one role runs them: shells of its own around the base's parts.

A skeleton is made once. Its layers and their attention modules are new objects of the library's
classes; the linears, norms and MLPs inside are the base's own objects, so every weight exists
once, and moving, quantising or offloading a part acts on the base and on both roles. The
skeleton's config names our attention function, and the encoder's projections carry their LoRA.
So no call changes what another call, or the user's own use of the base, reads: several threads
may share one model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from uiollms.model.attention import NAME
from uiollms.model.lora import AddedLoRA

# What libraries bind to a module around its forward: accelerate's hooks, and compiled calls.
_WRAPPERS = ("_hf_hook", "_old_forward", "forward", "_compiled_call_impl")
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def skeleton(base: Any, loras: Sequence[Mapping[str, Any]] | None = None) -> list[Any]:
    """The layers of `base` in shells of their own, in order. loras: for every layer, name of a
    projection -> the LoRA that is added to what it gives. The list stays outside the module
    tree: its parts are there already."""
    config = copy.copy(base.config)
    config._attn_implementation = NAME
    layers = []
    for i, layer in enumerate(base.model.layers):
        adapted = {} if loras is None else loras[i]
        projections = {
            name: AddedLoRA(getattr(layer.self_attn, name), lora) for name, lora in adapted.items()
        }
        attention = shell(layer.self_attn, projections)
        attention.config = config
        layers.append(shell(layer, {"self_attn": attention}))
    return layers


def shell(module: nn.Module, parts: Mapping[str, nn.Module]) -> Any:
    """A new object of the module's class with the module's settings and parts, except for those
    of `parts`. The hooks that a user registers on the module run for the shell as well; what a
    library bound around its forward does not."""
    new = copy.copy(module)
    new._modules = {**module._modules, **parts}
    for name in _WRAPPERS:
        new.__dict__.pop(name, None)
    return new


def sharded(base: Any) -> bool:
    """Whether PyTorch's FSDP, of either kind, holds whole layers of the base: it gathers weights
    when the layers themselves are called, and a skeleton calls shells of them. It may hold
    linear layers (docs/scaling.md)."""
    outer = [
        base,
        base.model,
        *base.model.layers,
        *(getattr(layer, "self_attn", layer) for layer in base.model.layers),
    ]
    return any(kind.__name__ in _SHARDED for module in outer for kind in type(module).__mro__)
