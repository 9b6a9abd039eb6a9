"""Answers of the base, which reads in place of a prompt what shows the worth of memory.

    window     the open chunk, which the model with memory reads raw too, with its recent tokens
    raw        the whole prompt
    recent, streaming, bm25
               the open chunk, and before it as many tokens of the earlier chunks as their memories
               have slots, which uiollms/alternatives/raw_tokens.py chooses

The tokens have contiguous positions, as if they were the whole prompt. Those that the base
generates are added to them, and none is removed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from uiollms.alternatives.raw_tokens import CHOICES, QUESTION
from uiollms.config.sections import MemoryConfig
from uiollms.model.memory_lm import MemoryLM

BASE_MODES = ("window", "raw", *CHOICES)
ANSWER_MODES = ("memory", *BASE_MODES)


def base_prompt(ids: list[int], memory: MemoryConfig, mode: str) -> list[int]:
    """Returns the tokens that the base reads of a prompt [T] in one of BASE_MODES.

    2 slots per chunk of 4, no recent tokens, ids 0..9, the open chunk is 8 9 ->
    window 8 9 | recent 4 5 6 7 8 9 | streaming 0 1 2 3 8 9 | raw 0..9
    """
    if mode == "raw":
        return ids
    num_chunks = max(0, len(ids) - 1) // memory.chunk_size
    start = max(0, num_chunks * memory.chunk_size - memory.recent_tokens)  # of the open chunk
    if mode == "window":
        return ids[start:]
    question = torch.tensor(ids[-QUESTION:])
    slots = num_chunks * memory.num_memory
    return CHOICES[mode](torch.tensor(ids[:start]), slots, question).tolist() + ids[start:]


@torch.no_grad()
def log_probability(
    model: MemoryLM, prompt: list[int], continuation: list[int]
) -> tuple[float, bool]:
    """Returns the log probability in nats of a continuation [T'] after a prompt [T], by the base,
    and whether greedy decoding generates it."""
    ids = torch.tensor([prompt + continuation[:-1]], device=model.device)
    targets = torch.tensor(continuation, dtype=torch.int64, device=model.device)
    logits = model.base(ids, logits_to_keep=max(1, len(targets))).logits[0, : len(targets)]
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(precise, targets, reduction="none").double()
    return -losses.sum().item(), bool((logits.argmax(-1) == targets).all())


def generate_with_base(model: MemoryLM, prompt: list[int], seed: int, **options: Any) -> list[int]:
    """Returns the tokens that the base generates after a prompt [T].

    seed: of sampling; options: arguments of transformers' `generate`
    """
    base: Any = model.base
    ids = torch.tensor([prompt], device=model.device)
    with torch.random.fork_rng():  # transformers draws from torch's global generator
        torch.manual_seed(seed)
        output = base.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return output[0, len(prompt) :].tolist()
