"""What a config decides, decided before a model or a corpus is fetched: each command looks at
what it will read and write, and reports all faults together, one line each.

The base's own config may be asked of the hub for this (a few kilobytes), its weights are not.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

from uiollms.build import (
    Sources,
    corpus_of,
    examine_model,
    examine_sources,
    examine_stages,
    sources_of,
    stage_sources,
    weights_of,
)
from uiollms.config.corpora import CorpusEntry, TaskEntry
from uiollms.config.load import load_tasks
from uiollms.config.sections import EnvConfig, MemoryConfig
from uiollms.data import find_corpus
from uiollms.data.builder import task_fault
from uiollms.data.readers.hub import HubDataset, HubSplit
from uiollms.distributed.device_map import resolved, this_machine
from uiollms.evaluation.instances import ACCEPTED_KINDS
from uiollms.files.atomic import make_folder, read_whole, recover, reporting_write_errors
from uiollms.files.errors import ConfigError, Faults
from uiollms.files.folders import run_folder
from uiollms.files.reading import check_tree
from uiollms.kernels.flash_attention import check_request
from uiollms.runs.own_files import FILES, RESULTS, check_run_folder, check_save_place, held
from uiollms.training.schedule import Schedule
from uiollms.weights.adapters import check_compressor, check_target
from uiollms.weights.base_models import KNOWN_SHAPES, hub_reachable, load, resolve_dtype
from uiollms.weights.packaged import package_folder

ENDING = 10.0  # seconds that a run which was told to stop may still need for its last save


def check_training(config: EnvConfig, path: str | Path, resumes: bool = False) -> MemoryConfig:
    """Everything that train.py reads and writes; the compressor config. going_on: a checkpoint
    says what an iteration is. Raises ConfigError with a line for every fault."""
    faults = Faults()
    memory, shape = examine_model(config, path, faults)
    sources = sources_of(config)
    examine_sources(sources, memory, shape, path, faults)
    examine_stages(config, memory, shape, path, faults)
    for number in range(len(config.train.stages)):
        sources = {**sources, **stage_sources(config, number)}
    examine_data(sources, path, faults)
    examine_base(config, shape, path, faults)
    with faults.collect(f"{path}: model.load_ckp: "):
        check_weights(config.model.load_ckp, memory)
    folder = run_folder(config.train.run_dir, config.model.save_ckp, path)
    can_be = examine_run_folder(folder, FILES, path, faults)
    if save_ckp := config.model.save_ckp:
        where = f"{path}: model.save_ckp: "
        with faults.collect(where), reporting_write_errors(save_ckp):
            if can_be:
                check_save_place(Path(save_ckp), folder)
        with faults.collect(where), reporting_write_errors(save_ckp):
            check_target(Path(save_ckp))
        with faults.collect(where), reporting_write_errors(save_ckp):
            check_folder(Path(os.path.realpath(save_ckp)).parent, Path(save_ckp).parent)
    if not resumes:
        with faults.collect(f"{path}: "):
            Schedule(config.train, config.train.accum_grad)
    faults.report()
    assert memory is not None
    return memory


def check_evaluation(config: EnvConfig, path: str | Path, own_tasks: bool) -> tuple[TaskEntry, ...]:
    """Everything that test.py reads and writes; the tasks, of the config if `own_tasks`, else of
    the file that its `test` names. Raises ConfigError with a line for every fault."""
    faults = Faults()
    memory, shape = examine_model(config, path, faults)
    tasks, file, prefix = config.train.tasks, path, "train.tasks"
    if not own_tasks:
        tasks, file, prefix = (), config.test, "tasks"
        with faults.collect():
            tasks = load_tasks(config.test)
    elif not tasks:
        faults.add(f"{path}: train.tasks: is empty, there is nothing to evaluate")
    sources = {f"{prefix}[{i}]": task for i, task in enumerate(tasks)}
    examine_sources(sources, memory, shape, file, faults)
    examine_data(sources, file, faults)
    examine_base(config, shape, path, faults)
    weights = weights_of(config)
    fields = (
        field
        for field in ("save_ckp", "load_ckp", "released_ckp")
        if getattr(config.model, field) == weights
    )
    with faults.collect(f"{path}: model.{next(fields)}: "):
        check_weights(weights, memory)
    folder = run_folder(config.train.run_dir, config.model.save_ckp, path)
    examine_run_folder(folder, RESULTS, path, faults)
    faults.report()
    return tasks


def examine_data(sources: Sources, path: str | Path, faults: Faults) -> None:
    """Files and packages that are not here, datasets that cannot be had, tasks that a corpus has
    no documents for."""
    for where, entry in sources.items():
        field, name = corpus_of(entry)
        try:
            corpus, arguments = find_corpus(name)
            needed = corpus.sources_read(*arguments)
        except ConfigError as error:
            faults.add(f"{path}: {where}.{field}: {error}")
            continue
        for source in needed:
            message = source.missing()
            if isinstance(source, HubDataset | HubSplit) and source.local_folder() is None:
                message = message and (
                    None
                    if hub_reachable()
                    else f"{message}, and {constants.ENDPOINT} cannot be reached"
                )
            if message:
                faults.add(f"{path}: {where}.{field}: {message}")
        if isinstance(entry, CorpusEntry) and entry.task and not corpus.mixed_tasks:
            kind = "synthetic recall" if any(corpus.chunk_range(*arguments)) else corpus.task
            if fault := task_fault(entry.task, kind):
                faults.add(f"{path}: {where}.task: corpus {name!r} {fault}")
        if isinstance(entry, TaskEntry) and not corpus.mixed_tasks:
            kinds = ACCEPTED_KINDS.get(entry.task_type, (entry.task_type,))
            if corpus.task not in kinds:
                faults.add(
                    f"{path}: {where}: corpus {name!r} has documents for {corpus.task}, task_type "
                    f"{entry.task_type!r} takes documents for {' or '.join(kinds)}"
                )


def examine_base(config: EnvConfig, shape: Any, path: str | Path, faults: Faults) -> None:
    """Whether the base can be had, as far as that costs nothing, and computed where and as the
    config says."""
    model = config.model
    if model.model_name.startswith("package:"):
        with faults.collect():
            package_folder(model.model_name.removeprefix("package:"))
    elif model.model_name in KNOWN_SHAPES and not hub_reachable():  # its shape was not looked up
        with faults.collect():
            load(AutoConfig, model.model_name)
    if model.offload_dir is not None:
        with faults.collect(f"{path}: model.offload_dir: "):
            check_folder(Path(model.offload_dir), Path(model.offload_dir))
    dtype = resolve_dtype(
        model.model_dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    with faults.collect():
        check_request(
            model.attn_implementation,
            f"{path}: model.attn_implementation",
            dtype,
            model.device_map,
            shape,
        )
    if shape is not None and isinstance(model.device_map, dict | int):
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        with faults.collect():
            resolved(base, model.device_map, path, this_machine())


def check_weights(weights: str | None, memory: MemoryConfig | None) -> None:
    """Raises ConfigError for weights that are to be loaded and are not there, or not of this
    compressor."""
    if weights is not None:
        read_whole(Path(weights), lambda path: examine_weights(path, memory))


def examine_weights(path: Path, memory: MemoryConfig | None) -> None:
    """As `check_weights`, of a file or folder as it lies."""
    if not path.exists():
        raise ConfigError(
            f"{path}: no checkpoint can be read here: there is no such file or folder; give the "
            "path of one, or null"
        )
    check_tree(path)
    if path.suffix == ".pth":
        return
    if not (path / "memory_config.json").is_file():
        raise ConfigError(
            f"{path}: no checkpoint: neither a .pth file nor a folder with memory_config.json; "
            f"give the path of one that train.py or save_pretrained wrote"
        )
    if memory:
        try:
            check_compressor(path, memory)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None


def examine_run_folder(
    folder: Path, names: tuple[str, ...], path: str | Path, faults: Faults
) -> bool:
    """Whether a run can keep its files `names` in a folder, and nothing but a run's lies there;
    whether the folder can be at all. path: of the config."""
    before = len(faults.lines)
    with faults.collect(f"{path}: train.run_dir: "):
        check_folder(folder, folder)
    if len(faults.lines) > before:
        return False
    with faults.collect(f"{path}: train.run_dir: "):
        check_run_folder(folder, names)
    return True


def check_folder(folder: Path, shown: Path) -> None:
    """Raises ConfigError for a folder that cannot be written in, or made, without making it.
    shown: its name in the message."""
    with reporting_write_errors(shown):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(
            f"{shown}: cannot be written (Not a directory: {there}); choose another place"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{shown}: cannot be written (no permission to write in {there}); choose another place"
        )


def check_can_save(save_ckp: str | None, stack: ExitStack) -> None:
    """Raises ConfigError now, not at the first save; the place is this run's from here on."""
    if save_ckp is not None:
        with reporting_write_errors(save_ckp):
            path = Path(os.path.realpath(save_ckp))
            make_folder(path.parent)
            said = "another run saves its weights here; choose another model.save_ckp"
            lock = path.with_name(f".{path.name}-lock")
            stack.enter_context(held(lock, f"{save_ckp}: {said}", ENDING))
            recover(path)
            check_target(Path(save_ckp))
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-").close()
