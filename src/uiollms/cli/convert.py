"""Trained weights from one format into another: PEFT folders, the authors' .pth list, smaller
dtypes.

python -m uiollms convert --env_conf smollm2-8x.json runs/smollm2-8x/checkpoint
adapters/smollm2-8x --dtype bf16 python -m uiollms convert --env_conf 32x.json ckp/32x.pth
ckp/32x
"""

from __future__ import annotations

import argparse

from uiollms.build import load_memory_lm
from uiollms.cli.common import Output, output_arguments
from uiollms.cli.options import place
from uiollms.config.load import load_env_config
from uiollms.weights.adapters import load_weights, save_weights
from uiollms.weights.base_models import DTYPES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m uiollms convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--env_conf", required=True, metavar="FILE", help="the config that the weights belong to"
    )
    parser.add_argument("source", type=place, help="a checkpoint folder, or a .pth file")
    parser.add_argument("target", type=place, help="a folder, or a name ending in .pth")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of the tensors written; as they are by default"
    )
    output_arguments(parser, "where the weights went, as one JSON object", quiet="no words")
    args = parser.parse_args(arguments)
    output = Output.of(args)
    model, _ = load_memory_lm(load_env_config(args.env_conf), args.env_conf)
    load_weights(model, args.source)
    save_weights(model, args.target, DTYPES.get(args.dtype))
    output.say(f"written to {args.target}")
    output.result(source=str(args.source), target=str(args.target), dtype=args.dtype)
