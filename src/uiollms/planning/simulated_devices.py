"""Pretended devices: real code on meta tensors that know where they would live, counting bytes
and synchronisations.

    with Pretend() as world:                         # 7B parameters take no memory here
        send(base, {"model": 0, "lm_head": 1})       # placement.py
        gradient_step(model, sample)  # raises SimulationError where an operation mixes devices
        world.peak[torch.device("cuda", 1)]          # bytes alive at most on GPU 1, graphs included
        world.syncs                   # operations that would have made the CPU wait for a GPU

Two library hooks carry it. A TorchFunctionMode sees every Python call: there `.device` answers
the pretended device, and `.to(device)` or `device=...` make a tensor that belongs to it. A
TorchDispatchMode sees every kernel, those of backward included: there all inputs must belong to
one device (CPU numbers of no dimension may join any, as in torch), the outputs belong to it too,
and every new storage is counted until it is freed. Tensors made without a device, such as token
ids, stay real tensors on the real CPU; a pretended CPU is "cpu:0". What kernels allocate inside
themselves is not seen.
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

from uiollms.model.attention import encoder_mask, encoder_positions, slot_mask
from uiollms.planning.simulated_kernels import META, Shapes, attend

aten = torch.ops.aten
HOST = torch.device("cpu", 0)  # the pretended CPU
_READS = {
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
    """An operation that real devices would refuse, or whose result depends on data that is not
    there."""


def simulated(device: Any) -> torch.device:
    """The device that tensors sent to `device` belong to: "cpu" -> cpu:0, 1 -> cuda:1."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device(device.type, device.index or 0)


class SimulatedDevices:
    """A world of pretended devices, entered with `with`. live, peak: device -> bytes; syncs:
    what was done -> how often (copies from a GPU to the CPU, copies to it that wait for its
    queue, reads of values)."""

    def __init__(self) -> None:
        self.live: Counter[torch.device] = Counter()
        self.peak: Counter[torch.device] = Counter()
        self.syncs: Counter[str] = Counter()
        self._storages: dict[int, tuple[weakref.ref, torch.device]] = {}
        self._contexts = (
            _Kernels(self),
            _Calls(self),
            mock.patch.object(torch, "Generator", generator),
            mock.patch.object(torch.autograd, "_engine_run_backward", self.run_backward),
            mock.patch.object(
                torch._C, "_group_tensors_by_device_and_dtype", self.grouped
            ),  # the optimizer's; it asks no mode
        )

    def __enter__(self) -> SimulatedDevices:
        forget_tables()
        for context in self._contexts:
            context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)
        forget_tables()

    def run_backward(
        self, *args: Any, run: Any = torch.autograd.graph._engine_run_backward, **kwargs: Any
    ) -> Any:
        """Calls inside a backward, such as a checkpointed layer's, are seen too: torch hands
        `backward` to a mode with the mode itself switched off."""
        with _Calls(self):
            return run(*args, **kwargs)

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where a tensor lives. A meta tensor from before this world was loaded, as weights are,
        to the CPU."""
        if not tensor.is_meta:
            return tensor.device
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            self.claim(tensor, HOST)
        return self._storages[key][1]

    def watch_from_here(self) -> None:
        """Forget peaks and synchronisations so far."""
        self.peak = Counter(self.live)
        self.syncs.clear()

    def claim(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Count a new meta tensor on a device, until its storage is freed. Returns it."""
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
        """`tensor.to(device, dtype)`, differentiable."""
        source = self.device_of(tensor)
        self.note_copy(source, device, non_blocking)
        dtype = dtype or tensor.dtype
        if tensor.requires_grad and torch.is_grad_enabled() and dtype.is_floating_point:
            return _Move.apply(tensor, self, source, device, dtype)
        return self.copied(tensor, device, dtype)

    def copied(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        with torch._C._DisableTorchDispatch():
            return self.claim(
                torch.empty_like(tensor, device=META, dtype=dtype, requires_grad=False), device
            )

    def grouped(self, lists: Sequence[Sequence[Any]], with_indices: bool = False) -> dict[Any, Any]:
        """Lists of tensors that belong together -> (device, dtype) of the first list's -> their
        parts of the lists, indices."""
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

    def note_copy(self, source: torch.device, target: torch.device, non_blocking: bool) -> None:
        """A copy from a GPU to the CPU waits for the GPU; one from pageable CPU memory does
        unless it is non_blocking."""
        if source.type != target.type and not (non_blocking and source.type == "cpu"):
            self.syncs[f"copy from {source} to {target}"] += 1


def generator(device: Any = "cpu", real: Any = torch.Generator) -> torch.Generator:
    """A random generator for `device`; what it draws on a pretended device has no values, so any
    will do there."""
    return real("cpu")


def forget_tables() -> None:
    """Masks and positions that are kept by device must not pass between worlds."""
    encoder_mask.cache_clear()
    slot_mask.cache_clear()
    encoder_positions.cache_clear()


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, world, source, device, dtype):  # type: ignore[no-untyped-def]
        ctx.route = world, source, device, tensor.dtype
        return world.copied(tensor, device, dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        world, source, device, dtype = ctx.route
        if world.device_of(grad) != device:
            raise SimulationError(
                f"the gradient of a tensor on {device} arrived on {world.device_of(grad)}"
            )
        world.note_copy(device, source, non_blocking=False)
        return world.copied(grad, source, dtype), None, None, None, None


class _Calls(TorchFunctionMode):
    """Python calls: who is asked for a device, and who is told one."""

    def __init__(self, world: SimulatedDevices) -> None:
        super().__init__()
        self.world = world

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, world = kwargs or {}, self.world
        own = bool(args) and isinstance(args[0], Tensor)
        if own and func == _DEVICE:
            return world.device_of(args[0])
        if own and func in (_IS_CUDA, _IS_CPU):
            return world.device_of(args[0]).type == ("cuda" if func == _IS_CUDA else "cpu")
        if func is Tensor.to:
            return self.to(func, *args, **kwargs)
        if func is Tensor.cpu and args[0].is_meta:
            return self.to(Tensor.to, args[0], HOST)
        if func in _READS and args[0].is_meta:
            return self.read(func, args[0])
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return attend(world.device_of(args[0]), *args, **kwargs)
        device = kwargs.get("device")
        if (
            device is None
            or simulated(device).type == "meta"
            or torch.device(device) == torch.device("cpu")
        ):
            return func(*args, **kwargs)
        kwargs = kwargs | {"device": None}
        if func is torch.tensor:  # from Python numbers: made on the CPU, then copied
            return world.move(func(*args, **kwargs), simulated(device))
        if own:  # new_zeros and the like: torch takes device=None for the tensor's own
            raise SimulationError(f"{func} with a device of its own is not known here")
        made = func(*args, **kwargs | {"device": META})
        return world.claim(made, simulated(device))

    def to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {k: v for k, v in kwargs.items() if k != "copy"}
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor):
            device, dtype, non_blocking = (
                self.world.device_of(other),
                other.dtype,
                kwargs.get("non_blocking", False),
            )
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        here = self.world.device_of(tensor)
        if (
            device is None
            or device == here
            or (device.type == "cpu" and not tensor.is_meta and device.index is None)
        ):
            return func(tensor, dtype or tensor.dtype)
        if simulated(device) == here:
            return func(tensor, dtype or tensor.dtype)
        return self.world.move(tensor, simulated(device), dtype, non_blocking)

    def read(self, func: Any, tensor: Tensor) -> Any:
        """Ones in the place of the values that are not there."""
        device = self.world.device_of(tensor)
        if device.type != "cpu":
            self.world.syncs[f"{func.__name__} on {device}"] += 1
        return func(torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu"))


class _Kernels(TorchDispatchMode):
    """Kernels: all inputs on one device; outputs belong to it and are counted."""

    def __init__(self, world: SimulatedDevices) -> None:
        super().__init__()
        self.world = world
        self.shapes = Shapes()

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
            result = self.shapes.of(func, args, kwargs)
        except NotImplementedError as error:
            raise SimulationError(
                f"{func} depends on values of a tensor on {device}: it would wait for the device"
            ) from error
        for output in tensors_in(result):
            self.world.claim(output, device)
        return result

    def common_device(
        self, func: Any, inputs: Iterable[Tensor], args: Any, kwargs: Any
    ) -> torch.device:
        found: list[torch.device] = []
        for tensor in inputs:
            device = simulated(self.world.device_of(tensor))
            if device not in found and not (tensor.dim() == 0 and device.type == "cpu"):
                found.append(device)
        if (
            len(found) > 1 and func in _INDEXED
        ):  # indices may come from the CPU: torch copies them, and waits
            device = simulated(self.world.device_of(args[0]))
            if set(found) <= {device, HOST}:
                self.world.syncs[f"index on {device} from the CPU"] += 1
                return device
        if len(found) > 1 and func is aten.copy_.default:
            target, source = (simulated(self.world.device_of(t)) for t in args[:2])
            self.world.note_copy(
                source, target, kwargs.get("non_blocking", len(args) > 2 and args[2])
            )
            return target
        if len(found) > 1:
            raise SimulationError(f"{func} mixes tensors of {', '.join(map(str, found))}")
        return found[0] if found else HOST

    def foreach(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation over lists of tensors: the n-th of every list live together."""
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        devices = [self.common_device(func, group, (), {}) for group in zip(*lists, strict=True)]
        result = func(*args, **kwargs)
        for output, device in zip(result or (), devices, strict=False):
            self.world.claim(output, device)
        return result


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors of one argument or result of a kernel."""
    if isinstance(value, Tensor):
        return (value,)
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, list | tuple) else ()


def _as_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device=META)
