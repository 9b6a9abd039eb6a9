"""The methods of a MemoryLM that compress a document and that save and load the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from uiollms.data.tokens import tokenize
from uiollms.model.configuration import MemoryLMConfig
from uiollms.model.memory import Memory, compress
from uiollms.weights import model_folder
from uiollms.weights.hub import upload_folder

# What transformers' Auto classes and pipelines add to the arguments of `from_pretrained`.
ADDED_SETTINGS = (
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "trust_remote_code",
)


class PretrainedMixin:
    """Mixin of MemoryLM. It replaces the methods of transformers with the same names, which would
    save and load the base's weights under a MemoryLM's names."""

    checkpointing: bool

    def compress(
        self,
        document: str | Tensor | Sequence[int],
        tokenizer: Any = None,
        source: str = "text",
        progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    ) -> Memory:
        """Compresses a document, a text with its tokenizer or token ids [T], to a `Memory`, which
        can be saved, joined with others and read by `generate`.

        source: the name of the document in the memory. progress: wraps the batches of chunks, as
        `tqdm` does. Raises ValueError if the document exceeds the capacity, and for a text without
        a tokenizer.
        """
        if isinstance(document, str):
            if tokenizer is None:
                raise ValueError("compress: a text needs its tokenizer: compress(text, tokenizer)")
            # As in training, with a BOS token if the tokenizer adds one.
            document = tokenize(tokenizer, document)
        return compress(self, torch.as_tensor(document, dtype=torch.int64), source, progress)

    def save_pretrained(
        self: Any,
        save_directory: str | Path,
        include_base: bool = False,
        tokenizer: Any = None,
        results: str | Path | None = None,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes a folder that `from_pretrained` loads. The first arguments are those of
        `uiollms.weights.model_folder.save`; the others are what transformers' Trainer passes.

        is_main_process: without it nothing is written. max_shard_size: not used, the trained
        tensors are small. Raises ValueError without safe_serialization."""
        if not safe_serialization:
            raise ValueError("save_pretrained: weights are saved as safetensors only")
        if is_main_process:
            model_folder.save(self, save_directory, include_base, tokenizer, results, state_dict)

    @property
    def _keys_to_ignore_on_save(self: Any) -> list[str]:
        """The names of the base's tensors, which are not in model.safetensors. Trainer reads it
        when it resumes."""
        return [name for name in self.state_dict() if name.startswith("base.")]

    @classmethod
    def from_pretrained(cls: Any, folder: str | Path, **settings: Any) -> Any:
        """Loads a model from a folder. The settings are those of
        `uiollms.weights.model_folder.load_model`."""
        for name in ADDED_SETTINGS:
            settings.pop(name, None)
        return model_folder.load_model(cls, folder, **settings)

    @classmethod
    def _from_config(cls: Any, config: MemoryLMConfig, **settings: Any) -> Any:
        """Makes a model with random weights, for AutoModelForCausalLM.from_config."""
        base = AutoModelForCausalLM.from_config(config.text_config, **settings)
        return cls(base, config.memory_config)

    def push_to_hub(
        self,
        repo_id: str,
        include_base: bool = False,
        tokenizer: Any = None,
        results: str | Path | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        **commit: Any,
    ) -> str:
        """Uploads what `save_pretrained` writes to the hub and returns the commit's address.
        `commit`: revision, create_pr, commit_message and commit_description. The method of
        transformers would replace the model card by an empty one."""
        with TemporaryDirectory() as folder:
            work = Path(folder) / "model"
            self.save_pretrained(work, include_base, tokenizer, results)
            return upload_folder(work, repo_id, private, token, **commit)

    # ---- gradient checkpointing as transformers spells it ----------------------------------------

    supports_gradient_checkpointing = True

    def _set_gradient_checkpointing(
        self, enable: bool = True, every_n_layers: int = 1, **unused: Any
    ) -> None:
        """Sets `checkpointing`. gradient_checkpointing_enable and _disable, and
        activation_checkpointing_enable and _disable of later versions, call this."""
        if every_n_layers != 1:
            raise ValueError("gradient checkpointing is for every layer: leave out every_n_layers")
        self.checkpointing = enable

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.checkpointing

    is_gradient_checkpointing = is_activation_checkpointing
