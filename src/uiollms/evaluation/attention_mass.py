"""How much of each layer's attention goes to memory, and to memory of which age.

A document is decoded chunk by chunk behind its memories as always, but the attention itself is
computed by the base's own eager function, which returns its weights. Age 1 is the memory of the
chunk just before the one that reads.

Shapes: T tokens of a document, R rows (its chunks but the first, which reads no memory), L
layers, H heads, t tokens of a row, m num_memory, M = memories * m slots in front of a row, w of
its tokens that are fed again, A = R ages.
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
from uiollms.evaluation.evaluator import evaluation_documents
from uiollms.files.atomic import replacing
from uiollms.files.errors import ConfigError
from uiollms.model.attention import decoder_mask
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import encode_and_project_all
from uiollms.model.state import SharedPrefix

Progress = Callable[[Sequence[Any]], Iterable[Any]]
MOST_CHUNKS = 16  # of the document, where nobody asks for more


@dataclass(frozen=True)
class AttentionMass:
    """shares [L, R, 1 + A] float32: of a layer's attention, averaged over heads and a row's
    tokens, what goes to the row's own chunk and its recent tokens (place 0) and to the memory of
    each age (place = age); row r reads r + 1 memories, and what it lacks is 0. So each row sums
    to 1. about: what was measured, as text."""

    shares: Tensor
    about: dict[str, str]

    @property
    def by_age(self) -> Tensor:
        """[L, A]: averaged over the rows that have a memory of that age."""
        rows = self.shares.shape[1]
        return torch.stack(
            [self.shares[:, age - 1 :, age].mean(1) for age in range(1, rows + 1)], dim=1
        )

    @property
    def on_memory(self) -> Tensor:
        """[L, R]: what goes to all memories together, by how many the row reads."""
        return self.shares[:, :, 1:].sum(2)

    def save(self, path: Path) -> None:
        with replacing(path) as work:
            save_file({"shares": self.shares.contiguous()}, work, self.about)

    @classmethod
    def load(cls, path: Path) -> AttentionMass:
        """Raises ValueError, SafetensorError for a file that `save` has not written."""
        with safe_open(path, "pt") as file:
            shares, about = file.get_tensor("shares"), file.metadata() or {}
        layers, rows, places = shares.shape if shares.dim() == 3 else (0, 0, 0)
        if (
            not layers
            or not rows
            or places != rows + 1
            or not shares.is_floating_point()
            or not shares.isfinite().all()
        ):
            raise ValueError(
                f"shares {list(shares.shape)} are none of layers, rows and what they read"
            )
        return cls(shares.float(), about)


@torch.no_grad()
def attention_shares(model: MemoryLM, ids: Tensor, progress: Progress = iter) -> Tensor:
    """A document's ids [T] -> shares [L, R, 1 + A], see `AttentionMass`. progress: wraps the
    rows, to show how far it is. Raises ValueError for one that fits a chunk."""
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
    shares = torch.zeros(len(keys), len(rows), 1 + len(rows))
    for r, row in enumerate(progress(rows)):

        def record(layer: int, weights: Tensor, r: int = r, row: Row = row) -> None:
            """weights [1, H, w + t, M + w + t], whose first w queries are the recent tokens'"""
            count = row.num_memories
            received = weights[0, :, row.recent :].float().mean((0, 1))  # [M + w + t]
            by_chunk = received[: count * m].view(count, m).sum(1)
            shares[layer, r, 0] = received[count * m :].sum()
            shares[layer, r, 1 : count + 1] = by_chunk.flip(0)  # the newest first

        slots = row.num_memories * m
        prefix = SharedPrefix(
            [k[:, :, :slots] for k in keys], [v[:, :, :slots] for v in values], in_place=False
        )
        pattern = Recorded(decoder_mask([slots], 0, len(row.input_ids), model.device), record)
        model.decode(row.input_ids[None], prefix, [slots], pattern=pattern)
    return shares


@dataclass(frozen=True, eq=False)
class Recorded:
    """Attention as the base's family computes it eagerly, whose weights `record` gets, with
    every layer's number, as [B, H, queries, keys] (an `attention.AttentionPattern`). mask: as in
    `attention.MaskPattern`."""

    mask: Tensor | None
    record: Callable[[int, Tensor], None]

    def to(self, device: torch.device) -> Recorded:
        return self if self.mask is None else replace(self, mask=self.mask.to(device))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """[B, H, T, K], twice [B, key/value heads, S, K] -> [B, T, H, K]"""
        eager = sys.modules[type(module).__module__].eager_attention_forward
        mask, queries, keys = self.mask, query.shape[2], key.shape[2]
        if mask is None:  # plain causal, which an eager function does not know
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
    """Of the first document of the config's first text task (of `train.tasks`, else of the file
    `test`), cut to `tokens` (by default the task's truncation, but no more than 16 chunks).
    Raises ConfigError if the config has no such task."""
    task = next(
        (t for t in (*config.train.tasks, *load_tasks(config.test)) if t.task_type in TEXT_TASKS),
        None,
    )
    if task is None:
        raise ConfigError(
            f"no task of {' or '.join(TEXT_TASKS)} in train.tasks or {config.test}, whose document "
            "would be read"
        )
    memory = model.memory_config
    if tokens is not None and tokens <= memory.chunk_size:
        raise ConfigError(
            f"{tokens} tokens fit one chunk of {memory.chunk_size}, where no memory is read; take "
            "more"
        )
    longest = tokens or min(task.truncation or model.capacity, MOST_CHUNKS * memory.chunk_size)
    one = dict(num_instance=1, truncation=longest, documents="full")
    (ids,) = evaluation_documents(model, tokenizer, task.model_copy(update=one))
    about = dict(
        task=task.task_name,
        tokens=len(ids),
        chunk_size=memory.chunk_size,
        num_memory=memory.num_memory,
    )
    model.eval()
    return AttentionMass(
        attention_shares(model, ids, progress), {name: str(value) for name, value in about.items()}
    )
