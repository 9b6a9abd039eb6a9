"""The command `uiollms study savings`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.build import check_model
from uiollms.cli.options import whole_number
from uiollms.cli.study_model import load_study_model
from uiollms.config.corpora import TaskEntry
from uiollms.config.load import load_env_config
from uiollms.data.tokens import tokenize
from uiollms.evaluation.instances import task_documents
from uiollms.model.rope import num_positions
from uiollms.reports.plots import style
from uiollms.study.savings import STEPS, check_lengths, plot_savings, study_savings
from uiollms.weights.base_models import base_config


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--corpus",
        default="stdlib.test",
        help="corpus whose documents are joined to one context (stdlib.test)",
    )
    command.add_argument(
        "--lengths",
        type=whole_number(1, 10**7),
        nargs="+",
        default=[4096, 8192, 16384, 32768, 63488],
        help="tokens of a context (4096 8192 16384 32768 63488)",
    )
    command.add_argument(
        "--longest_raw",
        type=whole_number(1, 10**7),
        metavar="TOKENS",
        help="measure the raw context up to so many tokens only, because its time grows with their "
        "square (all)",
    )
    command.add_argument(
        "--repeats",
        type=whole_number(1, 10**4),
        default=1,
        help="number of turns, of which the medians count (1)",
    )


def measure_savings(
    args: argparse.Namespace, out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures what memory saves beside the raw context. Writes plot.png to `out`. Returns the
    settings and the rows of the table."""
    config = load_env_config(args.env_conf, args.set)
    memory = check_model(config, args.env_conf)
    check_lengths(args.lengths, memory, num_positions(base_config(config.model.model_name)))
    model, tokenizer, setting = load_study_model(args, config)
    ids = join_documents(args.corpus, tokenizer, max(args.lengths) + STEPS + 1)
    rows = study_savings(model, ids, args.lengths, args.repeats, args.output.bar, args.longest_raw)
    plot_savings(rows, style, out / "plot.png")
    sizes = {"chunk_size": memory.chunk_size, "num_memory": memory.num_memory}
    return {"corpus": args.corpus, **sizes, "repeats": args.repeats, **setting}, rows


def join_documents(name: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Returns up to `length` token ids [T] of a corpus's documents, one after the other."""
    wanted = {"task_type": "perplexity", "task_name": name, "num_instance": 1}
    task = TaskEntry.model_validate(wanted)
    parts, found = [], 0
    for document in task_documents(task, tokenizer):
        parts.append(tokenize(tokenizer, document.text))
        found += len(parts[-1])
        if found >= length:
            break
    return torch.cat(parts)[:length]
