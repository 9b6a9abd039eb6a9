"""The whole state of a training run, on disk, so that a stopped run goes on bit for bit.

<run folder>/checkpoints/step-00000120/
    memory_config.json, tokens.safetensors, encoder/, decoder/    the weights, as in
                                weights/adapters.py: load_ckp and PEFT read them
    optimizer.safetensors       AdamW's "<parameter>.step", ".exp_avg", ".exp_avg_sq"
    state.json                  iteration (documents, the number in the folder's name), counters,
                                the resolved configs and their hash, versions
    rank-0.json                 place in the data, and the first process's global random generators
    checksums.json              sha256 of every file

The learning rate follows from the iteration, and what is random about a document from the seed
and its number in the data: no other process has anything of its own, so a run may go on with
more or fewer of them. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
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
from uiollms.model.memory_lm import MemoryLM
from uiollms.training.schedule import Counts, Schedule
from uiollms.weights.adapters import load_weights, write_weights
from uiollms.weights.fitness import not_finite

STEP = re.compile(r"step-(\d{8,})")
NEEDED = (
    "state.json",
    "rank-0.json",
    "optimizer.safetensors",
    "tokens.safetensors",
    "memory_config.json",
)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")

# Fields that may differ when a run goes on: they move, measure, share out or end it. Every change
# is logged.
MAY_CHANGE = {
    *(
        f"model.{name}"
        for name in ("config", "model_method", "save_ckp", "load_ckp", "released_ckp", "device_map")
    ),
    "model.attn_implementation",
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
        )
    ),
    *(
        f"train.{name}"
        for name in ("keep_last", "keep_best", "max_bad_steps", "chunk_parallel", "chunk_ranks")
    ),
    "train.accum_grad",  # with it, another number of processes takes as many documents a step
    "test",
}

Count = Annotated[int, Field(ge=0)]
Generator = tuple[int, tuple[int, ...], float | None]  # what random.Random.getstate gives


class CheckpointInfo(Checked):
    """state.json. config and compressor: all fields written out; tokenizer: a hash of what it
    does; environment: versions, dtype and device, for the log. counts, documents: of the run's
    schedule; a folder that names neither was written before documents were counted. borders:
    between the run's stages, in iterations."""

    format: Literal[1] = 1
    iteration: Count
    counts: Counts = "steps"
    documents: Annotated[int, Field(gt=0)] = 1
    borders: tuple[Count, ...] = ()
    skipped_steps: Count
    bad_in_a_row: Count
    config: EnvConfig
    compressor: MemoryConfig
    config_hash: str
    tokenizer: str
    environment: dict[str, str | None]

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.config.train, self.documents, self.counts, self.borders)


class ResumePoint(Checked):
    """rank-0.json. python, numpy, torch, cuda: the global generators (torch's in hex); samples:
    place in the data."""

    python: Generator
    numpy: tuple[str, tuple[int, ...], Annotated[int, Field(ge=0, le=624)], int, float]
    torch: str
    cuda: tuple[str, ...]
    samples: dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """What `ResumePoint` holds, as the libraries give it."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]
    samples: dict[str, Any]


@dataclass
class TrainingState:
    """All that a run changes as it goes on. iteration: documents (or steps: schedule.py) done,
    those of skipped steps included; skipped_steps: steps whose loss or gradient was not finite;
    bad_in_a_row: those since the last good one."""

    model: MemoryLM
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.AdamW
    samples: SampleStream
    iteration: int = 0
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    mark: Mark | None = None  # of the last whole step

    def advance(self, iteration: int, good: bool) -> None:
        """Count a step, taken (`good`) or skipped, after which so many iterations are done. From
        here to the next call this step can be saved, whatever the one that follows has drawn by
        then."""
        self.iteration = iteration
        self.skipped_steps += not good
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        self.set_mark()

    def set_mark(self) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        place = self.samples.state_dict()
        self.mark = Mark(
            random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, place
        )


# ---- what may change -----------------------------------------------------------------------------


def fields_of(config: EnvConfig, compressor: MemoryConfig) -> dict[str, Any]:
    """ "train.max_lr" -> its value, for every field of both files."""
    found: dict[str, Any] = {
        f"compressor.{name}": value for name, value in compressor.model_dump().items()
    }
    for section, value in config.model_dump().items():
        found |= (
            {f"{section}.{name}": v for name, v in value.items()}
            if isinstance(value, dict)
            else {section: value}
        )
    return found


def config_hash(config: EnvConfig, compressor: MemoryConfig) -> str:
    """Of the fields that make a run what it is; equal hashes may go on with each other's
    checkpoints."""
    fixed = {
        name: value
        for name, value in sorted(fields_of(config, compressor).items())
        if name not in MAY_CHANGE
    }
    return hashlib.sha256(json.dumps(fixed).encode()).hexdigest()


def check_same_run(
    record: CheckpointInfo, config: EnvConfig, compressor: MemoryConfig, path: Path
) -> list[str]:
    """The fields that have changed since the checkpoint and may, one line each. Raises
    ConfigError with a line for each of those that may not."""
    old, new = fields_of(record.config, record.compressor), fields_of(config, compressor)
    changes = {
        name: f"{name}: {shown(old[name])} -> {shown(new[name])}"
        for name in new
        if old[name] != new[name]
    }
    faults = [
        f"{path}: {line}: the run cannot go on with another one; put it back, or start a new run "
        f"with model.load_ckp = {path}"
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
    """Write checkpoints/step-<iteration>; it has that name only once all of it is on the disk.
    Raises ConfigError if it cannot be written; nothing of it stays then, and what was there
    before is untouched."""
    record = CheckpointInfo(
        iteration=state.iteration,
        counts=schedule.counts,
        documents=schedule.documents,
        borders=schedule.borders,
        skipped_steps=state.skipped_steps,
        bad_in_a_row=state.bad_in_a_row,
        config=config,
        compressor=compressor,
        config_hash=config_hash(config, compressor),
        tokenizer=tokenizer_fingerprint(state.tokenizer),
        environment=environment,
    )
    path = folder / f"step-{state.iteration:08d}"
    before = saved_steps(folder)
    remedy = f"; {before[-1].name} is whole: make room, then go on with --resume" if before else ""
    with reporting_write_errors(path, remedy), atomic_folder(path) as work:
        write_weights(state.model, work)
        save_file(optimizer_tensors(state), work / "optimizer.safetensors")
        (work / "state.json").write_text(record.model_dump_json(indent=1), encoding="utf-8")
        position = position_of(state).model_dump_json()
        (work / "rank-0.json").write_text(position, encoding="utf-8")
        write_checksums(work)
    return path


def optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    names = list(state.model.trainable_parameters())
    saved = state.optimizer.state_dict()["state"]
    return {
        f"{names[i]}.{key}": t.cpu().contiguous()
        for i, entry in saved.items()
        for key, t in entry.items()
    }


def position_of(state: TrainingState) -> ResumePoint:
    if state.mark is None:
        state.set_mark()
    mark = state.mark
    assert mark is not None
    algorithm, numbers, *rest = mark.numpy
    return ResumePoint(
        python=mark.python,
        numpy=(algorithm, tuple(int(n) for n in numbers), *rest),
        torch=hex_of(mark.torch),
        cuda=tuple(hex_of(generator) for generator in mark.cuda),
        samples=mark.samples,
    )


def hex_of(generator: Tensor) -> str:
    return generator.numpy().tobytes().hex()


def seed_generators(seed: int) -> None:
    """The global generators: nothing here draws from them, but libraries may."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- load ----------------------------------------------------------------------------------------


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; one that is being written, or deleted, has another
    name."""
    found = (
        [path for path in folder.iterdir() if STEP.fullmatch(path.name)] if folder.is_dir() else []
    )
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    match = STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def read_record(path: Path) -> CheckpointInfo:
    """state.json of a checkpoint, all of whose files are checked first. Raises ConfigError
    naming what is wrong."""
    if not (path / "state.json").exists():
        raise ConfigError(
            f"{path}: no training state is here (state.json); weights alone can be a new run's "
            "model.load_ckp"
        )
    verify_checksums(path, NEEDED)
    return parse(CheckpointInfo, read_json(path / "state.json"), path / "state.json")


def load_state(state: TrainingState, path: Path, record: CheckpointInfo) -> None:
    """Put everything of a checkpoint back. Raises ConfigError if it does not fit the model, the
    tokenizer or the data."""
    position = parse(ResumePoint, read_json(path / "rank-0.json"), path / "rank-0.json")
    if record.tokenizer != tokenizer_fingerprint(state.tokenizer):
        raise ConfigError(
            f"{path}: the run's vocabulary was another one: {record.config.model.model_name} has "
            "changed since"
        )
    load_weights(state.model, path)
    try:
        load_optimizer(state, load_file(path / "optimizer.safetensors"))
        state.samples.load_state_dict(position.samples)
        random.setstate(generator_state(position.python))
        algorithm, numbers, place, has_gauss, gauss = position.numpy
        np.random.set_state(
            (algorithm, np.array(numbers, dtype=np.uint32), place, has_gauss, gauss)
        )
        torch.set_rng_state(generator_of(position.torch))
        for device, generator in enumerate(position.cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(generator_of(generator), device)
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
        raise ConfigError(f"{path}: not the state of such a run ({reason})") from None
    state.iteration, state.skipped_steps = record.iteration, record.skipped_steps
    state.bad_in_a_row = record.bad_in_a_row


def share_state(state: TrainingState, world: Group) -> None:
    """What the first process has, fresh or loaded, to all."""
    if world.size == 1:
        return
    weights = {name: tensor.cpu() for name, tensor in state.model.memory_state_dict().items()}
    counters = state.iteration, state.skipped_steps, state.bad_in_a_row
    weights, moments, place, counters = world.broadcast(
        (weights, optimizer_tensors(state), state.samples.state_dict(), counters)
    )
    state.model.load_memory_state_dict(weights)
    load_optimizer(state, moments)
    state.samples.load_state_dict(place)
    state.iteration, state.skipped_steps, state.bad_in_a_row = counters


def load_optimizer(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    parameters = state.model.trainable_parameters()
    entries: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(parameters.items()):
        entry = {key: tensors.pop(f"{name}.{key}") for key in MOMENTS if f"{name}.{key}" in tensors}
        if not entry:  # it has had no gradient yet
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


def generator_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
