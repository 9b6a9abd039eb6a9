"""`train.py --dry_run`: the plan of a run as a table, and an exit code.

python train.py --env_conf 32x.json --dry_run --device_memory 24GiB,24GiB
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from uiollms.cli.common import WORDS, Output
from uiollms.config.sections import EnvConfig
from uiollms.distributed.device_map import CPU, this_machine
from uiollms.files.errors import ConfigError, shortened
from uiollms.planning.planner import Plan, make_plan
from uiollms.training.schedule import Schedule

DOES_NOT_FIT = 3  # exit code
MOST_GPUS = 128  # torch counts no further


def dry_run(
    config: EnvConfig, path: str | Path, device_memory: str | None = None, output: Output = WORDS
) -> int:
    """Print the plan of a config; exit code 0 if it fits, 3 if not. device_memory:
    "24GiB,24GiB", what GPU 0, 1, ... have, if not this machine's."""
    logging.getLogger("accelerate.utils.modeling").setLevel(
        logging.ERROR
    )  # it warns of GPUs that are not here
    machine = (
        None if device_memory is None else parse_memory(device_memory) | {CPU: this_machine()[CPU]}
    )
    plan = make_plan(config, path, machine)
    try:
        steps = len(Schedule(config.train, config.train.accum_grad).steps())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    print_plan(plan, config.train.accum_grad, steps, output.console(width=130))
    output.result(**as_json(plan), steps=steps)
    return 0 if plan.fits else DOES_NOT_FIT


SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT])(I?)B", re.IGNORECASE)
MOST_MEMORY = 2**50  # bytes of a GPU: a thousand times the largest


def parse_memory(text: str) -> dict[torch.device, int]:
    """ "24GiB,24GiB" -> bytes of GPU 0 and 1. Raises ConfigError."""
    expected = "expected one size a GPU, such as 24GiB,24GiB"
    sizes: list[int] = []
    for part in text.split(","):
        match = SIZE.fullmatch(part.strip())
        size = (
            int(
                float(match[1])
                * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2].upper()))
            )
            if match
            else 0
        )
        if not 0 < size <= MOST_MEMORY or len(sizes) == MOST_GPUS:
            what = (
                f"found {shortened(part.strip(), 40)!r}, at most 1024TiB"
                if len(sizes) < MOST_GPUS
                else f"at most {MOST_GPUS}"
            )
            raise ConfigError(f"--device_memory {shortened(text, 60)}: {expected}; {what}")
        sizes.append(size)
    return {torch.device("cuda", i): size for i, size in enumerate(sizes)}


def as_json(plan: Plan) -> dict[str, Any]:
    """The table's figures in bytes, and the lines below it; have: 0 where the device is not
    here."""
    devices = [
        dict(
            device=str(device),
            need=round(need.total),
            have=plan.have[device],
            fits=need.total <= plan.have[device],
            parts={name: round(size) for name, size in need._asdict().items()},
        )
        for device, need in plan.need.items()
    ]
    step = dict(tokens=plan.length, chunk_batch=plan.chunk_batch, flops=plan.flops)
    most = dict(longest=plan.longest, capacity=plan.capacity, most_chunks=plan.most_chunks)
    return dict(fits=plan.fits, devices=devices) | step | most


def print_plan(plan: Plan, documents: int, steps: int, console: Console) -> None:
    """documents: of a step of one process; steps: of a run of one."""
    table = Table(
        title=(
            f"one training step: a document of {plan.length:,} tokens, chunk_batch "
            f"{plan.chunk_batch} (GiB)"
        ),
        title_justify="left",
    )
    for column in (
        "device",
        "weights",
        "LoRA, optimizer",
        "memories",
        "keys, values",
        "their gradients",
        "activations",
    ):
        table.add_column(column, justify="left" if column == "device" else "right")
    for column in ("total", "has", "fits"):
        table.add_column(column, justify="right")
    for device, need in plan.need.items():
        have = plan.have[device]
        figures = [f"{size / 2**30:.2f}" for size in (*need, need.total)]
        table.add_row(
            str(device),
            *figures,
            f"{have / 2**30:.2f}" if have else "not here",
            "yes" if need.total <= have else "NO",
        )
    console.print(table)
    longest = (
        "none"
        if plan.longest is None
        else f"{plan.longest:,} tokens{' (the capacity)' if plan.longest == plan.capacity else ''}"
    )
    most = "none" if plan.most_chunks is None else f"{plan.most_chunks}"
    console.print(f"longest document with chunk_batch {plan.chunk_batch}: {longest}")
    console.print(f"largest chunk_batch at {plan.length:,} tokens: {most}")
    speed, unit = (100e9, "GFLOP/s") if set(plan.need) == {CPU} else (100e12, "TFLOP/s")
    each = f"{documents} document{'s' * (documents > 1)}"
    console.print(f"a step takes {each} of every process: {steps:,} steps of one process")
    work = f"useful work of a document: {plan.flops / 1e12:,.3g} TFLOP"
    console.print(
        f"{work}, {plan.flops / speed:,.3g} s where 100 {unit} are really done (devices of one "
        "process take turns)"
    )
    if not all(plan.have.values()):
        console.print(
            "a GPU that the map names is not here; --device_memory 24GiB,24GiB asks about other "
            "machines"
        )
