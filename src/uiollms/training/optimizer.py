"""The optimizer, its step, and the norms of the gradients."""

from __future__ import annotations

import math

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from uiollms.config.sections import TrainSection
from uiollms.model.memory_lm import MemoryLM


def make_optimizer(model: MemoryLM, config: TrainSection) -> torch.optim.AdamW:
    """Creates AdamW for the trained parameters of a model. Where all of them are on GPUs, it is
    torch's fused form, which updates many parameters in one kernel. The forms differ in rounding.
    They have the same state, so a run may be resumed with another form."""
    parameters = list(model.trainable_parameters().values())
    on_gpus = all(parameter.device.type == "cuda" for parameter in parameters)
    return torch.optim.AdamW(
        parameters,
        lr=config.max_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True if on_gpus else None,
    )


def optimizer_step(
    optimizer: torch.optim.Optimizer, lr: float, clip_grad: float | None
) -> torch.Tensor:
    """Clips the gradients, updates the parameters at the learning rate `lr` and clears the
    gradients. Returns the norm of all gradients before clipping."""
    norm = clip_gradients(optimizer, clip_grad)
    apply_gradients(optimizer, lr)
    return norm


def clip_gradients(optimizer: torch.optim.Optimizer, clip_grad: float | None) -> torch.Tensor:
    """Scales the gradients so that the Euclidean norm of all of them is at most `clip_grad`; None
    or 0 means no limit. Returns the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return clip_grad_norm_(parameters, clip_grad or math.inf)


def apply_gradients(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Updates the parameters at the learning rate `lr` and clears the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def gradient_norms(model: MemoryLM) -> dict[str, float]:
    """The Euclidean norms of the gradients of each part that is trained: encoder_lora,
    decoder_lora and token_embeddings (both roles together)."""
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
