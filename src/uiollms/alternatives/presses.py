"""Presses of kvpress, which compress the raw context's keys and values without training.

kvpress (0.5.5) needs transformers below 5.3 and replaces attention functions when it is imported,
so it runs in a process of its own (press_worker.py), in an environment that `make setup-kvpress`
creates. The two processes exchange a folder:

    jobs.json             base: folder of the base model; dtype, device, threads; press: its class;
                          arguments: of its constructor; slots: of every job; measured: the job
                          whose cost is measured, or null; steps: tokens that are then decoded
    jobs.safetensors      `<job>.context` [T] and `<job>.row` [R], token ids; `<job>.scored` [N],
                          positions in the row
    results.safetensors   `<job>` [N, D], the base's normed hidden states at the scored positions
    results.json          slots: how many every job kept; cost: the numbers of `Cost`, or null

Shapes: T tokens of a context, R tokens of a row, N scored tokens of a row, D hidden size.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.alternatives.costs import Cost, measured_row, num_steps
from uiollms.alternatives.raw_tokens import context_of
from uiollms.config.modes import parse_press
from uiollms.data.sample import Row, Sample
from uiollms.files.folders import shipped_dir
from uiollms.model.memory_lm import MemoryLM

VARIABLE = "UIOLLMS_KVPRESS"  # the environment's folder, or its Python
FOLDER = ".venv-kvpress"
WORKER = Path(__file__).with_name("press_worker.py")


class PressFailure(Exception):
    """Why a press gave no numbers, in words for a table."""


def find_python() -> Path:
    """Returns the Python of an environment that has kvpress: that of the variable UIOLLMS_KVPRESS,
    else of the folder .venv-kvpress in the working directory or the checkout. Raises PressFailure
    if there is none."""
    named = os.environ.get(VARIABLE)
    folders = [Path(named)] if named else [Path(FOLDER), shipped_dir() / FOLDER]
    for folder in folders:
        python = folder / "bin" / "python" if folder.is_dir() else folder
        if python.is_file():
            return python.absolute()
    if named:
        raise PressFailure(f"{VARIABLE} is {named!r}, which is no environment and no Python")
    raise PressFailure(f"no environment with kvpress: run make setup-kvpress, or set {VARIABLE}")


@dataclass(frozen=True, eq=False)
class Pressed:
    """hidden: for every sample the hidden states [N, D] of its scored tokens, row after row; cost:
    that of the first sample, if it was measured."""

    hidden: list[Tensor]
    cost: Cost | None


class Presses:
    """Runs presses on one base, which is saved once for all of them."""

    def __init__(self, model: MemoryLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.folder: TemporaryDirectory[str] | None = None

    def base_folder(self) -> str:
        """Returns a folder with the base in the layout of transformers. It is removed with this
        object. Raises PressFailure if it cannot be written."""
        if self.folder is None:
            folder = TemporaryDirectory(prefix="uiollms-base-")
            try:
                self.model.base.save_pretrained(folder.name)
                self.tokenizer.save_pretrained(folder.name)
            except (OSError, SafetensorError) as error:
                raise PressFailure(f"the base could not be written for kvpress: {error}") from None
            self.folder = folder
        return self.folder.name

    def run(self, mode: str, samples: Sequence[Sample], measured: bool) -> Pressed:
        """Compresses the raw context of every scored row to as many slots as its memories have, and
        reads the row after it. measured: whether the cost of the first sample is measured too.
        Raises PressFailure without kvpress, and if the press or its process fails."""
        model, python = self.model, find_python()
        name, arguments = parse_press(mode)
        m, w = model.memory_config.num_memory, model.memory_config.recent_tokens
        samples = [sample.with_recent(w) for sample in samples]
        rows: list[tuple[Sample, Row]] = [
            (sample, row) for sample in samples for row in sample.rows if len(row.scored)
        ]
        tensors = {}
        for i, (sample, row) in enumerate(rows):
            tensors[f"{i}.context"] = context_of(sample, row).contiguous().clone()
            tensors[f"{i}.row"] = row.input_ids.contiguous().clone()
            tensors[f"{i}.scored"] = row.scored
        chosen = measured_row(samples[0]) if measured else None
        jobs = dict(
            base=self.base_folder(),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            threads=torch.get_num_threads(),
            press=name,
            arguments=arguments,
            slots=[row.num_memories * m for _, row in rows],
            measured=next((i for i, (_, row) in enumerate(rows) if row is chosen), None),
            steps=num_steps(chosen) if chosen else 0,
        )
        hidden, results = run_worker(python, jobs, tensors)
        by_sample: dict[int, list[Tensor]] = {id(sample): [] for sample in samples}
        for i, (sample, _) in enumerate(rows):
            by_sample[id(sample)].append(hidden[str(i)])
        cost = results["cost"] and Cost(
            **results["cost"],
            context=len(tensors[f"{jobs['measured']}.context"]),
            process="kvpress",
        )
        empty = torch.empty(0, model.config.hidden_size, dtype=model.dtype)
        return Pressed([torch.cat([empty, *by_sample[id(s)]]) for s in samples], cost)


def run_worker(
    python: Path, jobs: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Runs the worker. Returns the contents of results.safetensors and results.json. Raises
    PressFailure if it fails, with the last line of its errors or the signal that ended it."""
    with TemporaryDirectory(prefix="uiollms-press-") as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        save_file(tensors, folder / "jobs.safetensors")
        # -I: neither PYTHONPATH nor the worker's folder may shadow the environment's packages.
        found = subprocess.run(
            [python, "-I", WORKER, folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(jobs["threads"])},
        )
        if found.returncode < 0:
            ended = signal.Signals(-found.returncode).name
            why = "; the machine may lack memory" if ended == "SIGKILL" else ""
            raise PressFailure(f"{ended} ended the process of kvpress{why}")
        if found.returncode:
            lines = [line.strip() for line in found.stderr.splitlines() if line.strip()]
            why = lines[-1] if lines else f"exit code {found.returncode} without a message"
            raise PressFailure(f"the process of kvpress failed: {why}")
        return (
            load_file(folder / "results.safetensors"),
            json.loads((folder / "results.json").read_text(encoding="utf-8")),
        )
