"""The optimizer, and norms of the gradients by what is trained."""

from __future__ import annotations

import torch
from torch.nn.utils import get_total_norm

from uiollms.config.sections import TrainSection
from uiollms.model.memory_lm import MemoryLM


def make_optimizer(model: MemoryLM, config: TrainSection) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.trainable_parameters().values(),
        lr=config.max_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def gradient_norms(model: MemoryLM) -> dict[str, float]:
    """Euclidean norms of the gradients, by what is trained: encoder_lora, decoder_lora,
    token_embeddings (both together)."""
    parts: dict[str, list[torch.Tensor]] = {
        "encoder_lora": [],
        "decoder_lora": [],
        "token_embeddings": [],
    }
    for name, parameter in model.trainable_parameters().items():
        role, kind = name.split(".")[:2]
        if parameter.grad is not None:
            parts[f"{role}_lora" if kind == "layers" else "token_embeddings"].append(parameter.grad)
    return {part: get_total_norm(gradients).item() for part, gradients in parts.items()}
