"""What a user asks of a whole model: compress a document, save it, load it."""

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
    """Methods of MemoryLM. Those that transformers has too are overridden whole: its own would
    save and load the base's weights under a MemoryLM's names."""

    def compress(
        self,
        document: str | Tensor | Sequence[int],
        tokenizer: Any = None,
        source: str = "text",
        progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    ) -> Memory:
        """A text, with the tokenizer to cut it, or its token ids [T] -> a `Memory`, to save,
        join and ask; `source` is the name it keeps; `progress` wraps the batches of chunks, as
        `tqdm` does. Raises ValueError past the capacity."""
        if isinstance(document, str):
            if tokenizer is None:
                raise ValueError("compress: a text needs its tokenizer: compress(text, tokenizer)")
            document = tokenize(tokenizer, document)  # with BOS, if it writes one, as in training
        return compress(self, torch.as_tensor(document, dtype=torch.int64), source, progress)

    def save_pretrained(
        self: Any, save_directory: str | Path, include_base: bool = False, tokenizer: Any = None
    ) -> None:
        """Write a folder for `from_pretrained`; the arguments are those of
        `uiollms.weights.model_folder.save`."""
        model_folder.save(self, save_directory, include_base, tokenizer)

    @classmethod
    def from_pretrained(cls: Any, folder: str | Path, **settings: Any) -> Any:
        """A model from a folder; the settings are those of
        `uiollms.weights.model_folder.load_model`."""
        return model_folder.load_model(cls, folder, **settings)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Refused: transformers' own calls `save_pretrained` with options that this one lacks."""
        raise NotImplementedError(
            "push_to_hub is not supported; save_pretrained(folder), then huggingface_hub's "
            "upload_folder"
        )
