"""Place the modules of the base on devices or on disk.

Encoder, decoder and teacher use the same base. A map in the authors' style names a layer once for
each of them, and must name the same device each time. The words "auto", "balanced" and "sequential"
become a map by accelerate's rules.

Several processes on one machine use different GPUs. The process with local rank r has:
    a word                             GPU r
    numbers, of which a map names c    the same numbers plus r * c: a map that names the GPUs 0 and
                                       1 puts the process with local rank 3 on the GPUs 6 and 7
No function here makes torch use the GPU of another process, not even to read its free memory, which
would create a CUDA context there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import (
    get_balanced_memory,
    infer_auto_device_map,
)
from torch import nn

from uiollms.distributed.launch import LocalProcess, local_process
from uiollms.distributed.offload import put_on_disk
from uiollms.files.errors import ConfigError

# encoder.encoder.base_model.model.model.layers.3 -> model.layers.3;
# decoder.decoder.base_model.model.lm_head -> lm_head
_AUTHORS = re.compile(r"^(encoder\.encoder|decoder\.decoder)\.base_model\.model\.")
# The token embeddings are on the device of the base's embedding; the teacher is the base.
_FOLLOWERS = {"encoder.retrieval_token", "decoder.repeat_token", "teacher"}
CPU = torch.device("cpu")
# Fraction of a GPU's free memory that auto, balanced and sequential fill with weights, as in
# transformers. The rest is for activations.
MAX_FILL = 0.9

Machine = Mapping[torch.device, int]  # device -> bytes free on it


def this_machine(
    device_map: Any = "auto", process: LocalProcess | None = None
) -> dict[torch.device, int]:
    """Returns the free bytes of every GPU that a process may use with a config's device map, 0 for
    the machine's other GPUs, and the process's part of the free main memory."""
    process = process or local_process()
    own = local_gpus(device_map, process)
    return {
        torch.device("cuda", i): torch.cuda.mem_get_info(i)[0] if i in own else 0
        for i in range(torch.cuda.device_count())
    } | {CPU: psutil.virtual_memory().available // process.size}


def named_gpus(device_map: Any) -> list[int]:
    """The numbers of the GPUs that a device map names, ascending. A word names none."""
    if isinstance(device_map, dict):
        places = [place for key, place in device_map.items() if key not in _FOLLOWERS]
    else:
        places = [device_map]
    return sorted({place for place in places if isinstance(place, int)})


def localised_map(device_map: Any, process: LocalProcess) -> Any:
    """The device map with the numbers of a process's own GPUs. Words stay as they are."""
    offset = process.rank * len(named_gpus(device_map))
    if isinstance(device_map, dict):
        return {
            key: place + offset if isinstance(place, int) else place
            for key, place in device_map.items()
        }
    return device_map + offset if isinstance(device_map, int) else device_map


def local_gpus(device_map: Any, process: LocalProcess | None = None) -> list[int]:
    """The numbers of the machine's GPUs that a process may use with a config's device map,
    ascending. GPUs that do not exist are left out."""
    process = process or local_process()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if isinstance(device_map, dict | int):
        numbers: Collection[int] = named_gpus(localised_map(device_map, process))
    elif device_map == "cpu":
        numbers = ()
    else:
        numbers = range(count) if process.size == 1 else (process.rank,)
    return [number for number in numbers if number < count]


def first_device(device_map: Any, process: LocalProcess | None = None) -> torch.device:
    """The first GPU that a process may use with a config's device map, else the CPU."""
    gpus = local_gpus(device_map, process)
    return torch.device("cuda", gpus[0]) if gpus else CPU


def check_local_gpus(
    device_map: Any, path: str | Path, count: int, process: LocalProcess | None = None
) -> None:
    """Raises ConfigError unless each of several processes has its own of the machine's `count`
    GPUs. For a single process `resolve_map` checks the numbers."""
    size = (process or local_process()).size
    named = named_gpus(device_map)
    uses_word = isinstance(device_map, str) and device_map != "cpu" and count > 0
    if size == 1 or not (named or uses_word):
        return
    where, gpus, each = f"{path}: model.device_map", named or [0], max(1, len(named))
    users: dict[int, int] = {}
    for other in range(size):
        for gpu in gpus:
            first = users.setdefault(gpu + other * each, other)
            if first != other:
                raise ConfigError(
                    f"{where}: names the GPUs {', '.join(map(str, named))}; of the {size} "
                    f"processes on this machine, number r adds r * {each} to them, so that "
                    f"{first} and {other} would share GPU {gpu + other * each}; name neighbouring "
                    f"GPUs, such as {', '.join(map(str, range(each)))}"
                )
    if max(users) < count:
        return
    found = f"the {size} processes of this machine need the GPUs up to {max(users)}"
    rule = f"{each} for each" if named else f'one for each with "{device_map}"'
    most = sum(max(gpus) + other * each < count for other in range(size))
    remedy = f"start at most {most} on this machine" if most else "name fewer GPUs"
    raise ConfigError(
        f'{where}: {found} ({rule}), and it has {count}; {remedy}, or use "cpu"; if the launcher '
        "shows each process its own GPUs only, set LOCAL_RANK=0 and LOCAL_WORLD_SIZE=1 for all of "
        "them"
    )


def normalise_map(device_map: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Converts a map in the authors' style to base module -> device by removing prefixes. Raises
    ConfigError if encoder and decoder name different devices."""
    result: dict[str, Any] = {}
    named_by: dict[str, str] = {}
    for key, device in device_map.items():
        if key in _FOLLOWERS:
            continue
        name = _AUTHORS.sub("", key)
        if result.setdefault(name, device) != device:
            raise ConfigError(
                f"{path}: model.device_map[{key!r}]: device {device}, but {named_by[name]!r} puts "
                "the same module on "
                f"{result[name]}: encoder and decoder share one base here; name one device for both"
            )
        named_by.setdefault(name, key)
    return result


def place_modules(
    base: nn.Module,
    device_map: Any,
    path: str | Path,
    offload_dir: str | Path | None = None,
    process: LocalProcess | None = None,
) -> None:
    """Moves the modules of `base` to their devices on this machine, in place. Modules on "disk" are
    written to a new folder in `offload_dir` (default: the cache folder), which is removed with the
    base. Raises ConfigError as `resolve_map` does."""
    resolved = resolve_map(base, device_map, path, this_machine(device_map, process), process)
    move_modules(base, resolved)
    if resting := on_disk(base, resolved):
        put_on_disk(base, resting, as_device(compute_device(resolved)), offload_dir)


def resolve_map(
    base: nn.Module,
    device_map: Any,
    path: str | Path,
    machine: Machine,
    process: LocalProcess | None = None,
) -> dict[str, Any]:
    """Converts any accepted form of a map to module -> GPU number, "cpu" or "disk", so that the
    modules cover the base. Raises ConfigError for a device or module that does not exist, and for a
    module that no key covers. process: by default that of `local_process`."""
    process = process or local_process()
    check_local_gpus(device_map, path, len(machine) - (CPU in machine), process)
    resolved = expand_map(base, localised_map(device_map, process), path, machine, process)
    modules = dict(base.named_modules())
    for name, device in resolved.items():
        where = (
            f"model.device_map[{name!r}]" if isinstance(device_map, dict) else "model.device_map"
        )
        if name not in modules:
            raise ConfigError(f"{path}: {where}: {no_such_module(name, modules)}")
        check_device(device, where, path, machine)
    for name, _ in base.named_parameters():
        if device_of(name, resolved) is None:
            raise ConfigError(
                f"{path}: model.device_map: no key covers {name.rsplit('.', 1)[0]!r}; name it, or "
                "a prefix of it such as 'model'"
            )
    # Maps do not name the rotary table, a buffer; it is used where the token embeddings are.
    first = device_of("model.embed_tokens", resolved)
    return {"model.rotary_emb": compute_device(resolved) if first == "disk" else first} | resolved


def move_modules(base: nn.Module, resolved: Mapping[str, Any]) -> None:
    """Moves modules to the devices of a resolved map. Modules on disk are not moved."""
    modules = dict(base.named_modules())
    for name in sorted(resolved, key=len):  # longer names are more specific and move last
        if resolved[name] != "disk":
            modules[name].to(as_device(resolved[name]))


def on_disk(base: nn.Module, resolved: Mapping[str, Any]) -> list[str]:
    """The modules with direct parameters that a resolved map puts on disk."""
    owners = {name.rpartition(".")[0] for name, _ in base.named_parameters(remove_duplicate=False)}
    return [
        name
        for name, _ in base.named_modules()
        if name in owners and device_of(name, resolved) == "disk"
    ]


def compute_device(resolved: Mapping[str, Any]) -> int | str:
    """The device on which modules on disk compute: the first GPU of a map, else the CPU."""
    return next(
        (device for device in resolved.values() if isinstance(device, int)),
        "cpu",
    )


def expand_map(
    base: nn.Module, device_map: Any, path: str | Path, machine: Machine, process: LocalProcess
) -> dict[str, Any]:
    """Converts any accepted form of a map to base module (or a prefix; "" is the whole base) ->
    device. The words distribute the weights over all GPUs (of several processes, over the
    process's own), then the CPU, then disk: "sequential" fills one GPU after the other, "auto" and
    "balanced" fill them evenly."""
    if isinstance(device_map, dict):
        return normalise_map(device_map, path)
    gpus = [
        device
        for device in machine
        if device.type == "cuda" and (process.size == 1 or device.index == process.rank)
    ]
    if isinstance(device_map, int) or device_map == "cpu" or not gpus:
        return {"": device_map if isinstance(device_map, int) else "cpu"}
    limits: dict[Any, Any] = {gpu.index: int(MAX_FILL * machine[gpu]) for gpu in gpus} | {
        "cpu": machine[CPU]
    }
    whole: Any = base._no_split_modules
    whole = list(whole) if whole else None
    if device_map != "sequential":
        limits = get_balanced_memory(base, limits, no_split_module_classes=whole)
    return dict(infer_auto_device_map(base, limits, no_split_module_classes=whole))


def device_of(name: str, resolved: Mapping[str, Any]) -> Any:
    """The device of a module or parameter, which its longest prefix in the map determines; None if
    no key covers it."""
    covering = [key for key in resolved if not key or name == key or name.startswith(f"{key}.")]
    return resolved[max(covering, key=len)] if covering else None


def as_device(device: int | str) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def no_such_module(name: str, modules: Mapping[str, nn.Module]) -> str:
    layers = [
        int(key.rsplit(".", 1)[1]) for key in modules if re.fullmatch(r"model\.layers\.\d+", key)
    ]
    if re.fullmatch(r"model\.layers\.\d+", name):
        return (
            f"the base has no such layer; its {len(layers)} layers are model.layers.0 .. "
            f"model.layers.{max(layers)}"
        )
    near = difflib.get_close_matches(name, list(modules), n=1)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else "known: model.embed_tokens, model.layers.<i>, model.norm, lm_head"
    )
    return f"the base has no module of that name; {hint}"


def check_device(device: Any, where: str, path: str | Path, machine: Machine) -> None:
    if isinstance(device, int) and as_device(device) not in machine:
        raise ConfigError(
            f"{path}: {where}: GPU {device} does not exist, this machine has "
            f"{len(machine) - (CPU in machine)}; "
            f'use "cpu", or --set model.device_map=auto'
        )
