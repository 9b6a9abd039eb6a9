"""Measures how much of each layer's attention goes to memory, and to memories of which age.

A document is decoded chunk by chunk, as always, but the base's eager attention function computes
the attention, because it returns the attention weights. Age 1 is the memory of the chunk directly
before the chunk that reads it.

Shapes: T tokens of a document, R rows (the chunks of the document but the first, which reads no
memory), L layers, H heads, t tokens of a row, w recent tokens that the row reads again, m
num_memory, M memory slots that the row reads, A = R ages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import TEXT_TASKS
from uiollms.config.load import load_tasks
from uiollms.config.sections import EnvConfig
from uiollms.data.sample import Row, Sample
from uiollms.evaluation.instances import evaluation_documents
from uiollms.files.atomic import atomic_file
from uiollms.files.errors import ConfigError
from uiollms.model.attention import decoder_mask
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import encode_and_project_all
from uiollms.model.state import SharedPrefix

Progress = Callable[[Sequence[Any]], Iterable[Any]]
MAX_CHUNKS = 16  # of the document, unless the caller gives a number of tokens


@dataclass(frozen=True)
class AttentionMass:
    """Fractions of attention.

    fractions: [L, R, 1 + A] float32, averaged over the heads and the tokens of a row. Index 0 is
               the fraction that goes to the row's chunk and its recent tokens, index a the one
               that goes to the memory of age a. Row r reads r + 1 memories; fractions of memories
               that it lacks are 0. The fractions of a row sum to 1.
    about:     name -> value of what was measured, as text
    """

    fractions: Tensor
    about: dict[str, str]

    @property
    def by_age(self) -> Tensor:
        """[L, A]: averaged over the rows that have a memory of that age."""
        rows = self.fractions.shape[1]
        return torch.stack(
            [self.fractions[:, age - 1 :, age].mean(1) for age in range(1, rows + 1)], dim=1
        )

    @property
    def on_memory(self) -> Tensor:
        """[L, R]: the fraction that goes to all memories together. Row r reads r + 1 memories."""
        return self.fractions[:, :, 1:].sum(2)

    def save(self, path: Path) -> None:
        with atomic_file(path) as work:
            save_file({"shares": self.fractions.contiguous()}, work, self.about)

    @classmethod
    def load(cls, path: Path) -> AttentionMass:
        """Reads the file that `save` wrote. Raises ValueError or SafetensorError for others."""
        with safe_open(path, "pt") as file:
            fractions, about = file.get_tensor("shares"), file.metadata() or {}
        layers, rows, columns = fractions.shape if fractions.dim() == 3 else (0, 0, 0)
        if (
            not layers
            or not rows
            or columns != rows + 1
            or not fractions.is_floating_point()
            or not fractions.isfinite().all()
        ):
            raise ValueError(
                f"shares {list(fractions.shape)} are not attention by layer, row and age"
            )
        return cls(fractions.float(), about)


@torch.no_grad()
def attention_fractions(model: MemoryLM, ids: Tensor, progress: Progress = iter) -> Tensor:
    """Token ids [T] of a document -> fractions [L, R, 1 + A], see `AttentionMass`. Raises
    ValueError if the document fits one chunk.

    progress: wraps the rows in a progress bar
    """
    m = model.memory_config.num_memory
    sample = Sample.document(ids, model.memory_config.chunk_size)
    rows = sample.with_recent(model.memory_config.recent_tokens).rows
    rows = tuple(row for row in rows if row.num_memories)
    if not rows:
        raise ValueError(
            f"{len(ids)} tokens fit one chunk of {model.memory_config.chunk_size}: no memory is "
            "read"
        )
    keys, values = encode_and_project_all(model, sample.chunks)
    fractions = torch.zeros(len(keys), len(rows), 1 + len(rows))
    for r, row in enumerate(progress(rows)):

        def record(layer: int, weights: Tensor, r: int = r, row: Row = row) -> None:
            """weights: [1, H, w + t, M + w + t]; the first w queries are the recent tokens."""
            count = row.num_memories
            received = weights[0, :, row.recent :].float().mean((0, 1))  # [M + w + t]
            by_chunk = received[: count * m].view(count, m).sum(1)
            fractions[layer, r, 0] = received[count * m :].sum()
            fractions[layer, r, 1 : count + 1] = by_chunk.flip(0)  # the newest memory first

        slots = row.num_memories * m
        prefix = SharedPrefix(
            [k[:, :, :slots] for k in keys], [v[:, :, :slots] for v in values], in_place=False
        )
        pattern = RecordingPattern(
            decoder_mask([slots], 0, len(row.input_ids), model.device), record
        )
        model.decode(row.input_ids[None], prefix, [slots], pattern=pattern)
    return fractions


@dataclass(frozen=True, eq=False)
class RecordingPattern:
    """An `attention.AttentionPattern` that computes attention with the eager function of the
    base's family and passes its weights on.

    mask:   as in `attention.MaskPattern`
    record: is called with the index of the layer and its weights [B, H, queries, keys]
    """

    mask: Tensor | None
    record: Callable[[int, Tensor], None]

    def to(self, device: torch.device) -> RecordingPattern:
        return self if self.mask is None else replace(self, mask=self.mask.to(device))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """query [B, H, T, K], key and value [B, key/value heads, S, K] -> [B, T, H, K]"""
        eager = sys.modules[type(module).__module__].eager_attention_forward
        mask, queries, keys = self.mask, query.shape[2], key.shape[2]
        if mask is None:  # causal; an eager function needs the mask itself
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(
                keys - queries
            )
        added = torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
        output, weights = eager(module, query, key, value, added, scaling=scaling)
        self.record(module.layer_idx, weights)
        return output


def measure_attention(
    model: MemoryLM,
    tokenizer: PreTrainedTokenizerBase,
    config: EnvConfig,
    tokens: int | None = None,
    progress: Progress = iter,
) -> AttentionMass:
    """Measures the attention in the first document of the config's first text task, which is one
    of `train.tasks` or else of the file `test`.

    tokens: the length to which the document is cut; by default the task's truncation, but at most
            16 chunks

    Raises ConfigError if the config has no text task, and if `tokens` fit one chunk.
    """
    task = next(
        (t for t in (*config.train.tasks, *load_tasks(config.test)) if t.task_type in TEXT_TASKS),
        None,
    )
    if task is None:
        raise ConfigError(
            f"neither train.tasks nor {config.test} has a task of {' or '.join(TEXT_TASKS)}, whose "
            "document attention is measured on"
        )
    memory = model.memory_config
    if tokens is not None and tokens <= memory.chunk_size:
        raise ConfigError(
            f"{tokens} tokens fit one chunk of {memory.chunk_size}, which reads no memory; give "
            "more tokens"
        )
    longest = tokens or min(task.truncation or model.capacity, MAX_CHUNKS * memory.chunk_size)
    first = dict(num_instance=1, truncation=longest, documents="full")
    (ids,) = evaluation_documents(model, tokenizer, task.model_copy(update=first))
    about = dict(
        task=task.task_name,
        tokens=len(ids),
        chunk_size=memory.chunk_size,
        num_memory=memory.num_memory,
    )
    model.eval()
    return AttentionMass(
        attention_fractions(model, ids, progress),
        {name: str(value) for name, value in about.items()},
    )
