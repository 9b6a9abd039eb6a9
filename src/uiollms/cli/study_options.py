"""The options of `uiollms study`, and the sizes of its presets."""

from __future__ import annotations

import argparse
from typing import Any

from uiollms.cli import study_budget, study_savings
from uiollms.cli.common import output_arguments
from uiollms.cli.options import file_path, whole_number
from uiollms.cli.study_tables import TABLES, add_arguments
from uiollms.study.gradients import INFINITE, NAMES
from uiollms.study.recall import MAX_CHUNKS

# number of documents, tokens of each, sizes (None: those of the config), and values of S
PRESETS: dict[str, dict[str, Any]] = {
    "config": dict(
        documents=4, tokens=2048, chunk_size=None, num_memory=None, sizes=[1, 2, 4, 8, INFINITE]
    ),
    "demo": dict(documents=1, tokens=576, chunk_size=None, num_memory=None, sizes=[1]),
    "quick": dict(documents=2, tokens=320, chunk_size=64, num_memory=8, sizes=[1, 2, 4, INFINITE]),
    "table4": dict(
        documents=8, tokens=2048, chunk_size=128, num_memory=16, sizes=[1, 2, 4, 8, INFINITE]
    ),
    "table4-small": dict(documents=4, tokens=1024, chunk_size=64, num_memory=8, sizes=[1, 4, 8]),
    "figure7": dict(
        documents=1, tokens=2048, chunk_size=16, num_memory=4, sizes=[1, 2, 3, 4, 5, 6]
    ),
    "figure7-small": dict(
        documents=1, tokens=512, chunk_size=16, num_memory=4, sizes=[1, 2, 3, 4, 5, 6]
    ),
}

# command -> (help text, example of its arguments)
COMMANDS = {
    "gradients": (
        "measure bias and variance of every gradient estimator",
        "--env_conf smollm2-8x.json --preset table4",
    ),
    "cost": (
        "measure time and peak memory of a step, by estimator and S",
        "--env_conf smollm2-8x.json --preset figure7",
    ),
    "learning": (
        "compare what the estimators learn on text",
        "--env_conf config/experiments/learning.json --preset quick --seeds 3",
    ),
    "recall": (
        "compare what the estimators learn of long dependences",
        "--distances 4 --iterations 250 --seeds 3",
    ),
    "budget": (
        "measure memory and its alternatives by number of slots and by length",
        "--env_conf smollm2-8x.json --modes window recent streaming raw snapkv --ratios 4 8",
    ),
    "savings": (
        "measure what memory saves beside the raw context, by length",
        "--env_conf smollm2-8x.json --lengths 4096 16384",
    ),
    "paper-table1": (
        "make the paper's Table 1: copies from memory at 8x and 32x",
        "--scale small",
    ),
    "paper-table2": ("make the paper's Table 2: perplexity by length", "--scale small"),
    "paper-table4": ("make the paper's Table 4: norms of estimated gradients", "--scale small"),
    "paper-table5": ("make the paper's Table 5: what S changes", "--scale paper --dry_run"),
    "paper-table6": (
        "make the paper's Table 6: without transfer head, and TBPTT",
        "--scale small --out runs/table6",
    ),
    "paper-figure7": (
        "make the paper's Figure 7: time and memory of a step by S",
        "--scale paper --set model.device_map=0",
    ),
    "ablation-estimators": (
        "compare the estimators on facts that lie beyond S chunks",
        "--out runs/estimators",
    ),
    "ablation-design": (
        "compare slot_input, recent_tokens, the stage of copies and token weighting",
        "--dry_run",
    ),
}


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "uiollms study",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for name, (what, example) in COMMANDS.items():
        description = f"{what[0].upper()}{what[1:]}.\n\nexample: uiollms study {name} {example}"
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=what, description=description, formatter_class=raw)
        command.add_argument(
            "--out",
            type=file_path,
            metavar="FOLDER",
            help="folder of the results (runs/study-...)",
        )
        output_arguments(command, "the results, as in results.json, as one JSON object")
        if name in TABLES:
            add_arguments(command, name)
        elif name != "recall":
            command.add_argument(
                "--env_conf",
                required=True,
                metavar="FILE",
                help="environment config, such as smollm2-8x.json",
            )
            command.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="FIELD=VALUE",
                help="override one field of the config with a JSON value; may be given several "
                "times",
            )
        if name in ("gradients", "cost", "learning"):
            command.add_argument(
                "--preset",
                choices=list(PRESETS),
                default="config",
                help="sizes: those of the config, small ones, or those of the paper's Table 4 or "
                "Figure 7 (config)",
            )
        if name == "budget":
            study_budget.add_arguments(command)
        if name == "savings":
            study_savings.add_arguments(command)
        if name in ("gradients", "cost"):
            command.add_argument(
                "--corpus", default="sotu.test", help="corpus of the documents (sotu.test)"
            )
            command.add_argument(
                "--documents",
                type=whole_number(1, 10**6),
                help="number of documents (that of the preset)",
            )
            command.add_argument(
                "--draws",
                type=whole_number(1, 10**8),
                default=2000,
                help="number of draws per estimator (2000)",
            )
        if name == "cost":
            command.add_argument(
                "--repeats",
                type=whole_number(1, 10**4),
                default=1,
                help="number of steps per estimator, of which the median counts (1)",
            )
        if name in ("cost", "recall"):
            command.add_argument(
                "--estimators",
                nargs="+",
                default=NAMES,
                choices=NAMES,
                help="the estimators to compare (all)",
            )
        if name in ("learning", "recall"):
            command.add_argument(
                "--seeds",
                type=whole_number(1, 10),
                default=3,
                metavar="N",
                help="number of trainings per estimator, 1 to 10 (3)",
            )
        if name == "recall":
            command.add_argument(
                "--distances",
                type=whole_number(1, MAX_CHUNKS - 1),
                nargs="+",
                default=[1, 4],
                help="number of chunks from a fact to its question (1 4)",
            )
            command.add_argument(
                "--S",
                type=whole_number(1, 10**6),
                nargs="+",
                default=[1],
                help="values of S of tbptt, uio and importance (1)",
            )
            command.add_argument(
                "--no_transfer_head",
                action="store_true",
                help="read memory through the base's frozen projections",
            )
            command.add_argument(
                "--base",
                type=file_path,
                help="folder of the base, which is trained first if it does not exist (base in "
                "the folder of the results)",
            )
            help = "number of optimizer steps of eight samples (100)"
            command.add_argument(
                "--iterations", type=whole_number(1, 10**7), default=100, help=help
            )
    return parser
