"""Save and load trained weights: PEFT adapter folders in safetensors, or the authors' list of
tensors.

<folder>/memory_config.json   the compressor they were trained for
         encoder/ decoder/    PEFT adapters: adapter_config.json, adapter_model.safetensors (no
                              decoder/ without a transfer head)
         tokens.safetensors   the two token embeddings (with slot_input "last" only the repeat
                              token); its header contains the base's vocabulary size
         checksums.json       sha256 of every file, written last
<name>.pth                    the released program's format: a pickled list, encoder then decoder,
                              each its token and then, layer by layer, A and B of its two
                              projections (with slot_input "last" the encoder has no token)
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from uiollms.config.load import load_memory_config
from uiollms.config.sections import MemoryConfig
from uiollms.files.atomic import (
    CHECKSUMS,
    atomic_file,
    atomic_folder,
    make_folder,
    read_whole,
    reporting_write_errors,
    verify_checksums,
    write_checksums,
)
from uiollms.files.errors import ConfigError
from uiollms.files.reading import check_tree, file_kind
from uiollms.weights.base_files import shared_name
from uiollms.weights.fitness import TOKEN, list_names, not_finite, slot_input_fault

if TYPE_CHECKING:
    from uiollms.model.memory_lm import MemoryLM

ROLES = ("encoder", "decoder")
TOKENS = (TOKEN, "decoder.repeat_token")
ADAPTERS = [
    f"{role}/{name}"
    for role in ROLES
    for name in ("adapter_config.json", "adapter_model.safetensors")
]
WEIGHT_FILES = ["memory_config.json", "tokens.safetensors", *ADAPTERS, CHECKSUMS]


def save_weights(model: MemoryLM, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Saves the trained tensors atomically, in `dtype` if given. The old weights at `path` stay
    until the new ones are on the disk, and if saving fails. If `path` is a link, its target is
    replaced. Raises ConfigError if writing fails, or if `path` contains anything but weights."""
    named = Path(path)
    check_target(named)
    remedy = f"; {named} is as it was" if named.exists() else ""
    with reporting_write_errors(named, remedy):
        if named.suffix == ".pth":
            listed = io.BytesIO()
            torch.save(list(cpu_tensors(model, dtype).values()), listed)
            make_folder(named.parent)
            with atomic_file(named) as work:
                work.write_bytes(listed.getbuffer())
        else:
            with atomic_folder(named) as work:
                write_weights(model, work, dtype)
                write_checksums(work)


def write_weights(
    model: MemoryLM,
    work: Path,
    dtype: torch.dtype | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the files of the folder format except the checksums into an empty folder. `tensors`
    is a state dict that replaces the model's trained tensors; its other tensors are ignored."""
    tensors = cpu_tensors(model, dtype, tensors)
    compressor = model.memory_config.model_dump_json(indent=4) + "\n"
    (work / "memory_config.json").write_text(compressor, encoding="utf-8")
    # One key only, because safetensors writes several keys in a random order.
    header = {"vocab_size": str(model.base.config.vocab_size)}
    tokens = {name: tensors[name] for name in TOKENS if name in tensors}
    save_file(tokens, work / "tokens.safetensors", metadata=header)
    for role in lora_roles(model.memory_config):
        adapter = {
            peft_name(name): t.contiguous() for name, t in tensors.items() if is_lora_of(role, name)
        }
        peft_config(model, lora_projections(adapter)).save_pretrained(str(work / role))
        save_file(adapter, work / role / "adapter_model.safetensors", metadata={"format": "pt"})


def lora_roles(memory: MemoryConfig) -> tuple[str, ...]:
    """The roles that have a LoRA. Without a transfer head the decoder has none."""
    return ROLES if memory.transfer_head else ROLES[:1]


def cpu_tensors(
    model: MemoryLM, dtype: torch.dtype | None, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Returns the trained tensors, of the model or of the state dict `given`, on the CPU. Raises
    ConfigError for NaN and infinite numbers, and ValueError if `given` lacks a tensor."""
    own = model.memory_state_dict()
    if given is not None and (missing := sorted(own.keys() - given.keys())):
        raise ValueError(f"state_dict lacks {list_names(missing)}: give the state of this model")
    tensors = {
        name: t.detach().to(device="cpu", dtype=dtype or t.dtype)
        for name, t in ((name, own[name] if given is None else given[name]) for name in own)
    }
    if name := not_finite(tensors.items()):
        kind = tensors[name].dtype
        raise ConfigError(
            f"weights are not saved: {name} holds NaN or infinite numbers in {kind}; go back "
            "to weights saved before, and lower train.max_lr, or use another dtype"
        )
    return tensors


def check_target(path: Path) -> None:
    """Raises ConfigError if saving weights to `path` would replace anything but weights."""
    if not (path.exists() or path.is_symlink()):
        return
    remedy = "move it, or choose another model.save_ckp"
    if not path.exists() and not Path(os.path.realpath(path)).parent.is_dir():
        lost = f"is a link to {os.path.realpath(path)}, whose folder is not there"
        raise ConfigError(f"{path}: {lost}; {remedy}")
    if not path.exists():
        return
    if path.suffix == ".pth":
        if not holds_tensors(path):
            what = "it is no list of tensors saved by torch"
            raise ConfigError(f"{path}: weights would replace it, but {what}; {remedy}")
        return
    if path.is_symlink() and os.path.ismount(os.path.realpath(path)):
        raise ConfigError(f"{path}: is a link to a whole disk; link to a folder on it")
    others = [
        p
        for p in path.rglob("*")
        if p.is_file() and p.relative_to(path).as_posix() not in WEIGHT_FILES
    ]
    if others or not path.is_dir():
        what = (
            f"contains other files ({others[0].relative_to(path)})" if others else "is not a folder"
        )
        raise ConfigError(f"{path}: weights would replace it, but it {what}; {remedy}")


def holds_tensors(path: Path) -> bool:
    """Whether a file contains a list of tensors, as the .pth format does."""
    if file_kind(path):  # reading a pipe would block
        return False
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler can raise anything for other files
        return False
    return isinstance(found, list) and all(isinstance(t, Tensor) for t in found)


# Fields of the compressor that determine the weights, and fields that they fit at any value.
LORA_FIELDS = ("lora_rank", "lora_alpha", "transfer_head", "slot_input")
SIZE_FIELDS = ("num_memory", "chunk_size", "recent_tokens")


def load_weights(model: MemoryLM, path: str | Path, any_sizes: bool = False) -> None:
    """Loads trained tensors into `model`. Raises ConfigError for files that are missing, broken or
    differ from checksums.json (if it exists), for a compressor or vocabulary that differs from the
    model's, and for tensors of other names or shapes. any_sizes: SIZE_FIELDS may differ, as for
    weights from which training starts."""
    path = Path(path)
    try:
        if path.suffix == ".pth":
            check_tree(path)
            tensors = read_pth(model, path)
        else:
            tensors = read_whole(path, lambda folder: read_folder(model, folder, any_sizes))
        model.load_memory_state_dict(tensors)
    except OSError as error:
        raise ConfigError(f"{path}: no checkpoint can be read here ({error})") from None
    except SafetensorError as error:
        raise ConfigError(f"{path}: the checkpoint is damaged ({error})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_folder(model: MemoryLM, path: Path, any_sizes: bool) -> dict[str, Tensor]:
    check_tree(path)
    # Without a transfer head there is no decoder; otherwise reading it fails below.
    absent = () if (path / "decoder").exists() else ("decoder",)
    files = [
        name for name in WEIGHT_FILES if name != CHECKSUMS and name.split("/")[0] not in absent
    ]
    if other := [name for name in files if (path / name).exists() and not (path / name).is_file()]:
        raise ValueError(f"{other[0]} is not a file")
    if (path / CHECKSUMS).exists():
        verify_checksums(path, files)
    check_compressor(path, model.memory_config, any_sizes)
    with safe_open(path / "tokens.safetensors", "pt") as file:
        vocabulary = (file.metadata() or {}).get("vocab_size")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if vocabulary not in (None, str(model.base.config.vocab_size)):
        raise ValueError(
            f"trained with a vocabulary of {vocabulary} tokens, the model has "
            f"{model.base.config.vocab_size}"
        )
    for role in lora_roles(model.memory_config):
        adapter = load_file(path / role / "adapter_model.safetensors")
        tensors |= {plain_name(role, name): t for name, t in adapter.items()}
    return tensors


def check_compressor(path: Path, memory: MemoryConfig, any_sizes: bool = False) -> None:
    """Raises ValueError if the weights in a folder were trained for another compressor. any_sizes:
    SIZE_FIELDS may differ."""
    fields = LORA_FIELDS if any_sizes else SIZE_FIELDS + LORA_FIELDS
    differing = [
        f"{field} {value}, the config has {getattr(memory, field)}"
        for field, value in other_values(path, memory, fields).items()
    ]
    if differing:
        raise ValueError(f"trained with another compressor: {'; '.join(differing)}")


def other_values(
    path: Path, memory: MemoryConfig, fields: tuple[str, ...] = SIZE_FIELDS
) -> dict[str, Any]:
    """Returns the fields of the compressor in a folder of weights that differ from those of
    `memory`, by name."""
    saved = load_memory_config(path / "memory_config.json")
    return {
        field: getattr(saved, field)
        for field in fields
        if getattr(saved, field) != getattr(memory, field)
    }


def read_pth(model: MemoryLM, path: Path) -> dict[str, Tensor]:
    """Reads the authors' list with torch's weights-only loader, which runs nothing in the file."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")  # reading a pipe would block, a device may have no end
    try:
        if zipfile.is_zipfile(path):  # torch does not check the checksums in its files
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise zipfile.BadZipFile(f"damaged: the checksum of {bad} differs")
        listed = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler can raise anything for malicious files
        raise ValueError(
            f"not a list of tensors saved by torch ({' '.join(str(error).split())[:120]})"
        ) from None
    names = list(model.trainable_parameters())
    if isinstance(listed, list) and all(isinstance(t, Tensor) for t in listed):
        more, learned = len(listed) - len(names), TOKEN in names
        if (more, learned) in ((1, False), (-1, True)) and (listed[0].dim() == 3) == (not learned):
            raise ValueError(slot_input_fault(not learned))
    if (
        not isinstance(listed, list)
        or len(listed) != len(names)
        or not all(isinstance(t, Tensor) for t in listed)
    ):
        found = f"{len(listed)} entries" if isinstance(listed, list) else type(listed).__name__
        raise ValueError(
            f"expected a list of {len(names)} tensors ({names[0]}, {names[1]}, ...), found {found}"
        )
    return dict(zip(names, listed, strict=True))


def lora_projections(adapter: Iterable[str]) -> list[str]:
    """Returns the projections of a layer that have LoRA, from the names of the tensors."""
    return list(dict.fromkeys(name.split(".")[6] for name in adapter))


def peft_config(model: MemoryLM, lora_projections: list[str]) -> LoraConfig:
    config = model.memory_config
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=shared_name(model.base.config),
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=lora_projections,
        inference_mode=True,
    )


def is_lora_of(role: str, name: str) -> bool:
    return name.startswith(f"{role}.layers.")


def peft_name(name: str) -> str:
    """encoder.layers.3.q_proj.lora_A ->
    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"""
    _, _, layer, projection, half = name.split(".")
    return f"base_model.model.model.layers.{layer}.self_attn.{projection}.{half}.weight"


def plain_name(role: str, name: str) -> str:
    """The inverse of `peft_name`. Raises ValueError for a name that PEFT does not write."""
    parts = name.split(".")
    if len(parts) != 9 or parts[:4] != ["base_model", "model", "model", "layers"]:
        raise ValueError(f"{role}: {name!r} is not the name of a LoRA tensor")
    return f"{role}.layers.{parts[4]}.{parts[6]}.{parts[7]}"
