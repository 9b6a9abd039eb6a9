"""Trained weights on disk: PEFT adapter folders in safetensors, or the authors' list of tensors.

<folder>/memory_config.json                 the compressor they were trained for
         encoder/ decoder/                  PEFT adapters: adapter_config.json, adapter_model.safetensors
         tokens.safetensors                 the two token embeddings
<name>.pth                                  the released program's format: a pickled list, encoder then decoder, each
                                            its token and then, layer by layer, A and B of its two projections
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from uiollms.base import PROJECTIONS
from uiollms.config import ConfigError, load_memory_config
from uiollms.model import MemoryLM

ROLES = ("encoder", "decoder")
TOKENS = ("encoder.retrieval_token", "decoder.repeat_token")


def save_weights(model: MemoryLM, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the trained tensors, in `dtype` if given (smaller), under a temporary name first. A save that fails
    leaves what was at `path`; a process killed between the two renames at the end leaves it beside, as `.<name>-old`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to(device="cpu", dtype=dtype or t.dtype) for name, t in model.memory_state_dict().items()}
    if path.suffix == ".pth":
        work_file = path.with_name(path.name + ".tmp")
        torch.save(list(tensors.values()), work_file)
        os.replace(work_file, path)
        return
    work = path.with_name(f".{path.name}-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)  # of a process of that number that was killed
    work.mkdir()
    (work / "memory_config.json").write_text(model.memory_config.model_dump_json(indent=4) + "\n")
    save_file({name: tensors[name] for name in TOKENS}, work / "tokens.safetensors")
    for role in ROLES:
        peft_config(role, model).save_pretrained(str(work / role))
        adapter = {peft_name(name): t.contiguous() for name, t in tensors.items() if is_lora_of(role, name)}
        save_file(adapter, work / role / "adapter_model.safetensors", metadata={"format": "pt"})
    replace_folder(work, path)


def replace_folder(work: Path, path: Path) -> None:
    """Give `work` the name `path`; what was there goes only once the new folder stands."""
    if not path.exists():
        work.rename(path)
        return
    old = path.with_name(f".{path.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    work.rename(path)
    shutil.rmtree(old)


def load_weights(model: MemoryLM, path: str | Path) -> None:
    """Read trained tensors into `model`. Raises ConfigError for files that are missing or broken, a compressor other than
    the model's, and tensors that do not fit."""
    path = Path(path)
    try:
        tensors = read_pth(model, path) if path.suffix == ".pth" else read_folder(model, path)
        model.load_memory_state_dict(tensors)
    except OSError as error:
        raise ConfigError(f"{path}: no checkpoint can be read here ({error})") from None
    except SafetensorError as error:
        raise ConfigError(f"{path}: the checkpoint is damaged ({error})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_folder(model: MemoryLM, path: Path) -> dict[str, Tensor]:
    saved = load_memory_config(path / "memory_config.json")
    differing = [
        f"{field} {getattr(saved, field)}, the config says {getattr(model.memory_config, field)}"
        for field in ("num_memory", "chunk_size", "lora_rank", "lora_alpha")
        if getattr(saved, field) != getattr(model.memory_config, field)
    ]
    if differing:
        raise ValueError(f"trained with another compressor: {'; '.join(differing)}")
    tensors = load_file(path / "tokens.safetensors")
    for role in ROLES:
        adapter = load_file(path / role / "adapter_model.safetensors")
        tensors |= {plain_name(role, name): t for name, t in adapter.items()}
    return tensors


def read_pth(model: MemoryLM, path: Path) -> dict[str, Tensor]:
    """The authors' list, with torch's weights-only loader: nothing in the file is executed."""
    try:
        listed = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"not a list of tensors saved by torch ({' '.join(str(error).split())[:120]})") from None
    names = list(model.trainable_parameters())
    if not isinstance(listed, list) or len(listed) != len(names) or not all(isinstance(t, Tensor) for t in listed):
        found = f"{len(listed)} entries" if isinstance(listed, list) else type(listed).__name__
        raise ValueError(f"expected a list of {len(names)} tensors ({names[0]}, {names[1]}, ...), found {found}")
    return dict(zip(names, listed, strict=True))


def peft_config(role: str, model: MemoryLM) -> LoraConfig:
    config = model.memory_config
    base = model.config._name_or_path
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=Path(base).name if Path(base).is_dir() else base,  # no path of this machine in a shared file
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=list(PROJECTIONS[role]),
        inference_mode=True,
    )


def is_lora_of(role: str, name: str) -> bool:
    return name.startswith(f"{role}.layers.")


def peft_name(name: str) -> str:
    """encoder.layers.3.q_proj.lora_A -> base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"""
    _, _, layer, projection, half = name.split(".")
    return f"base_model.model.model.layers.{layer}.self_attn.{projection}.{half}.weight"


def plain_name(role: str, name: str) -> str:
    """The inverse of `peft_name`. Raises ValueError for a name that PEFT would not have written."""
    parts = name.split(".")
    if len(parts) != 9 or parts[:4] != ["base_model", "model", "model", "layers"]:
        raise ValueError(f"{role}: {name!r} is not the name of a LoRA tensor")
    return f"{role}.layers.{parts[4]}.{parts[6]}.{parts[7]}"
