"""Converts trained weights between PEFT folders and the authors' .pth lists, and to other dtypes.

uiollms convert --env_conf 8x.json runs/8x/checkpoint adapters/8x --dtype bf16
uiollms convert --env_conf 32x.json ckp/32x.pth ckp/32x
"""

from __future__ import annotations

import argparse

from uiollms.build import load_memory_lm
from uiollms.cli.common import Output, output_arguments
from uiollms.cli.options import file_path
from uiollms.config.load import load_env_config
from uiollms.weights.adapters import load_weights, save_weights
from uiollms.weights.base_models import DTYPES


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uiollms convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--env_conf", required=True, metavar="FILE", help="config of the weights' model"
    )
    add = parser.add_argument
    add("source", type=file_path, metavar="SOURCE", help="a checkpoint folder, or a .pth file")
    add(
        "target",
        type=file_path,
        metavar="TARGET",
        help="a folder, or a file name that ends in .pth",
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="dtype of the written tensors; by default it does not change",
    )
    output_arguments(parser, "the paths and the dtype, as one JSON object", quiet="print no text")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    model, _ = load_memory_lm(load_env_config(args.env_conf), args.env_conf)
    load_weights(model, args.source)
    save_weights(model, args.target, DTYPES.get(args.dtype))
    output.print_text(f"written to {args.target}")
    output.print_json(source=str(args.source), target=str(args.target), dtype=args.dtype)
