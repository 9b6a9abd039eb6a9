"""The methods of a MemoryLM that compress a document and that save and load the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uiollms.data.tokens import tokenize
from uiollms.model.memory import Memory, compress
from uiollms.weights import model_folder


class PretrainedMixin:
    """Mixin of MemoryLM. It replaces the methods of transformers with the same names, which would
    save and load the base's weights under a MemoryLM's names."""

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
        self: Any, save_directory: str | Path, include_base: bool = False, tokenizer: Any = None
    ) -> None:
        """Writes a folder that `from_pretrained` loads. The arguments are those of
        `uiollms.weights.model_folder.save`."""
        model_folder.save(self, save_directory, include_base, tokenizer)

    @classmethod
    def from_pretrained(cls: Any, folder: str | Path, **settings: Any) -> Any:
        """Loads a model from a folder. The settings are those of
        `uiollms.weights.model_folder.load_model`."""
        return model_folder.load_model(cls, folder, **settings)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Raises NotImplementedError, because the method of transformers calls `save_pretrained`
        with options that this class does not have."""
        raise NotImplementedError(
            "push_to_hub is not supported; save_pretrained(folder), then huggingface_hub's "
            "upload_folder"
        )
