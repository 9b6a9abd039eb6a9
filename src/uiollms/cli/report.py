"""A run folder as one page: report.html, with every picture in it, and as a PNG in plots/.

python -m uiollms report runs/smollm2-8x
python -m uiollms report runs/smollm2-8x --attention_tokens 8192
python -m uiollms report runs/smollm2-8x --no_attention

The attention that memory gets is measured with the run's model once and kept in the run folder
as attention.safetensors; it is measured again when the run has other weights by then. All else
is read from the folder.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from functools import partial

from uiollms.build import load_memory_lm
from uiollms.cli.common import WORDS, Output, output_arguments
from uiollms.cli.options import place, whole
from uiollms.evaluation.attention_mass import AttentionMass, measure_attention
from uiollms.files.atomic import reporting_write_errors
from uiollms.files.errors import ConfigError
from uiollms.reports.page import write_report
from uiollms.reports.run_folder import ATTENTION, Missing, RunFolder, read_attention, read_folder
from uiollms.weights.adapters import load_weights


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m uiollms report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=place, metavar="RUN", help="run folder of train.py or test.py")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--no_attention",
        action="store_true",
        help="do not load the model; show what was measured before",
    )
    group.add_argument(
        "--attention_tokens",
        type=whole(),
        metavar="N",
        help="measure attention anew, on N tokens of the document",
    )
    output_arguments(
        parser,
        "the page, its pictures and what is missing, as one JSON object",
        quiet="no progress bar, no words",
    )
    args = parser.parse_args(arguments)
    output = Output.of(args)
    run = read_folder(args.run)
    add_attention(run, args.no_attention, args.attention_tokens, output)
    page, plots = write_report(run)
    for part in run.missing:
        output.say(
            f"not in it: {part.what}: {part.why}"
            + (f"; made by: {part.command}" if part.command else "")
        )
    output.say(f"written: {page}, and its pictures in {page.parent / 'plots'}")
    output.result(
        page=str(page),
        plots=[str(plot) for plot in plots],
        missing=[asdict(part) for part in run.missing],
    )
    return 0


def add_attention(run: RunFolder, skip: bool, tokens: int | None, output: Output = WORDS) -> None:
    """The attention mass stored in the run folder; measured first where that is not of the run's
    weights, or `tokens` asks."""
    path = run.path / ATTENTION
    if os.path.lexists(path):
        run.attention = run.part(
            "attention to memory", ATTENTION, read_attention, f"python -m uiollms report {run.path}"
        )
    if skip or (
        run.attention and run.attention.about.get("weights") == run.weights_name and tokens is None
    ):
        if run.attention is None:
            run.missing.append(
                Missing(
                    "attention to memory", "--no_attention", f"python -m uiollms report {run.path}"
                )
            )
        return
    try:
        run.attention = measured(run, tokens, output)
    except ConfigError as error:
        if tokens is not None:
            raise
        run.missing.append(
            Missing("attention to memory" + " of these weights" * bool(run.attention), str(error))
        )
        return
    with reporting_write_errors(path):
        run.attention.save(path)


def measured(run: RunFolder, tokens: int | None, output: Output) -> AttentionMass:
    """Loads the run's model with its weights. Raises ConfigError where that cannot be done."""
    if run.config is None:
        raise ConfigError(f"{run.path} has no config that would name the model")
    model, tokenizer = load_memory_lm(run.config, run.path / "config.json")
    if run.weights:
        load_weights(model, run.weights)
    output.say(f"measures attention, weights: {run.weights_name}, base in {model.dtype}")
    progress = partial(output.bar, desc="attention", unit="chunk", leave=False)
    mass = measure_attention(model, tokenizer, run.config, tokens, progress)
    return AttentionMass(mass.shares, mass.about | {"weights": run.weights_name})
