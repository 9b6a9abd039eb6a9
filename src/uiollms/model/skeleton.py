"""Skeletons: the base's layers as one role runs them.

A skeleton is made once. Its layers and their attention modules are new objects of the library's
classes, the shells. The linears, norms and MLPs inside are the base's own objects, so every
weight exists once, and moving, quantising or offloading it acts on the base and on both roles.
The skeleton's config names our attention function, and the encoder's projections carry their
LoRA. No call changes state that another call, or the user's own use of the base, reads, so
several threads may share one model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from uiollms.model.attention import NAME
from uiollms.model.lora import AddedLoRA

# Attributes by which libraries replace a module's forward: accelerate's hooks, compiled calls.
_WRAPPERS = ("_hf_hook", "_old_forward", "forward", "_compiled_call_impl")
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def make_skeleton(base: Any, loras: Sequence[Mapping[str, Any]] | None = None) -> list[Any]:
    """Returns the layers of `base` as shells, in order. loras: for every layer, the name of a
    projection -> the LoRA whose update is added to the projection. The list must not become part
    of the module tree, which contains the layers' parts already."""
    config = copy.copy(base.config)
    config._attn_implementation = NAME
    layers = []
    for i, layer in enumerate(base.model.layers):
        adapted = {} if loras is None else loras[i]
        projections = {
            name: AddedLoRA(getattr(layer.self_attn, name), lora) for name, lora in adapted.items()
        }
        attention = make_shell(layer.self_attn, projections)
        attention.config = config
        layers.append(make_shell(layer, {"self_attn": attention}))
    return layers


def make_shell(module: nn.Module, parts: Mapping[str, nn.Module]) -> Any:
    """Returns a new object of the module's class, with the module's settings and parts, of which
    `parts` replaces some. Hooks that a user registers on the module run for the shell too.
    Replacements of the module's forward by a library do not."""
    shell = copy.copy(module)
    shell._modules = {**module._modules, **parts}
    for name in _WRAPPERS:
        shell.__dict__.pop(name, None)
    return shell


def is_sharded(base: Any) -> bool:
    """Whether PyTorch's FSDP, of either kind, shards whole layers of the base. It gathers weights
    when the layers themselves are called, while a skeleton calls shells of them. Sharded linear
    layers are supported (docs/devices.md)."""
    modules = [
        base,
        base.model,
        *base.model.layers,
        *(getattr(layer, "self_attn", layer) for layer in base.model.layers),
    ]
    return any(kind.__name__ in _SHARDED for module in modules for kind in type(module).__mro__)
