"""The model that a study measures."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from uiollms.build import find_weights, load_found_weights, load_memory_lm
from uiollms.config.sections import EnvConfig
from uiollms.model.memory_lm import MemoryLM


def load_study_model(
    args: argparse.Namespace, config: EnvConfig
) -> tuple[MemoryLM, PreTrainedTokenizerBase, dict[str, Any]]:
    """Loads the model of a config, which was read from `args.env_conf`, with the weights that
    test.py evaluates; without any it stays untrained. Returns it with its tokenizer and with what
    the results say of it: weights, dtype, device and threads."""
    model, tokenizer = load_memory_lm(config, args.env_conf)
    if weights := find_weights(config):
        load_found_weights(model, config, weights)
    setting = {
        "weights": weights,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }
    return model, tokenizer, setting
