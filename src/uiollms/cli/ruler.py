"""Runs RULER's tasks that need no download, with memory and with what takes its place.

uiollms ruler --env_conf smollm2-8x.json --lengths 4096 --limit 5
uiollms ruler --env_conf 32x.json --lengths 4096 8192 16384 32768 65536 --limit 100 --out runs/ruler

The table has a row for each task and length and a column for each mode: the mean fraction of right
answers with its 95 % interval. Without memory a mode reads as many raw tokens as memory has slots
(window: none, raw: all). A prompt that does not fit has no score; a line below the table states
why. --out gets the table as table.md, and results.json with every answer.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from rich import box
from rich.table import Table

from uiollms.cli.common import Output, output_arguments
from uiollms.cli.options import file_path, whole_number
from uiollms.files.atomic import make_folder, replace_text
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import as_json
from uiollms.runs.environment import environment

MOST_SAMPLES = 500  # lm-eval writes as many of a task and a length
MODES = ("memory", "window", "recent", "streaming", "bm25", "raw")


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    if find_spec("lm_eval") is None or find_spec("wonderwords") is None:
        raise ConfigError(
            "lm-eval with RULER is not installed; run: pip install 'lm-eval[ruler]>=0.4.13,<0.5'"
        )
    # These imports take seconds, and lm-eval is optional.
    from uiollms.evaluation.lm_eval_model import HarnessLM
    from uiollms.evaluation.ruler import TASKS, Cell, run_ruler

    lm = HarnessLM(args.env_conf, args.weights, **dict(map(parse_setting, args.set)))
    tasks = args.tasks or TASKS
    total = len(tasks) * len(args.lengths) * len(args.modes)
    done: list[Cell] = []
    with output.bar(None, total=total, desc="ruler", unit="cell") as bar:

        def report(cell: Cell) -> None:
            done.append(cell)
            bar.update()
            if args.out:
                write_results(args, lm, done)

        cells = run_ruler(lm, tasks, args.lengths, args.modes, args.limit, args.seed, report)
    console = output.console()
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    header, *rows = table_rows(cells, args.modes)
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    output.print_text("\n".join(faults(cells)))
    output.print_json(**results(args, lm, cells))


def parse_setting(text: str) -> tuple[str, Any]:
    """FIELD=VALUE -> (field, value). A value that is no JSON is text, as in `--set` of train.py."""
    field, _, value = text.partition("=")
    try:
        return field, json.loads(value)
    except ValueError:
        return field, value


def table_rows(cells: Sequence[Any], modes: Sequence[str]) -> list[list[str]]:
    """The header, and a row for each task and length: their names, the tokens of the longest
    prompt, and the score in each mode with its interval."""
    rows = [["task", "length", "prompt tokens", *modes]]
    found = {(cell.task, cell.length, cell.mode): cell for cell in cells}
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        row = [found[task, length, mode] for mode in modes]
        shown = [
            "does not fit"
            if cell.score is None
            else f"{cell.score:.2f} [{cell.interval_95[0]:.2f}, {cell.interval_95[1]:.2f}]"
            for cell in row
        ]
        rows.append([task, str(length), str(row[0].prompt_tokens), *shown])
    return rows


def faults(cells: Sequence[Any]) -> list[str]:
    return [
        f"{cell.task} at {cell.length}, {cell.mode}: {cell.fault}" for cell in cells if cell.fault
    ]


def results(args: argparse.Namespace, lm: Any, cells: Sequence[Any]) -> dict[str, Any]:
    return {
        "command": command_of(args),
        "weights": lm.weights,
        "size": list(lm.model.memory_config.size),
        "environment": environment(),
        "cells": [cell.as_dict() for cell in cells],
    }


def command_of(args: argparse.Namespace) -> str:
    """The command that gives these results."""
    parts = ["uiollms", "ruler", "--env_conf", args.env_conf]
    parts += ["--weights", args.weights] if args.weights else []
    parts += [part for setting in args.set for part in ("--set", setting)]
    parts += ["--lengths", *map(str, args.lengths), "--modes", *args.modes]
    parts += ["--tasks", *args.tasks] if args.tasks else []
    return shlex.join([*parts, "--limit", str(args.limit), "--seed", str(args.seed)])


def write_results(args: argparse.Namespace, lm: Any, cells: Sequence[Any]) -> None:
    """Writes what is finished. A row is in the table when all of its modes are."""
    make_folder(args.out)
    replace_text(args.out / "results.json", as_json(results(args, lm, cells), indent=2) + "\n")
    whole = cells[: len(cells) // len(args.modes) * len(args.modes)]
    header, *rows = table_rows(whole, args.modes)
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    lines += ["", *(f"- {fault}" for fault in faults(whole))]
    replace_text(args.out / "table.md", "\n".join(lines).rstrip() + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uiollms ruler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--env_conf", required=True, metavar="FILE", help="environment config")
    add("--weights", metavar="CHECKPOINT", help="default: the weights that test.py evaluates")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override one field of the config; may be given several times",
    )
    add(
        "--lengths",
        nargs="+",
        type=whole_number(1024, 2**20),
        default=[4096],
        metavar="N",
        help="tokens of a prompt with its answer (4096); shorter ones have no space for some tasks",
    )
    add(
        "--modes",
        nargs="+",
        default=list(MODES),
        choices=MODES,
        help="what answers (all)",
    )
    add("--tasks", nargs="+", metavar="TASK", help="tasks of lm-eval's RULER (the six)")
    add(
        "--limit",
        type=whole_number(1, MOST_SAMPLES),
        default=20,
        metavar="N",
        help="prompts of each task and length (20)",
    )
    add(
        "--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help="of the prompts (0)"
    )
    add("--out", type=file_path, metavar="FOLDER", help="gets results.json and table.md")
    output_arguments(parser, "the results, as one JSON object")
    return parser
