"""Weights of a base that stay on disk and are loaded only while a module is called."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    align_module_device,
    offload_state_dict,
)
from torch import Tensor, nn

from uiollms.files.atomic import clear_leftovers, make_folder, work_path
from uiollms.files.errors import ConfigError
from uiollms.files.folders import cache_dir
from uiollms.kernels.devices import locked
from uiollms.kernels.norms import promote_norms


def put_on_disk(
    base: nn.Module, names: list[str], working: torch.device, offload_dir: str | Path | None
) -> None:
    """Writes the weights of the modules `names`, which have parameters, to disk and free them. The
    weights of a module are loaded to the device `working` for each call only; an autograd graph
    stores their names instead of the weights."""
    if any(getattr(p, "quant_state", None) is not None for p in base.parameters()):
        raise ConfigError(
            "model.device_map: some modules are left for the disk, where weights of 4 bits cannot "
            "be; name a device for every module, or set model.quantization to null"
        )
    if getattr(base, "dtype", None) == torch.float64:
        promote_norms(base)  # it replaces modules, so before the hooks
    root = Path(offload_dir) if offload_dir else cache_dir() / "offload"
    make_folder(root)
    clear_leftovers(root)  # gigabytes of processes that were killed
    folder = work_path(root)
    folder.mkdir(mode=0o700)
    weakref.finalize(base, shutil.rmtree, folder, ignore_errors=True)
    modules = {name: base.get_submodule(name) for name in names}
    weights = {
        f"{n}.{key}": p.detach()
        for n, m in modules.items()
        for key, p in m.named_parameters(recurse=False)
    }
    offload_state_dict(folder, weights)
    del weights
    loader = OffloadedWeightsLoader(save_folder=folder)
    for name, module in modules.items():
        hook = AlignDevicesHook(
            working, offload=True, weights_map=PrefixedDataset(loader, f"{name}.")
        )
        add_hook_to_module(module, hook)
        module.forward = _OffloadedForward(
            module, hook
        )  # in place of the library's wrapper, under which graphs keep the weights


class _OffloadedForward:
    """The forward of a module whose weights are on disk. If autograd saves a weight for the
    backward pass, its name is saved instead, and the weight is loaded again in the backward pass.
    So a graph through many such modules holds none of their weights."""

    def __init__(self, module: Any, hook: AlignDevicesHook) -> None:
        self.module, self.hook, self.forward = module, hook, module._old_forward

    @locked  # all threads load into the same module
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with (
            align_module_device(self.module),
            torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack),
        ):
            return self.forward(*args, **kwargs)

    def pack(self, tensor: Tensor) -> Any:
        for name, weight in self.module.named_parameters(recurse=False):
            if weight.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                return name, tensor.shape, tensor.stride(), tensor.storage_offset()
        return tensor

    def unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        name, *view = saved
        return self.hook.weights_map[name].to(self.hook.execution_device).as_strided(*view)
