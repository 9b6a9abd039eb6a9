"""The transformers config of a MemoryLM, config.json in its folder, and the registration with which
transformers' Auto classes load such a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from uiollms.config.load import parse
from uiollms.config.sections import MemoryConfig
from uiollms.weights.base_files import shared_name
from uiollms.weights.model_folder import load_tokenizer

# Attributes of the base's config that other programs read from a model's config.
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


class MemoryLMConfig(PreTrainedConfig):
    """Config of a MemoryLM.

    text_config: the base's config, or its fields with its model_type. `get_text_config()` returns
    it, as for the composite models of transformers. memory: the fields of the compressor config.
    The base's sizes are attributes as well. Raises ConfigError for other fields of `memory`.
    """

    model_type = "uiollms"
    sub_configs = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(self, text_config: Any, memory: dict[str, Any], **fields: Any) -> None:
        super().__init__(**fields)
        is_dict = isinstance(text_config, dict)
        self.text_config = AutoConfig.for_model(**text_config) if is_dict else text_config
        self.memory = parse(MemoryConfig, memory, "config.json: memory").model_dump(
            exclude={"schema_"}
        )

    @property
    def memory_config(self) -> MemoryConfig:
        return MemoryConfig(**self.memory)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the base's name without the path of its folder."""
        fields: dict[str, Any] = super().to_dict()
        fields["text_config"]["_name_or_path"] = shared_name(self.text_config)
        return fields

    def __getattr__(self, name: str) -> Any:
        if name in SIZES and "text_config" in self.__dict__:
            return getattr(self.text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class BaseTokenizer(PreTrainedTokenizerFast):
    """What AutoTokenizer calls for a MemoryLM's folder that contains no tokenizer."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *unused: Any, **settings: Any
    ) -> PreTrainedTokenizerBase:
        """Returns the base's tokenizer, which is of another class."""
        return load_tokenizer(folder)


def register_auto_classes(model_class: type) -> None:
    """Enters config, model and tokenizer in the tables of transformers, as its documentation of
    custom models describes. Nothing else of transformers changes. A second call has no effect."""
    AutoConfig.register(MemoryLMConfig.model_type, MemoryLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(MemoryLMConfig, model_class, exist_ok=True)
    AutoTokenizer.register(MemoryLMConfig, fast_tokenizer_class=BaseTokenizer, exist_ok=True)
