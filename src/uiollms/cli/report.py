"""Writes a run folder as one page: report.html, which contains every plot, and plots/*.png.

uiollms report runs/smollm2-8x
uiollms report runs/smollm2-8x --attention_tokens 8192
uiollms report runs/smollm2-8x --no_attention

The attention to memory is measured with the run's model once, and stored in the run folder as
attention.safetensors. It is measured again if the run has other weights since. Everything else
is read from the folder.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from functools import partial

from uiollms.build import load_memory_lm
from uiollms.cli.common import DEFAULT_OUTPUT, Output, output_arguments
from uiollms.cli.options import file_path, whole_number
from uiollms.evaluation.attention_mass import AttentionMass, measure_attention
from uiollms.files.atomic import reporting_write_errors
from uiollms.files.errors import ConfigError
from uiollms.reports.page import write_report
from uiollms.reports.run_folder import (
    ATTENTION_FILE,
    Missing,
    RunFolder,
    read_attention,
    read_folder,
)
from uiollms.weights.adapters import load_weights


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uiollms report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=file_path, metavar="RUN", help="run folder of train.py or test.py"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--no_attention",
        action="store_true",
        help="do not load the model; show the attention measured before, if any",
    )
    group.add_argument(
        "--attention_tokens",
        type=whole_number(),
        metavar="N",
        help="measure attention again, on N tokens of the document",
    )
    output_arguments(
        parser,
        "the paths of the page and its plots, and the missing parts, as one JSON object",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    run = read_folder(args.run)
    add_attention(run, args.no_attention, args.attention_tokens, output)
    page, plots = write_report(run)
    for part in run.missing:
        output.print_text(
            f"not in the report: {part.what}: {part.why}"
            + (f"; this command makes it: {part.command}" if part.command else "")
        )
    output.print_text(f"written to {page}, plots to {page.parent / 'plots'}")
    output.print_json(
        page=str(page),
        plots=[str(plot) for plot in plots],
        missing=[asdict(part) for part in run.missing],
    )
    return 0


def add_attention(
    run: RunFolder, skip: bool, tokens: int | None, output: Output = DEFAULT_OUTPUT
) -> None:
    """Sets `run.attention` from the file in the run folder. Measures and stores it first if the
    file belongs to other weights.

    skip:   only use the file
    tokens: measure again, on so many tokens of the document
    """
    path = run.path / ATTENTION_FILE
    command = f"uiollms report {run.path}"
    if os.path.lexists(path):
        run.attention = run.part(
            "attention to memory",
            ATTENTION_FILE,
            read_attention,
            command,
        )
    if skip or (
        run.attention and run.attention.about.get("weights") == run.weights_name and tokens is None
    ):
        if run.attention is None:
            run.missing.append(Missing("attention to memory", "--no_attention", command))
        return
    try:
        run.attention = measure_run(run, tokens, output)
    except ConfigError as error:
        if tokens is not None:
            raise
        run.missing.append(
            Missing("attention to memory" + " of these weights" * bool(run.attention), str(error))
        )
        return
    with reporting_write_errors(path):
        run.attention.save(path)


def measure_run(run: RunFolder, tokens: int | None, output: Output) -> AttentionMass:
    """Loads the run's model with its weights and measures its attention. Raises ConfigError if the
    model cannot be loaded."""
    if run.config is None:
        raise ConfigError(f"{run.path} has no config, which names the model")
    model, tokenizer = load_memory_lm(run.config, run.path / "config.json")
    if run.weights:
        load_weights(model, run.weights)
    output.print_text(f"measuring attention; weights: {run.weights_name}, base in {model.dtype}")
    progress = partial(output.bar, desc="attention", unit="chunk", leave=False)
    mass = measure_attention(model, tokenizer, run.config, tokens, progress)
    return AttentionMass(mass.fractions, mass.about | {"weights": run.weights_name})
