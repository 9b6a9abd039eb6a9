"""Weights of a base that rest on disk and are loaded for the time of a module's call."""

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
from uiollms.files.folders import cache_dir
from uiollms.kernels.devices import locked
from uiollms.kernels.norms import promote_norms


def put_on_disk(
    base: nn.Module, names: list[str], working: torch.device, offload_dir: str | Path | None
) -> None:
    """Write the weights of the modules `names` (each with parameters of its own) to disk and
    free them. Each is loaded for the time of its own call only, on the device `working`; a graph
    remembers where they rest, not the weights."""
    if getattr(base, "dtype", None) == torch.float64:
        promote_norms(base)  # replaces modules: before the hooks
    root = Path(offload_dir) if offload_dir else cache_dir() / "offload"
    make_folder(root)
    clear_leftovers(root)  # gigabytes, of processes that were killed
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
        module.forward = _Resting(
            module, hook
        )  # in place of the library's wrapper, under which graphs keep the weights


class _Resting:
    """The forward of a module whose weights rest on disk. A weight that autograd would save for
    the backward is saved by name and loaded again there, so that a graph through many such
    modules holds none of their weights."""

    def __init__(self, module: Any, hook: AlignDevicesHook) -> None:
        self.module, self.hook, self.forward = module, hook, module._old_forward

    @locked  # all threads load into the one module, those that call the base itself too
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
