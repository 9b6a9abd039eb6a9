"""The lines of metrics.jsonl: what a step takes of the machine, and what its numbers are called
in TensorBoard."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uiollms.files.atomic import replace_text
from uiollms.files.errors import ConfigError, json_path
from uiollms.files.json_files import as_json, replace_nonfinite
from uiollms.files.reading import read_bytes

MOST_METRICS = 2**30  # bytes: millions of steps
ITERATIONS = "iterations"  # in versions.json: what `iteration` counts, "documents" or "steps"


def iterations_of(versions: dict[str, Any]) -> str:
    """What a run's metrics count: run folders that do not say it were written when steps were
    counted."""
    return versions.get(ITERATIONS, "steps")


def machine_use(tokens: int, seconds: float) -> dict[str, float]:
    """What varies from machine to machine, and from run to run: tokens read in a step a second
    (all processes'), and the most memory that this process has held so far, in GiB: resident,
    and allocated by torch on the GPU where that is most."""
    use = {"tokens_per_second": tokens / seconds, "resident_gib": peak_resident() / 2**30}
    if torch.cuda.is_initialized():
        use["gpu_gib"] = (
            max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
            / 2**30
        )
    return use


def peak_resident() -> int:
    """Bytes of the largest resident set that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class Line(BaseModel):
    """A line of metrics.jsonl: what is read of it, and of which type that is."""

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
    """The JSON objects in the lines of a file, with their numbers, but for a last one that a
    killed process or a full disk left without its end; numbers that JSON does not know are None.
    And a sentence, with its number, for every other line that is no JSON object."""
    found, faults = [], []
    lines = read_bytes(path, MOST_METRICS).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = replace_nonfinite(json.loads(line))
        except (ValueError, RecursionError):  # no JSON, or half a character
            value = None
        if isinstance(value, dict):
            found.append((number, value))
        elif number < len(lines):  # the last has no line break behind it
            faults.append(f"line {number} is no JSON object")
    return found, faults


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file, as `examine_lines`. Raises ConfigError for
    another line."""
    return refused(path, *examine_lines(path))


def examine_metrics(run: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """The lines of a run's metrics.jsonl that are such, as `examine_lines`, and what is wrong
    with others."""
    found, faults = examine_lines(run / "metrics.jsonl")
    right = []
    for number, line in found:
        try:
            Line.model_validate(line)
        except ValidationError as error:
            fault = error.errors()[0]
            faults.append(f"line {number}: {json_path(fault['loc'])}: {fault['msg']}")
        else:
            right.append((number, line))
    return right, faults


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises ConfigError for one that is none."""
    return refused(run / "metrics.jsonl", *examine_metrics(run))


def refused(
    path: Path, found: list[tuple[int, dict[str, Any]]], faults: list[str]
) -> list[dict[str, Any]]:
    if faults:
        raise ConfigError(
            "\n".join(f"{path}: {f}; remove it, or move the file away" for f in faults)
        )
    return [line for _, line in found]


def cut_metrics(run: Path, iteration: int) -> float:
    """Leave the lines of metrics.jsonl up to an iteration, so that none stands twice; the
    seconds of the last."""
    path, kept = run / "metrics.jsonl", []
    if path.exists():
        kept = [line for line in read_metrics(run) if line["iteration"] <= iteration]
    replace_text(path, "".join(as_json(line) + "\n" for line in kept))
    return kept[-1]["seconds"] if kept else 0.0


def perplexities(run: Path) -> dict[int, float]:
    """Iteration -> the perplexity with memory of the first task that was evaluated there."""
    found = {}
    for line in read_metrics(run):
        memory = line["eval"][0].get("memory") if line.get("eval") else None
        perplexity = memory.get("perplexity") if isinstance(memory, dict) else None
        if isinstance(perplexity, int | float):
            found[line["iteration"]] = perplexity
    return found


def scalars(line: dict[str, Any], protocol: str) -> Iterator[tuple[str, float]]:
    """The numbers of a line by their names in TensorBoard; protocol: of the training loss.

    a step          train/nll/paper, train/lr, train/grad_norm/all, train/grad_norm/encoder_lora,
                    train/tokens_per_second ...
    an evaluation   eval/0.perplexity.paper.sotu.test.2048/memory/perplexity ...: the task's number
                    and name, mode, measure
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
        words = (i, result["task_type"], result["protocol"], result["task"], result["truncation"])
        task = ".".join(
            str(word).replace("/", "_").replace(" ", "_") for word in words if word is not None
        )
        for key, value in result.items():
            numbers = (
                {f"{key}/{name}": v for name, v in value.items()}
                if isinstance(value, dict)
                else {key: value}
            )
            yield from (
                (f"eval/{task}/{name}", v)
                for name, v in numbers.items()
                if isinstance(v, int | float)
            )
