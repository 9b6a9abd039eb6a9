"""Writes a compressed document as an adapter of PEFT, which the plain base model reads.

The decoder's tokens pass through frozen weights only, so the slots are a prefix of keys and values
at positions 0 .. M - 1, as in prefix tuning.

    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = PeftModel.from_pretrained(base, FOLDER)
    model(input_ids)      # first the ids of fed_first.json, then a question; no position_ids

PEFT's CARTRIDGE has the same layout, but PEFT 0.18 does not have it yet.

Shapes: L layers, H key/value heads, M slots, K head size. Source: Li and Liang 2021 (arXiv
2101.00190), without its projection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig
from safetensors.torch import save_file

from uiollms.files.atomic import atomic_folder
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import as_json
from uiollms.model.state import MemoryState
from uiollms.weights.base_files import shared_name
from uiollms.weights.fitness import smallest_window

FED_FIRST = "fed_first.json"


def save_prefix(state: MemoryState, model: Any, folder: str | Path) -> None:
    """Writes the slots of a state of one row as a prefix-tuning adapter, in float32. The tokens
    that plain PEFT must be fed first (the recent tokens and those of the open chunk) are written
    to `fed_first.json`. Raises ConfigError if there are no slots, or if the base's layers could not
    see them all from the end of the open chunk."""
    slots = state.num_slots
    if not slots:
        raise ConfigError(
            f"{folder}: the document fills no chunk of {model.memory_config.chunk_size} tokens, so "
            "there are no slots to write; feed it to the base as it is"
        )
    fed = torch.cat([state.recent_ids, state.open_ids], dim=1)[0]
    most = model.memory_config.chunk_size - state.open_ids.shape[1]
    window, reach = smallest_window(model.base.config), slots + len(fed) + most
    if window is not None and window < reach:
        raise ConfigError(
            f"{folder}: the base's sliding window of {window} positions is smaller than {slots} "
            f"slots and a chunk, {reach} positions; in plain layers the first slots would be hidden"
        )
    layers = [
        torch.stack(pair) for pair in zip(state.memory_keys, state.memory_values, strict=True)
    ]
    kv = torch.stack([layer.cpu() for layer in layers])[:, :, 0]  # [L, 2, H, M, K]
    heads, size = kv.shape[2], kv.shape[4]
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=shared_name(model.base.config),
        num_virtual_tokens=slots,
        num_layers=len(layers),
        token_dim=heads * size,
        num_attention_heads=heads,
        inference_mode=True,
    )
    flat = kv.permute(3, 0, 1, 2, 4).reshape(slots, -1).float().contiguous()  # [M, L * 2 * H * K]
    with atomic_folder(Path(folder)) as work:
        config.save_pretrained(str(work))
        save_file({"prompt_embeddings": flat}, work / "adapter_model.safetensors")
        fed_first = dict(input_ids=fed.tolist(), tokens_until_the_next_chunk=most)
        (work / FED_FIRST).write_text(as_json(fed_first) + "\n", encoding="utf-8")
