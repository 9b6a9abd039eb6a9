"""The manual pipeline: which module of the base lives on which device.

Encoder, decoder and teacher share one base, so a map in the authors' style, which names a layer once for each of them,
must name the same device each time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uiollms.config import ConfigError

# encoder.encoder.base_model.model.model.layers.3 -> model.layers.3; decoder.decoder.base_model.model.lm_head -> lm_head
_AUTHORS = re.compile(r"^(encoder\.encoder|decoder\.decoder)\.base_model\.model\.")
# Tokens follow the embedding they stand in for; the teacher is the shared base itself.
_FOLLOWERS = {"encoder.retrieval_token", "decoder.repeat_token", "teacher"}


def normalised(device_map: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Base module -> device, prefixes of the authors' style stripped. Raises ConfigError where two roles disagree."""
    result: dict[str, Any] = {}
    named_by: dict[str, str] = {}
    for key, device in device_map.items():
        if key in _FOLLOWERS:
            continue
        name = _AUTHORS.sub("", key)
        if result.setdefault(name, device) != device:
            raise ConfigError(
                f"{path}: model.device_map[{key!r}]: device {device}, but {named_by[name]!r} puts the same module on "
                f"{result[name]}: encoder and decoder share one base here; name one device for both"
            )
        named_by.setdefault(name, key)
    return result


def place(base: nn.Module, device_map: Any, path: str | Path) -> None:
    """Move the modules of `base` to their devices, in place. Raises ConfigError for a device or module that does not
    exist, and for a module that no key covers."""
    if not isinstance(device_map, dict):
        base.to(one_device(device_map, path))
        return
    wanted = normalised(device_map, path)
    modules = dict(base.named_modules())
    for name, device in wanted.items():
        if name not in modules:
            raise ConfigError(f"{path}: model.device_map[{name!r}]: the base has no module of that name")
        check_device(device, f"model.device_map[{name!r}]", path)
    for name, _ in base.named_parameters():
        if not any(name.startswith(f"{key}.") for key in wanted):
            raise ConfigError(f"{path}: model.device_map: no key places {name.rsplit('.', 1)[0]!r}")
    for name in sorted(wanted, key=len):  # a longer name is more specific: it moves last
        modules[name].to(torch.device(wanted[name]))


def one_device(word: Any, path: str | Path) -> torch.device:
    """The device of a map that is one word or number."""
    if isinstance(word, int):
        check_device(word, "model.device_map", path)
        return torch.device(word)
    return torch.device("cpu" if word == "cpu" or not torch.cuda.is_available() else "cuda")


def check_device(device: Any, where: str, path: str | Path) -> None:
    if isinstance(device, int) and device >= torch.cuda.device_count():
        raise ConfigError(
            f"{path}: {where}: GPU {device} does not exist, this machine has {torch.cuda.device_count()}; "
            f'use "cpu", or --set model.device_map=auto'
        )
    if device == "disk":
        raise ConfigError(f'{path}: {where}: "disk" is not supported yet; use a GPU number or "cpu"')
