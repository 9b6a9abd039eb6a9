"""The two roles of one frozen base, encoder and decoder: what each of them trains, and checks
that a base can take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from uiollms.config.sections import MemoryConfig
from uiollms.kernels.flash_attention import unsupported_reason, uses_flash_attention
from uiollms.model.lora import LoRA
from uiollms.model.rope import describe_num_positions, find_rope_fault, num_positions
from uiollms.model.skeleton import is_sharded
from uiollms.weights.base_files import FAMILIES
from uiollms.weights.fitness import eos_fault, rank_fault, window_fault

PROJECTIONS = {"encoder": ("q_proj", "v_proj"), "decoder": ("k_proj", "v_proj")}


class Role(nn.Module):
    """The trained parameters of one role, in the dtype of `token`: a LoRA for each of two
    projections in every layer (for none if the decoder has no transfer head), and one token
    embedding, which starts as `token` [1, 1, D], if `token_name` names it."""

    def __init__(
        self, name: str, base: Any, config: MemoryConfig, token_name: str | None, token: Tensor
    ) -> None:
        super().__init__()
        salts = iter(range(2 * len(base.model.layers)))
        offset = 0 if name == "encoder" else 2 * len(base.model.layers)
        adapted = PROJECTIONS[name] if name == "encoder" or config.transfer_head else ()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    projection: LoRA(
                        getattr(layer.self_attn, projection),
                        config.lora_rank,
                        config.lora_alpha,
                        config.lora_dropout,
                        salt=offset + next(salts),
                        dtype=token.dtype,
                    )
                    for projection in adapted
                }
            )
            for layer in base.model.layers
        )
        if token_name:
            self.register_parameter(token_name, nn.Parameter(token.clone()))


def check_base(base: Any, config: MemoryConfig) -> None:
    """Raises ValueError if `base` cannot carry memory with `config`."""
    family = base.config.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if is_sharded(base):
        raise ValueError(
            "whole layers of the base are sharded by FSDP; shard its linear layers only, or give a "
            "device_map"
        )
    faults = (
        window_fault(base.config, config.chunk_size),
        find_rope_fault(base.config, config.chunk_size, config.recent_tokens),
        eos_fault(base.config),
        rank_fault(base.config, config.lora_rank),
    )
    if any(faults):
        raise ValueError(next(filter(None, faults)))
    if config.chunk_size > num_positions(base.config):
        limit = describe_num_positions(base.config)
        raise ValueError(f"chunk_size {config.chunk_size} is past the base's {limit}")
    if uses_flash_attention(base) and (fault := unsupported_reason(base.dtype, base.config)):
        raise ValueError(
            f'{fault}; load the base in another dtype, or with attn_implementation="sdpa"'
        )
