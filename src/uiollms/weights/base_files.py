"""The folder of a base model before anything is built of it: files only, and a config.json whose
sizes some model has, and its weight files have room for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uiollms.files.errors import ConfigError, describe_fault
from uiollms.files.json_files import find_unusable, read_json
from uiollms.files.reading import check_file

MOST_LAYERS = 2**12
MOST_WORDS = 2**30  # bytes of a tokenizer's file, or a config
FEW = (
    2**24
)  # parameters that take no time to build: what is wrong is said by the loader, tensor by tensor
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


Token = Annotated[int, Field(ge=-1, lt=2**31)]
Tokens = Token | list[Token] | None
Scaling = dict[str, Any] | None
Model = TypeVar("Model", bound=BaseModel)


class BaseConfig(BaseModel):
    """What is read of a llama's, mistral's or qwen's config.json, within ten times the largest
    there are. Fields that are not there have the library's defaults."""

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
    """What is read of a generation_config.json where a text is answered."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    eos_token_id: Tokens = None
    bos_token_id: Tokens = None
    pad_token_id: Tokens = None


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # that can carry memory; SmolLM2 is a llama


def check_folder_files(folder: Path) -> None:
    """Raises ConfigError for anything in a model's folder that is neither file nor folder, and
    for a file of words (not of weights) that is absurdly large."""
    for path in sorted(folder.iterdir()):
        if not path.exists() or path.is_dir():  # a link to nothing
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
    """Raises ConfigError, a line for each, for fields of a config.json that no model can have,
    and for sizes together that the weight files beside it are too small for."""
    value = read_object(path)
    if value.get("model_type") not in FAMILIES:  # refused by whoever knows what it is for
        layers = value.get("num_hidden_layers")
        value = {"num_hidden_layers": layers} if isinstance(layers, int) else {}
    config = checked(BaseConfig, value, path)
    held = sum(
        file.stat().st_size
        for file in path.parent.iterdir()
        if file.suffix in WEIGHTS and file.exists()
    )
    parameters = least_parameters(config)
    if held and parameters > max(FEW, 2 * held):
        names = (
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "vocab_size",
        )
        sizes = ", ".join(f"{name} {getattr(config, name)}" for name in names)
        raise ConfigError(
            f"{path}: a model of these sizes ({sizes}) has {parameters:,} parameters, the weight "
            "files "
            f"beside it have {held:,} bytes; copy the config.json that belongs to them"
        )


def check_generation(path: Path) -> None:
    """Raises ConfigError for a generation_config.json whose tokens are none."""
    checked(GenerationFile, read_object(path), path)


def read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if fault := find_unusable(value):
        raise ConfigError(f"{path}: {fault}")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def checked(model: type[Model], value: dict[str, Any], path: Path) -> Model:
    """Raises ConfigError with a line for every fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = dict.fromkeys(describe_fault(fault, model, path) for fault in error.errors())
        raise ConfigError("\n".join(lines)) from None


def least_parameters(config: BaseConfig) -> int:
    """Parameters of a model of this config, but for norms, biases and a head of its own."""
    heads = config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // heads
    attention = 2 * (heads + (config.num_key_value_heads or heads)) * head_dim
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * layer
