"""The command `uiollms study budget`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from uiollms.cli.options import whole_number
from uiollms.cli.study_model import load_study_model
from uiollms.config.corpora import TaskEntry
from uiollms.config.load import load_env_config
from uiollms.config.modes import PRESSES
from uiollms.files.atomic import replace_text
from uiollms.files.errors import ConfigError
from uiollms.reports.plots import style
from uiollms.study.budget import csv_text, make_points, plot_budget, study_budget


def add_arguments(command: argparse.ArgumentParser) -> None:
    size = whole_number(1, 10**7)
    command.add_argument(
        "--corpus", default="stdlib.test", help="corpus of the documents (stdlib.test)"
    )
    command.add_argument("--documents", type=size, default=6, help="number of documents (6)")
    command.add_argument(
        "--modes",
        nargs="+",
        default=["window", "shuffled", "recent", "streaming", "pooled", "raw", *PRESSES],
        metavar="MODE",
        help="modes beside memory, as in a task's compare (all that need no question)",
    )
    command.add_argument("--chunk_size", type=size, default=256, help="tokens of a chunk (256)")
    command.add_argument(
        "--tokens", type=size, default=2048, help="tokens of a document while slots vary (2048)"
    )
    command.add_argument(
        "--ratios",
        type=size,
        nargs="*",
        default=[2, 4, 8, 16, 32, 64],
        help="tokens per slot, one point each (2 4 8 16 32 64)",
    )
    command.add_argument(
        "--lengths",
        type=size,
        nargs="*",
        default=[1024, 2048, 4096, 8192, 16384],
        help="tokens of a document, one point each (1024 2048 4096 8192 16384)",
    )
    command.add_argument(
        "--ratio", type=size, default=8, help="tokens per slot while lengths vary (8)"
    )


def measure_budget(
    args: argparse.Namespace, out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compares memory with its alternatives at equal slots. Writes results.csv and plot.png to
    `out`. Returns the settings and the rows of the table."""
    config = load_env_config(args.env_conf, args.set)
    if not args.ratios and not args.lengths:
        raise ConfigError("--ratios and --lengths: found no point in either; give one of them")
    points = make_points(args.chunk_size, args.tokens, args.ratios, args.lengths, args.ratio)
    try:
        task = TaskEntry(
            task_type="perplexity",
            task_name=args.corpus,
            num_instance=args.documents,
            compare=tuple(args.modes),
            chunk_size=args.chunk_size,
            num_memory=args.chunk_size // args.ratio,
            truncation=args.tokens,
        )
    except ValidationError as error:
        raise ConfigError(f"--modes and --corpus: {error.errors()[0]['msg']}") from None
    model, tokenizer, setting = load_study_model(args, config)
    rows = study_budget(model, tokenizer, task, points, args.output.bar)
    replace_text(out / "results.csv", csv_text(rows))
    plot_budget(rows, style, out / "plot.png")
    sizes = {
        "chunk_size": args.chunk_size,
        "recent_tokens": model.memory_config.recent_tokens,
    }
    if args.lengths:  # the other sweep has the ratio in its rows
        sizes["ratio"] = args.ratio
    return {"corpus": args.corpus, "documents": args.documents, **sizes, **setting}, rows
