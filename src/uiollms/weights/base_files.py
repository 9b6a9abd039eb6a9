"""Check the folder of a base model before anything is loaded: it contains only regular files, and
the sizes in config.json are possible and agree with the sizes of the weight files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uiollms.files.errors import ConfigError, describe_fault
from uiollms.files.json_files import find_unusable, read_json
from uiollms.files.reading import check_file

MOST_LAYERS = 2**12
MOST_WORDS = 2**30  # bytes of a config or a tokenizer file
# A model of so few parameters is built in no time, and its loader reports faults tensor by tensor.
FEW = 2**24
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


Token = Annotated[int, Field(ge=-1, lt=2**31)]
Tokens = Token | list[Token] | None
Scaling = dict[str, Any] | None
Model = TypeVar("Model", bound=BaseModel)


class BaseConfig(BaseModel):
    """The fields of config.json that llama, mistral and qwen models read. The limits are about ten
    times the largest existing sizes. Missing fields have the library's defaults."""

    model_config = ConfigDict(
        extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    vocab_size: Annotated[int, Field(gt=0, le=2**24)] = 1
    hidden_size: Annotated[int, Field(gt=0, le=2**17)] = 1
    intermediate_size: Annotated[int, Field(gt=0, le=2**20)] = 1
    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)] = 1
    num_attention_heads: Annotated[int, Field(gt=0, le=2**12)] = 1
    num_key_value_heads: Annotated[int, Field(gt=0, le=2**12)] | None = None
    head_dim: Annotated[int, Field(gt=0, le=2**13)] | None = None
    max_position_embeddings: Annotated[int, Field(gt=0, le=2**31)] = 1
    sliding_window: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=2**31)] | None = None
    layer_types: Annotated[list[str], Field(max_length=MOST_LAYERS)] | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1.0
    initializer_range: Annotated[float, Field(ge=0, le=1e6)] | None = None
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    rope_theta: Annotated[float, Field(gt=0, le=1e15)] | None = None
    rope_scaling: Scaling = None
    rope_parameters: Scaling = None
    eos_token_id: Tokens = None
    bos_token_id: Tokens = None
    pad_token_id: Tokens = None
    hidden_act: str | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None


class GenerationFile(BaseModel):
    """The fields of generation_config.json that generation reads."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    eos_token_id: Tokens = None
    bos_token_id: Tokens = None
    pad_token_id: Tokens = None


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # supported bases; SmolLM2 is a llama


def shared_name(config: Any) -> str:
    """Returns the hub id of the base with this transformers config, also for its snapshot in the
    hub's cache, or the last part of its path: a file that is shared must not contain a path of this
    machine."""
    name = config._name_or_path
    if not Path(name).is_dir():
        return name
    parts = Path(name).resolve().parts
    if parts[-2:-1] == ("snapshots",) and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    return Path(name).name


def check_folder_files(folder: Path) -> None:
    """Raises ConfigError if a model's folder contains something other than files and folders, or a
    config or tokenizer file that is far too large."""
    for path in sorted(folder.iterdir()):
        if not path.exists() or path.is_dir():  # skip links without a target
            continue
        check_file(path)
        if (
            path.suffix in (".json", ".txt", ".model", ".jinja")
            and path.stat().st_size > MOST_WORDS
        ):
            raise ConfigError(
                f"{path}: is larger than {MOST_WORDS >> 20:,} MiB; copy or download it again"
            )


def check_base_config(path: Path) -> None:
    """Raises ConfigError, with one line for each fault, for impossible fields of a config.json, and
    for sizes for which the weight files in the folder are too small."""
    value = read_object(path)
    if value.get("model_type") not in FAMILIES:  # the model builder refuses it
        layers = value.get("num_hidden_layers")
        value = {"num_hidden_layers": layers} if isinstance(layers, int) else {}
    config = parse_config(BaseConfig, value, path)
    weight_bytes = sum(
        file.stat().st_size
        for file in path.parent.iterdir()
        if file.suffix in WEIGHTS and file.exists()
    )
    parameters = least_parameters(config)
    if weight_bytes and parameters > max(FEW, 2 * weight_bytes):
        names = (
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "vocab_size",
        )
        sizes = ", ".join(f"{name} {getattr(config, name)}" for name in names)
        raise ConfigError(
            f"{path}: a model of these sizes ({sizes}) has {parameters:,} parameters, but the "
            f"weight files in the folder have {weight_bytes:,} bytes; copy the config.json that "
            "belongs to them"
        )


def check_generation(path: Path) -> None:
    """Raises ConfigError for a generation_config.json with impossible token ids."""
    parse_config(GenerationFile, read_object(path), path)


def read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if fault := find_unusable(value):
        raise ConfigError(f"{path}: {fault}")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def parse_config(model: type[Model], value: dict[str, Any], path: Path) -> Model:
    """Parses a JSON object. Raises ConfigError with one line for each fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = dict.fromkeys(describe_fault(fault, model, path) for fault in error.errors())
        raise ConfigError("\n".join(lines)) from None


def least_parameters(config: BaseConfig) -> int:
    """The number of parameters of a model of this config without norms, biases and lm_head."""
    heads = config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // heads
    attention = 2 * (heads + (config.num_key_value_heads or heads)) * head_dim
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * layer
