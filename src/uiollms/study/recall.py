"""A recall task with adjustable distance: a chunk contains facts, and the chunk `distance` chunks
later contains questions about them.

    a chunk of 8 tokens    pair pair pair pair | query answer | query answer
    pair (k, v)            one token per combination; a document contains every key once
    query k                a key of `distance` chunks before; the answer v is scored

The base is a small Llama that is trained here to answer from the raw text, at every distance. Then
it is frozen and memory is trained. A gradient that is truncated after S chunks does not reach the
encoder of a chunk whose facts are queried later than that.

Shapes: B documents, N chunks, P pairs and Q queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from uiollms.config.sections import MemoryConfig
from uiollms.data.sample import IGNORED, Sample
from uiollms.files.atomic import atomic_folder
from uiollms.training.optimizer import optimizer_step
from uiollms.weights.base_models import load_causal_lm

KEYS, VALUES, PAIRS, QUERIES = 64, 8, 4, 2
CHUNK = PAIRS + 2 * QUERIES
# The first token ids of queries and of answers. The ids of pairs come before them.
QUERY, ANSWER = KEYS * VALUES, KEYS * VALUES + KEYS
VOCABULARY = ANSWER + VALUES
MAX_CHUNKS = KEYS // PAIRS
MEMORY = MemoryConfig.model_validate(
    dict(num_memory=4, chunk_size=CHUNK, lora_rank=16, lora_alpha=32)
)


def draw_documents(
    generator: torch.Generator, distances: Tensor, num_chunks: int = MAX_CHUNKS
) -> tuple[Tensor, Tensor]:
    """One document per distance [B] -> token ids [B, N * 8] int64, and which tokens are answers,
    [B, N * 8] bool. A chunk with fewer than `distance` chunks before it queries its own pairs."""
    batch, rows = len(distances), torch.arange(len(distances))[:, None, None]
    keys = (
        torch.rand(batch, KEYS, generator=generator)
        .argsort(1)[:, : PAIRS * num_chunks]
        .view(batch, num_chunks, PAIRS)
    )
    values = torch.randint(VALUES, keys.shape, generator=generator)
    chunk = torch.arange(num_chunks)[None]
    source = torch.where(chunk >= distances[:, None], chunk - distances[:, None], chunk)[
        :, :, None
    ]  # [B, N, 1]
    queried = torch.randint(PAIRS, (batch, num_chunks, QUERIES), generator=generator)
    queries, answers = (
        QUERY + keys[rows, source, queried],
        ANSWER + values[rows, source, queried],
    )  # [B, N, Q]
    ids = torch.cat(
        [keys * VALUES + values, torch.stack([queries, answers], dim=-1).flatten(2)], dim=2
    )
    return ids.flatten(1), (ids >= ANSWER).flatten(1)


def recall_sample(ids: Tensor, answers: Tensor, distance: int) -> Sample:
    """A document [T] in which the answers about earlier chunks are scored. Those of the first
    `distance` chunks, about themselves, are not."""
    labels = torch.where(answers, ids, IGNORED)
    labels[: distance * CHUNK] = IGNORED
    return Sample.beacon(ids, labels, CHUNK)


def recall_samples(distance: int, seed: int) -> Iterator[Sample]:
    """Yields documents of one distance (at least 1) without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        (ids,), (answers,) = draw_documents(generator, torch.tensor([distance]))
        yield recall_sample(ids, answers, distance)


def train_base(
    folder: Path, seed: int = 0, goal: float = 0.98, bar: Callable[..., Iterable[Any]] = tqdm
) -> Any:
    """Trains the small Llama (4 layers of width 128) until it answers from raw text with accuracy
    `goal`, and saves it in `folder`. If the folder exists, loads it instead. Documents grow from
    2 to 16 chunks during training. Raises RuntimeError if the goal is not reached."""
    if folder.exists():
        return load_causal_lm(str(folder))
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.05,
            eos_token_id=QUERY,
        )
    )
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    for num_chunks in (2, 8, MAX_CHUNKS):
        accuracy = 0.0
        for _ in bar(range(2000), desc=f"base, {num_chunks} chunks", leave=False):
            distances = torch.randint(num_chunks - 1, (512 // num_chunks,), generator=generator)
            ids, answers = draw_documents(generator, distances, num_chunks)
            logits, targets = base(ids).logits[:, :-1][answers[:, 1:]], ids[:, 1:][answers[:, 1:]]
            F.cross_entropy(logits, targets).backward()
            optimizer_step(optimizer, lr=1e-3, clip_grad=1.0)
            accuracy = 0.9 * accuracy + 0.1 * (logits.argmax(-1) == targets).float().mean().item()
            if accuracy > goal:
                break
        else:
            raise RuntimeError(
                f"the base answers {accuracy:.0%} of the questions in {num_chunks} chunks, "
                f"expected {goal:.0%}"
            )
    with atomic_folder(folder) as work:
        base.save_pretrained(work)
    return base
