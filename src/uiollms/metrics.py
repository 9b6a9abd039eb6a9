"""The lines of metrics.jsonl: what a step takes of the machine, and what its numbers are called in TensorBoard."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from uiollms.refusals import ConfigError

ITERATIONS = "iterations"  # in versions.json: what `iteration` counts, "documents" or "steps"


def iterations_of(versions: dict[str, Any]) -> str:
    """What a run's metrics count: run folders that do not say it were written when steps were counted."""
    return versions.get(ITERATIONS, "steps")


def machine_use(tokens: int, seconds: float) -> dict[str, float]:
    """What varies from machine to machine, and from run to run: tokens read in a step a second (all processes'), and the most
    memory that this process has held so far, in GiB: resident, and allocated by torch on the GPU where that is most."""
    use = {"tokens_per_second": tokens / seconds, "resident_gib": peak_resident() / 2**30}
    if torch.cuda.is_initialized():
        use["gpu_gib"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**30
    return use


def peak_resident() -> int:
    """Bytes of the largest resident set that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file, but for a last one that a killed process or a full disk left
    without its end. Raises ConfigError, with its number, for another line that is no JSON object."""
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or half a character
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif number < len(lines):  # the last has no line break behind it
            raise ConfigError(f"{path}: line {number} is no JSON object; remove it, or move the file away")
    return found


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, as `read_lines`."""
    return read_lines(run / "metrics.jsonl")


def scalars(line: dict[str, Any], protocol: str) -> Iterator[tuple[str, float]]:
    """The numbers of a line by their names in TensorBoard; protocol: of the training loss.

    a step          train/nll/paper, train/lr, train/grad_norm/all, train/grad_norm/encoder_lora, train/tokens_per_second ...
    an evaluation   eval/0.perplexity.paper.sotu.test.2048/memory/perplexity ...: the task's number and name, mode, measure
    """
    named = {f"nll/{protocol}": line.get("nll"), "lr": line.get("lr"), "grad_norm/all": line.get("grad_norm")}
    named |= {f"grad_norm/{part}": norm for part, norm in line.get("grad_norms", {}).items()}
    named |= line.get("machine", {})
    yield from ((f"train/{name}", number) for name, number in named.items() if number is not None)
    for i, result in enumerate(line.get("eval", [])):
        words = (i, result["task_type"], result["protocol"], result["task"], result["truncation"])
        task = ".".join(str(word).replace("/", "_").replace(" ", "_") for word in words if word is not None)
        for key, value in result.items():
            numbers = {f"{key}/{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
            yield from ((f"eval/{task}/{name}", v) for name, v in numbers.items() if isinstance(v, int | float))
