"""Prints the plan of a run for `train.py --dry_run`.

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

from uiollms.cli.common import DEFAULT_OUTPUT, Output
from uiollms.config.sections import EnvConfig
from uiollms.distributed.device_map import CPU, this_machine
from uiollms.files.errors import ConfigError, shortened
from uiollms.planning.planner import Plan, make_plan
from uiollms.training.schedule import Schedule

DOES_NOT_FIT = 3  # exit code
MAX_GPUS = 128  # of torch
MAX_MEMORY = 2**50  # bytes of a GPU, a thousand times the largest
FIGURES = (
    "weights",
    "LoRA, optimizer",
    "memories",
    "keys, values",
    "their gradients",
    "activations",
    "total",
    "has",
    "fits",
)
NAME_WIDTH, DEVICE_WIDTH = 19, 11  # columns of a table with a column per device
SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT])(I?)B", re.IGNORECASE)


def dry_run(
    config: EnvConfig,
    path: str | Path,
    device_memory: str | None = None,
    output: Output = DEFAULT_OUTPUT,
) -> int:
    """Prints the plan of a config. Returns exit code 0 if it fits, 3 if it does not.

    device_memory: memory of GPU 0, 1, ..., such as "24GiB,24GiB", instead of this machine's
    """
    # accelerate warns about GPUs that this machine lacks.
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)
    machine = None
    if device_memory is not None:
        machine = parse_memory(device_memory) | {CPU: this_machine("cpu")[CPU]}
    plan = make_plan(config, path, machine)
    try:
        steps = len(Schedule(config.train, config.train.accum_grad).steps())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    print_plan(plan, config.train.accum_grad, steps, output.console(130))
    output.print_json(**as_json(plan), steps=steps)
    return 0 if plan.fits else DOES_NOT_FIT


def parse_memory(text: str) -> dict[torch.device, int]:
    """ "24GiB,24GiB" -> bytes of GPU 0 and 1. Raises ConfigError."""
    expected = "expected one size per GPU, such as 24GiB,24GiB"
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
        if not 0 < size <= MAX_MEMORY or len(sizes) == MAX_GPUS:
            found = (
                f"found {shortened(part.strip(), 40)!r}, at most 1024TiB"
                if len(sizes) < MAX_GPUS
                else f"at most {MAX_GPUS}"
            )
            raise ConfigError(f"--device_memory {shortened(text, 60)}: {expected}; {found}")
        sizes.append(size)
    return {torch.device("cuda", i): size for i, size in enumerate(sizes)}


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for `--json`: the figures of the table in bytes, and those below the table. `have`
    is 0 for a device that this machine lacks."""
    devices = [
        dict(
            device=str(device),
            need=round(need.total),
            have=plan.available[device],
            fits=need.total <= plan.available[device],
            parts={name: round(size) for name, size in need._asdict().items()},
        )
        for device, need in plan.need.items()
    ]
    step: dict[str, Any] = dict(tokens=plan.length, chunk_batch=plan.chunk_batch)
    step |= dict(documents=plan.documents, flops=plan.flops)
    step |= dict(pipeline=plan.pipeline, speedup=plan.speedup)
    most = dict(longest=plan.longest, capacity=plan.capacity, most_chunks=plan.most_chunks)
    return dict(fits=plan.fits, devices=devices) | step | most


def describe_pipeline(plan: Plan) -> str:
    """What the devices of one process gain by working at the same time."""
    if len(plan.need) == 1:
        return ""
    faster = f"{plan.speedup:.2f} times as fast"
    if plan.pipeline:
        return f" of one device; train.pipeline is expected to be {faster}"
    return f"; the devices work in turn (with train.pipeline true: {faster}, expected)"


def device_tables(plan: Plan, console: Console) -> list[Table]:
    """The figures of every device in GiB: one table with a row per device if that fits the
    console, else tables with a column per device."""
    devices = []
    for device, need in plan.need.items():
        available = plan.available[device]
        devices.append(
            (
                str(device),
                *(f"{size / 2**30:.2f}" for size in (*need, need.total)),
                f"{available / 2**30:.2f}" if available else "not here",
                "yes" if need.total <= available else "NO",
            )
        )
    table = Table()
    for name in ("device", *FIGURES):
        table.add_column(name, justify="left" if name == "device" else "right")
    for cells in devices:
        table.add_row(*cells)
    unlimited = console.options.update(max_width=10**4)
    if console.measure(table, options=unlimited).maximum <= console.width:
        return [table]
    most = max(1, (console.width - NAME_WIDTH) // DEVICE_WIDTH)
    tables = []
    for start in range(0, len(devices), most):
        table = Table("device")
        shown = devices[start : start + most]
        for name, *_ in shown:
            table.add_column(name, justify="right", no_wrap=True)
        for name, *figures in zip(FIGURES, *(cells[1:] for cells in shown), strict=True):
            table.add_row(name, *figures)
        tables.append(table)
    return tables


def print_plan(plan: Plan, documents: int, steps: int, console: Console) -> None:
    """Prints the plan. documents: of one step; steps: of a run; both with one process."""
    together = (
        "a document of" if plan.documents == 1 else f"{plan.documents} documents at once, of up to"
    )
    console.print(
        f"one training step: {together} {plan.length:,} tokens, chunk_batch {plan.chunk_batch} "
        "(GiB)",
        style="italic",
        highlight=False,
    )
    for table in device_tables(plan, console):
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
    per_step = f"{documents} document{'s' * (documents > 1)}"
    console.print(
        f"a step uses {per_step} in every process; with one process the run has {steps:,} steps"
    )
    console.print(
        f"useful FLOPs of a document: {plan.flops / 1e12:,.3g} TFLOP, {plan.flops / speed:,.3g} s "
        f"at an actual speed of 100 {unit}{describe_pipeline(plan)}"
    )
    if not all(plan.available.values()):
        console.print(
            "this machine lacks a GPU that the device_map names; --device_memory 24GiB,24GiB plans "
            "for another machine"
        )
