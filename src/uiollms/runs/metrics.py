"""Read and cut the lines of metrics.jsonl, measure a step's use of the machine, and name a line's
numbers for the trackers."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uiollms.files.atomic import replace_text
from uiollms.files.errors import ConfigError, json_path
from uiollms.files.json_files import as_json, replace_nonfinite
from uiollms.files.reading import read_bytes

MOST_METRICS = 2**30  # bytes, enough for millions of steps
# Fields of an evaluation that its task and corpus set.
CONSTANTS = ("truncation", "chunk_size", "num_memory", "documents", "scored_tokens")
ITERATIONS = "iterations"  # key in versions.json: what `iteration` counts, "documents" or "steps"


def iterations_of(versions: dict[str, Any]) -> str:
    """What the iterations of a run count, by its versions.json. Folders without this key are from
    earlier versions, which counted steps."""
    return versions.get(ITERATIONS, "steps")


def machine_use(tokens: int, seconds: float, gpus: Sequence[torch.device] = ()) -> dict[str, float]:
    """Speed and memory, which vary from machine to machine and from run to run.

    tokens_per_second: of a step with so many tokens, which all processes read, in so many seconds
    resident_gib:      the largest resident set that this process has had, in GiB
    gpu_gib:           the most memory that torch has allocated on one of `gpus`, in GiB; left out
                       if there are none
    """
    use = {"tokens_per_second": tokens / seconds, "resident_gib": peak_resident() / 2**30}
    if gpus:
        use["gpu_gib"] = max(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) / 2**30
    return use


def peak_resident() -> int:
    """The largest resident set that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class Line(BaseModel):
    """The fields of a line of metrics.jsonl that are read, with their types."""

    model_config = ConfigDict(strict=True)

    iteration: Annotated[int, Field(ge=0, lt=2**53)]
    seconds: Annotated[float, Field(ge=0)]
    nll: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    grad_norms: dict[str, float | None] = {}
    tokens: Annotated[int, Field(ge=0, lt=2**53)] = 0
    machine: dict[str, float | None] = {}
    skipped: list[str] = []
    eval: list[dict[str, Any]] = []


def examine_lines(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """Reads the JSON objects in the lines of a file. Returns (line number, object) for each, and a
    fault for every other line.

    A last line whose end is missing, because a process was killed or the disk was full, is
    dropped. NaN and infinite numbers become None.
    """
    objects, faults = [], []
    lines = read_bytes(path, MOST_METRICS).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = replace_nonfinite(json.loads(line))
        except (ValueError, RecursionError):  # no JSON, or part of a character
            value = None
        if isinstance(value, dict):
            objects.append((number, value))
        elif number < len(lines):  # only the last line has no line break at its end
            faults.append(f"line {number} is no JSON object")
    return objects, faults


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the JSON objects in the lines of a file, as `examine_lines` does. Raises ConfigError
    with a line for every fault."""
    return without_faults(path, *examine_lines(path))


def examine_metrics(run: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """Reads the lines of a run's metrics.jsonl, as `examine_lines` does. A line whose fields have
    other types is a fault, too."""
    objects, faults = examine_lines(run / "metrics.jsonl")
    valid = []
    for number, line in objects:
        try:
            Line.model_validate(line)
        except ValidationError as error:
            fault = error.errors()[0]
            faults.append(f"line {number}: {json_path(fault['loc'])}: {fault['msg']}")
        else:
            valid.append((number, line))
    return valid, faults


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Reads the lines of a run's metrics.jsonl. Raises ConfigError with a line for every fault."""
    return without_faults(run / "metrics.jsonl", *examine_metrics(run))


def without_faults(
    path: Path, lines: list[tuple[int, dict[str, Any]]], faults: list[str]
) -> list[dict[str, Any]]:
    if faults:
        raise ConfigError(
            "\n".join(f"{path}: {f}; remove it, or move the file away" for f in faults)
        )
    return [line for _, line in lines]


def cut_metrics(run: Path, iteration: int) -> float:
    """Removes the lines of metrics.jsonl after an iteration, so that a resumed run writes no line
    twice. Returns the seconds in the last line that stays, 0 if there is none."""
    path, kept = run / "metrics.jsonl", []
    if path.exists():
        kept = [line for line in read_metrics(run) if line["iteration"] <= iteration]
    replace_text(path, "".join(as_json(line) + "\n" for line in kept))
    return kept[-1]["seconds"] if kept else 0.0


def perplexities(run: Path) -> dict[int, float]:
    """The first task's perplexity with memory by the iteration at which it was evaluated."""
    found = {}
    for line in read_metrics(run):
        memory = line["eval"][0].get("memory") if line.get("eval") else None
        perplexity = memory.get("perplexity") if isinstance(memory, dict) else None
        if isinstance(perplexity, int | float):
            found[line["iteration"]] = perplexity
    return found


def scalars(line: dict[str, Any], protocol: str) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a line with their names in the trackers. `protocol` is that of the
    training loss. Numbers that are the same at every evaluation of a task are left out.

    a step          train/nll/paper, train/lr, train/grad_norm/all, train/grad_norm/encoder_lora,
                    train/tokens_per_second ...
    an evaluation   eval/0.perplexity.paper.sotu.test.2048/memory/perplexity ... (number and
                    name of the task, mode, measure)
    """
    named = {
        f"nll/{protocol}": line.get("nll"),
        "lr": line.get("lr"),
        "grad_norm/all": line.get("grad_norm"),
    }
    named |= {f"grad_norm/{part}": norm for part, norm in line.get("grad_norms", {}).items()}
    named |= line.get("machine", {})
    yield from ((f"train/{name}", number) for name, number in named.items() if number is not None)
    for i, result in enumerate(line.get("eval", [])):
        parts = (i, result["task_type"], result["protocol"], result["task"], result["truncation"])
        task = ".".join(
            str(part).replace("/", "_").replace(" ", "_") for part in parts if part is not None
        )
        for key, value in result.items():
            if key in CONSTANTS:
                continue
            measures = (
                {f"{key}/{name}": v for name, v in value.items()}
                if isinstance(value, dict)
                else {key: value}
            )
            for name, number in measures.items():
                if isinstance(number, int | float) and not name.endswith("/documents"):
                    yield f"eval/{task}/{name}", number
