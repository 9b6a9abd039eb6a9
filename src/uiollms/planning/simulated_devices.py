"""Simulated devices: real code runs on meta tensors that belong to a device, while bytes and
synchronisations are counted.

    with SimulatedDevices() as devices:              # 7B parameters take no memory here
        send(base, {"model": 0, "lm_head": 1})       # device_map.py
        gradient_step(model, sample)  # raises SimulationError if an operation mixes devices
        devices.peak[torch.device("cuda", 1)]        # largest number of live bytes on GPU 1
        devices.syncs                 # operations that would have made the CPU wait for a GPU

Two modes of torch implement this. A TorchFunctionMode intercepts every Python call: `.device`
returns the simulated device, and `.to(device)` or `device=...` create a tensor that belongs to
it. A TorchDispatchMode intercepts every kernel, also those of backward: all inputs must belong to
one device (0-dimensional CPU tensors may join any, as in torch), the outputs belong to it too,
and every new storage is counted until it is freed. Tensors that are created without a device,
such as token ids, stay real tensors on the real CPU; the simulated CPU is "cpu:0". Temporary
memory that kernels allocate internally is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from uiollms.model.attention import encoder_mask, slot_mask
from uiollms.model.positions import encoder_positions
from uiollms.planning.simulated_kernels import META, ShapeCache, simulated_attention

aten = torch.ops.aten
HOST = torch.device("cpu", 0)  # the simulated CPU
_READING_METHODS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
}
_DEVICE, _IS_CUDA, _IS_CPU = (
    getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")
)
_FOREACH = {getattr(aten, name) for name in dir(aten) if name.startswith("_foreach")}
_INDEXED = (
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
)


class SimulationError(RuntimeError):
    """An operation that real devices would refuse, or whose result depends on the values of meta
    tensors, which have none."""


def simulated(device: Any) -> torch.device:
    """The simulated device of a name or GPU index: "cpu" -> cpu:0, 1 -> cuda:1."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device(device.type, device.index or 0)


class SimulatedDevices:
    """A context in which devices are simulated.

    live:  device -> bytes of the tensors that exist
    peak:  device -> largest number of live bytes since `reset_counts`
    syncs: operation -> how often it made the CPU wait for a GPU (copies from a GPU, copies to it
           that wait for its queue, reads of values)
    """

    def __init__(self) -> None:
        self.live: Counter[torch.device] = Counter()
        self.peak: Counter[torch.device] = Counter()
        self.syncs: Counter[str] = Counter()
        self._storages: dict[int, tuple[weakref.ref, torch.device]] = {}
        self._contexts = (
            _Kernels(self),
            _Calls(self),
            mock.patch.object(torch, "Generator", cpu_generator),
            mock.patch.object(torch.autograd, "_engine_run_backward", self.run_backward),
            # The optimizer calls this function, which ignores modes.
            mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", self.group_tensors),
        )

    def __enter__(self) -> SimulatedDevices:
        clear_caches()
        for context in self._contexts:
            context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)
        clear_caches()

    def run_backward(
        self, *args: Any, run: Any = torch.autograd.graph._engine_run_backward, **kwargs: Any
    ) -> Any:
        """Runs a backward with the function mode on. Torch switches the mode off in `backward`, but
        calls inside it, such as those of a checkpointed layer, have to be intercepted."""
        with _Calls(self):
            return run(*args, **kwargs)

    def device_of(self, tensor: Tensor) -> torch.device:
        """The device of a tensor. A meta tensor that was created outside the simulation belongs to
        the CPU, as loaded weights do."""
        if not tensor.is_meta:
            return tensor.device
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            self.register(tensor, HOST)
        return self._storages[key][1]

    def reset_counts(self) -> None:
        """Starts counting peaks and synchronisations again."""
        self.peak = Counter(self.live)
        self.syncs.clear()

    def register(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Counts a new meta tensor on a device until its storage is freed. Returns the tensor."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return tensor

        def freed(_: Any) -> None:
            del self._storages[key]
            self.live[device] -= size

        self._storages[key] = weakref.ref(storage, freed), device
        self.live[device] += size
        self.peak[device] = max(self.peak[device], self.live[device])
        return tensor

    def move(
        self,
        tensor: Tensor,
        device: torch.device,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> Tensor:
        """The differentiable `tensor.to(device, dtype)`."""
        source = self.device_of(tensor)
        self.count_copy(source, device, non_blocking)
        dtype = dtype or tensor.dtype
        if tensor.requires_grad and torch.is_grad_enabled() and dtype.is_floating_point:
            return _Move.apply(tensor, self, source, device, dtype)
        return self.copied(tensor, device, dtype)

    def copied(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        with torch._C._DisableTorchDispatch():
            return self.register(
                torch.empty_like(tensor, device=META, dtype=dtype, requires_grad=False), device
            )

    def group_tensors(
        self, lists: Sequence[Sequence[Any]], with_indices: bool = False
    ) -> dict[Any, Any]:
        """Groups lists of tensors by device and dtype of the first list's tensors -> (device,
        dtype) -> (the group's part of every list, its indices)."""
        groups: dict[Any, Any] = {}
        for i, tensor in enumerate(lists[0]):
            parts, indices = groups.setdefault(
                (self.device_of(tensor), tensor.dtype), ([[] for _ in lists], [])
            )
            for part, whole in zip(parts, lists, strict=True):
                if whole:
                    part.append(whole[i])
            if with_indices:
                indices.append(i)
        return groups

    def count_copy(self, source: torch.device, target: torch.device, non_blocking: bool) -> None:
        """Counts a copy if it waits for a GPU: one to the CPU always does, one from pageable CPU
        memory does unless it is non_blocking."""
        if source.type != target.type and not (non_blocking and source.type == "cpu"):
            self.syncs[f"copy from {source} to {target}"] += 1


def cpu_generator(device: Any = "cpu", real: Any = torch.Generator) -> torch.Generator:
    """Replaces `torch.Generator`. Numbers that are drawn on a simulated device have no values, so a
    CPU generator serves every device."""
    return real("cpu")


def clear_caches() -> None:
    """Empties the caches of masks and positions by device, whose tensors belong to one simulation
    or to real devices."""
    encoder_mask.cache_clear()
    slot_mask.cache_clear()
    encoder_positions.cache_clear()


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, devices, source, device, dtype):  # type: ignore[no-untyped-def]
        ctx.route = devices, source, device, tensor.dtype
        return devices.copied(tensor, device, dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        devices, source, device, dtype = ctx.route
        if devices.device_of(grad) != device:
            raise SimulationError(
                f"the gradient of a tensor on {device} arrived on {devices.device_of(grad)}"
            )
        devices.count_copy(device, source, non_blocking=False)
        return devices.copied(grad, source, dtype), None, None, None, None


class _Calls(TorchFunctionMode):
    """Intercepts Python calls that return a device or take one."""

    def __init__(self, devices: SimulatedDevices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, devices = dict(kwargs or {}), self.devices
        kwargs.pop("pin_memory", None)  # it needs a real GPU
        on_tensor = bool(args) and isinstance(args[0], Tensor)
        if on_tensor and func == _DEVICE:
            return devices.device_of(args[0])
        if on_tensor and func in (_IS_CUDA, _IS_CPU):
            return devices.device_of(args[0]).type == ("cuda" if func == _IS_CUDA else "cpu")
        if func is Tensor.to:
            return self.to(func, *args, **kwargs)
        if func is Tensor.cpu and args[0].is_meta:
            return self.to(Tensor.to, args[0], HOST)
        if func in _READING_METHODS and args[0].is_meta:
            return self.read(func, args[0])
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return simulated_attention(devices.device_of(args[0]), *args, **kwargs)
        device = kwargs.get("device")
        if (
            device is None
            or simulated(device).type == "meta"
            or torch.device(device) == torch.device("cpu")
        ):
            return func(*args, **kwargs)
        kwargs = kwargs | {"device": None}
        if func is torch.tensor:  # created from Python numbers on the CPU, then copied
            return devices.move(func(*args, **kwargs), simulated(device))
        if on_tensor:  # a method such as new_zeros, for which device=None is the tensor's device
            raise SimulationError(f"{func} with the argument device is not simulated")
        created = func(*args, **kwargs | {"device": META})
        return devices.register(created, simulated(device))

    def to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {k: v for k, v in kwargs.items() if k != "copy"}
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor):
            device, dtype, non_blocking = (
                self.devices.device_of(other),
                other.dtype,
                kwargs.get("non_blocking", False),
            )
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        source = self.devices.device_of(tensor)
        if (
            device is None
            or device == source
            or (device.type == "cpu" and not tensor.is_meta and device.index is None)
        ):
            return func(tensor, dtype or tensor.dtype)
        if simulated(device) == source:
            return func(tensor, dtype or tensor.dtype)
        return self.devices.move(tensor, simulated(device), dtype, non_blocking)

    def read(self, func: Any, tensor: Tensor) -> Any:
        """Reads ones, because a meta tensor has no values."""
        device = self.devices.device_of(tensor)
        if device.type != "cpu":
            self.devices.syncs[f"{func.__name__} on {device}"] += 1
        return func(torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu"))


class _Kernels(TorchDispatchMode):
    """Intercepts kernels. Their inputs must be on one device; their outputs belong to it and are
    counted."""

    def __init__(self, devices: SimulatedDevices) -> None:
        super().__init__()
        self.devices = devices
        self.shapes = ShapeCache()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for value in (*args, *kwargs.values()) for t in tensors_in(value)]
        if not any(t.is_meta for t in inputs):
            return func(*args, **kwargs)
        if func.overloadpacket in _FOREACH:
            return self.foreach(func, args, kwargs)
        device = self.common_device(func, inputs, args, kwargs)
        if "generator" in kwargs:
            kwargs = kwargs | {"generator": None}
        if not all(t.is_meta for t in inputs):
            args, kwargs = tree_map_only(Tensor, _as_meta, (args, kwargs))
        try:
            result = self.shapes.call(func, args, kwargs)
        except NotImplementedError as error:
            raise SimulationError(
                f"{func} depends on values of a tensor on {device}: it would wait for the device"
            ) from error
        for output in tensors_in(result):
            self.devices.register(output, device)
        return result

    def common_device(
        self, func: Any, inputs: Iterable[Tensor], args: Any, kwargs: Any
    ) -> torch.device:
        found: list[torch.device] = []
        for tensor in inputs:
            device = simulated(self.devices.device_of(tensor))
            if device not in found and not (tensor.dim() == 0 and device.type == "cpu"):
                found.append(device)
        if len(found) > 1 and func in _INDEXED:
            # Indices may be on the CPU: torch copies them, and waits.
            device = simulated(self.devices.device_of(args[0]))
            if set(found) <= {device, HOST}:
                self.devices.syncs[f"index on {device} from the CPU"] += 1
                return device
        if len(found) > 1 and func is aten.copy_.default:
            target, source = (simulated(self.devices.device_of(t)) for t in args[:2])
            self.devices.count_copy(
                source, target, kwargs.get("non_blocking", len(args) > 2 and args[2])
            )
            return target
        if len(found) > 1:
            raise SimulationError(f"{func} mixes tensors of {', '.join(map(str, found))}")
        return found[0] if found else HOST

    def foreach(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation on lists of tensors. The n-th tensors of all lists must be on one
        device."""
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        devices = [self.common_device(func, group, (), {}) for group in zip(*lists, strict=True)]
        result = func(*args, **kwargs)
        for output, device in zip(result or (), devices, strict=False):
            self.devices.register(output, device)
        return result


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors of one argument or result of a kernel."""
    if isinstance(value, Tensor):
        return (value,)
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, list | tuple) else ()


def _as_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device=META)
