"""The whole state of a training run on disk, from which a stopped run continues bit for bit.

<run folder>/checkpoints/step-00000120/
    memory_config.json, tokens.safetensors, encoder/, decoder/    the weights, as in
                                weights/adapters.py; load_ckp and PEFT read them
    optimizer.safetensors       AdamW's "<parameter>.step", ".exp_avg", ".exp_avg_sq"
    state.json                  iteration (documents; the number in the folder's name), counters,
                                the resolved configs and versions
    rank-0.json                 the position in the data, and the global random generators of the
                                first process
    checksums.json              sha256 of every file

The learning rate follows from the iteration. What is random about a document follows from the seed
and the document's number in the data. So the other processes have no state of their own, and a run
may be resumed with more or fewer of them. Nothing is pickled.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import Checked
from uiollms.config.load import parse
from uiollms.config.sections import EnvConfig, MemoryConfig
from uiollms.data.mixture import generator_state
from uiollms.data.readers.beacons import tokenizer_fingerprint
from uiollms.data.stream import SampleStream
from uiollms.distributed.groups import Group
from uiollms.files.atomic import (
    atomic_folder,
    reporting_write_errors,
    verify_checksums,
    write_checksums,
)
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import read_json
from uiollms.kernels.devices import gpus_of
from uiollms.model.memory_lm import MemoryLM
from uiollms.training.schedule import Counts, Schedule
from uiollms.weights.adapters import load_weights, write_weights
from uiollms.weights.fitness import not_finite

STEP = re.compile(r"step-(\d{8,})")
REQUIRED = (
    "state.json",
    "rank-0.json",
    "optimizer.safetensors",
    "tokens.safetensors",
    "memory_config.json",
)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")

# The fields that may differ when a run is resumed. They move files, evaluate, divide the work or
# end the run, but do not change what a step computes. Every change is logged.
MAY_CHANGE = {
    *(
        f"model.{name}"
        for name in (
            "config",
            "model_method",
            "save_ckp",
            "load_ckp",
            "released_ckp",
            "device_map",
            "attn_implementation",
        )
    ),
    *(
        f"train.{name}"
        for name in (
            "train_iters",
            "save",
            "eval",
            "tasks",
            "run_dir",
            "chunk_batch",
            "checkpointing",
            "pipeline",
            "compile_encoder",
            "keep_last",
            "keep_best",
            "log_with",
            "max_bad_steps",
            "chunk_parallel",
            "chunk_ranks",
            # Another number of processes needs another one for as many documents per step.
            "accum_grad",
        )
    ),
    "test",
}

Count = Annotated[int, Field(ge=0)]
PythonGenerator = tuple[int, tuple[int, ...], float | None]  # of random.Random.getstate


class CheckpointInfo(Checked):
    """The contents of state.json.

    counts, documents: of the run's schedule. Checkpoints from before documents were counted lack
        both fields.
    borders: the iterations at which the run's stages end, except the last
    config, compressor: with all defaults written out
    config_hash: read from checkpoints of earlier versions, and ignored
    tokenizer: a hash of the tokenizer
    environment: versions, dtype and device, which are logged if they have changed
    """

    format: Literal[1] = 1
    iteration: Count
    counts: Counts = "steps"
    documents: Annotated[int, Field(gt=0)] = 1
    borders: tuple[Count, ...] = ()
    skipped_steps: Count
    bad_in_a_row: Count
    config: EnvConfig
    compressor: MemoryConfig
    config_hash: Annotated[str, Field(exclude=True)] = ""
    tokenizer: str
    environment: dict[str, str | None]

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.config.train, self.documents, self.counts, self.borders)


class ResumePoint(Checked):
    """The contents of rank-0.json. python, numpy, torch, cuda: the states of the global random
    generators, torch's in hexadecimal digits, cuda's of the GPUs that the model uses; samples: the
    position in the data."""

    python: PythonGenerator
    numpy: tuple[str, tuple[int, ...], Annotated[int, Field(ge=0, le=624)], int, float]
    torch: str
    cuda: tuple[str, ...]
    samples: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """The values of `ResumePoint` as the libraries return them."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]
    samples: dict[str, Any]


@dataclass
class TrainingState:
    """Everything that a run changes while it trains.

    iteration: documents (or steps, see training/schedule.py) done, skipped steps included
    skipped_steps: steps whose loss or gradient was not finite
    bad_in_a_row: skipped steps since the last one that was not
    snapshot: generators and position in the data after the last whole step
    """

    model: MemoryLM
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.AdamW
    samples: SampleStream
    iteration: int = 0
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    snapshot: Snapshot | None = None

    def advance(self, iteration: int, finite: bool) -> None:
        """Counts a step that ended at `iteration`; it was skipped unless loss and gradient were
        `finite`. Until the next call this step can be saved, although the next one already draws
        documents and random numbers."""
        self.iteration = iteration
        self.skipped_steps += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        self.take_snapshot()

    def take_snapshot(self) -> None:
        cuda = [torch.cuda.get_rng_state(gpu) for gpu in gpus_of(self.model)]
        self.snapshot = Snapshot(
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            cuda,
            self.samples.state_dict(),
        )


# ---- what may change -----------------------------------------------------------------------------


def all_fields(config: EnvConfig, compressor: MemoryConfig) -> dict[str, Any]:
    """The value of every field of both configs by its name, such as "train.max_lr"."""
    fields = {f"compressor.{name}": value for name, value in compressor.model_dump().items()}
    for section, value in config.model_dump().items():
        if isinstance(value, dict):
            fields |= {f"{section}.{name}": v for name, v in value.items()}
        else:
            fields[section] = value
    return fields


def check_same_run(
    info: CheckpointInfo, config: EnvConfig, compressor: MemoryConfig, path: Path
) -> list[str]:
    """Describes the fields that have changed since the checkpoint, one line each. Raises
    ConfigError with a line for each of them that may not change."""
    old, new = all_fields(info.config, info.compressor), all_fields(config, compressor)
    changes = {
        name: f"{name}: {shown(old[name])} -> {shown(new[name])}"
        for name in new
        if old[name] != new[name]
    }
    faults = [
        f"{path}: {line}: a resumed run cannot change this; restore it, or start a new run with "
        f"model.load_ckp = {path}"
        for name, line in changes.items()
        if name not in MAY_CHANGE
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    return list(changes.values())


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}.."


# ---- save ----------------------------------------------------------------------------------------


def save_state(
    state: TrainingState,
    schedule: Schedule,
    folder: Path,
    config: EnvConfig,
    compressor: MemoryConfig,
    environment: dict[str, str | None],
) -> Path:
    """Writes the checkpoint step-<iteration> into `folder` and returns its path. It gets this name
    only after all of it is on the disk. Raises ConfigError if it cannot be written; the folder then
    has the same contents as before."""
    info = CheckpointInfo(
        iteration=state.iteration,
        counts=schedule.counts,
        documents=schedule.documents,
        borders=schedule.borders,
        skipped_steps=state.skipped_steps,
        bad_in_a_row=state.bad_in_a_row,
        config=config,
        compressor=compressor,
        tokenizer=tokenizer_fingerprint(state.tokenizer),
        environment=environment,
    )
    path = folder / f"step-{state.iteration:08d}"
    remedy = ""
    if before := saved_steps(folder):
        remedy = f"; {before[-1].name} is whole: free space, then continue with --resume"
    with reporting_write_errors(path, remedy), atomic_folder(path) as work:
        write_weights(state.model, work)
        save_file(optimizer_tensors(state), work / "optimizer.safetensors")
        (work / "state.json").write_text(info.model_dump_json(indent=1), encoding="utf-8")
        point = resume_point(state).model_dump_json()
        (work / "rank-0.json").write_text(point, encoding="utf-8")
        write_checksums(work)
    return path


def optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    """AdamW's state as "<parameter>.<key>" -> tensor, on the CPU."""
    names = list(state.model.trainable_parameters())
    saved = state.optimizer.state_dict()["state"]
    return {
        f"{names[i]}.{key}": t.cpu().contiguous()
        for i, entry in saved.items()
        for key, t in entry.items()
    }


def resume_point(state: TrainingState) -> ResumePoint:
    if state.snapshot is None:
        state.take_snapshot()
    snapshot = state.snapshot
    assert snapshot is not None
    algorithm, numbers, *rest = snapshot.numpy
    return ResumePoint(
        python=snapshot.python,
        numpy=(algorithm, tuple(int(n) for n in numbers), *rest),
        torch=to_hex(snapshot.torch),
        cuda=tuple(to_hex(generator) for generator in snapshot.cuda),
        samples=snapshot.samples,
    )


def to_hex(generator: Tensor) -> str:
    return generator.numpy().tobytes().hex()


def seed_generators(seed: int) -> None:
    """Seeds the global random generators. This package does not draw from them, but libraries
    may."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- load ----------------------------------------------------------------------------------------


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. A checkpoint that is being written or deleted has
    another name."""
    names = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in names if STEP.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The iteration in the name of a checkpoint, -1 for another name."""
    match = STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def read_info(path: Path) -> CheckpointInfo:
    """Reads state.json of a checkpoint after comparing all files with their checksums. Raises
    ConfigError that names the damaged or missing file."""
    if not (path / "state.json").exists():
        raise ConfigError(
            f"{path}: contains no training state (state.json); to start a new run from weights "
            "alone, set its model.load_ckp"
        )
    verify_checksums(path, REQUIRED)
    return parse(CheckpointInfo, read_json(path / "state.json"), path / "state.json")


def is_whole(path: Path) -> bool:
    """Whether `read_info` can read a checkpoint."""
    try:
        read_info(path)
    except ConfigError:
        return False
    return True


def load_state(state: TrainingState, path: Path, info: CheckpointInfo) -> None:
    """Restores the state from a checkpoint, whose state.json is `info`. Raises ConfigError if it
    does not fit the model, the tokenizer or the data."""
    point = parse(ResumePoint, read_json(path / "rank-0.json"), path / "rank-0.json")
    if info.tokenizer != tokenizer_fingerprint(state.tokenizer):
        raise ConfigError(
            f"{path}: the tokenizer of {info.config.model.model_name} has changed since the run "
            "saved this checkpoint"
        )
    load_weights(state.model, path)
    try:
        load_optimizer(state, load_file(path / "optimizer.safetensors"))
        state.samples.load_state_dict(point.samples)
        random.setstate(generator_state(point.python))
        algorithm, numbers, index, has_gauss, gauss = point.numpy
        np.random.set_state(
            (algorithm, np.array(numbers, dtype=np.uint32), index, has_gauss, gauss)
        )
        torch.set_rng_state(from_hex(point.torch))
        # The run may have been on more GPUs, or on fewer.
        for gpu, generator in zip(gpus_of(state.model), point.cuda, strict=False):
            torch.cuda.set_rng_state(from_hex(generator), gpu)
    except ConfigError:
        raise
    except (
        ArithmeticError,
        LookupError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{path}: its state does not fit this run ({reason})") from None
    state.iteration, state.skipped_steps = info.iteration, info.skipped_steps
    state.bad_in_a_row = info.bad_in_a_row


def share_state(state: TrainingState, world: Group) -> None:
    """Copies the state of the first process, new or loaded, to all others."""
    if world.size == 1:
        return
    weights = {name: tensor.cpu() for name, tensor in state.model.memory_state_dict().items()}
    counters = state.iteration, state.skipped_steps, state.bad_in_a_row
    weights, moments, position, counters = world.broadcast(
        (weights, optimizer_tensors(state), state.samples.state_dict(), counters)
    )
    state.model.load_memory_state_dict(weights)
    load_optimizer(state, moments)
    state.samples.load_state_dict(position)
    state.iteration, state.skipped_steps, state.bad_in_a_row = counters


def load_optimizer(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    """Restores AdamW's state from `optimizer_tensors`. Raises ValueError if a tensor has another
    shape, is not finite or belongs to no parameter."""
    parameters = state.model.trainable_parameters()
    entries: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(parameters.items()):
        entry = {key: tensors.pop(f"{name}.{key}") for key in MOMENTS if f"{name}.{key}" in tensors}
        if not entry:  # the parameter has had no gradient yet
            continue
        shapes = [list(entry[key].shape) if key in entry else None for key in MOMENTS]
        if shapes != [[], list(parameter.shape), list(parameter.shape)]:
            raise ValueError(
                f"optimizer.safetensors: {name}: shapes {shapes}, expected those of "
                f"{list(parameter.shape)}"
            )
        if key := not_finite(entry.items()):
            raise ValueError(f"optimizer.safetensors: {name}.{key} holds NaN or infinite numbers")
        entries[i] = entry
    if tensors:
        raise ValueError(f"optimizer.safetensors: {sorted(tensors)[0]} belongs to no parameter")
    state.optimizer.load_state_dict(
        {"state": entries, "param_groups": state.optimizer.state_dict()["param_groups"]}
    )


def from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
