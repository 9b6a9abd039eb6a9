"""Check a config before a model or a corpus is downloaded. Each command checks everything that it
will read and write, and reports all faults together, one line each.

Of the base model only its config (a few kilobytes) may be downloaded for this, not its weights.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from uiollms.build import (
    Entries,
    corpus_field,
    data_entries,
    examine_entries,
    examine_model,
    examine_stages,
    examine_training_dtype,
    find_weights,
    stage_entries,
    task_field,
)
from uiollms.config.corpora import CorpusEntry, TaskEntry
from uiollms.config.load import load_tasks
from uiollms.config.sections import EnvConfig, MemoryConfig
from uiollms.data import find_corpus
from uiollms.data.builder import entry_plugin, task_fault
from uiollms.data.chat import check_template
from uiollms.data.readers.hub import HubDataset, HubSplit
from uiollms.data.readers.hub_stream import HubStream
from uiollms.distributed.device_map import (
    check_local_gpus,
    first_device,
    resolve_map,
    this_machine,
)
from uiollms.evaluation.instances import accepted_kinds
from uiollms.files.atomic import make_folder, read_whole, recover, reporting_write_errors
from uiollms.files.errors import ConfigError, Faults
from uiollms.files.folders import run_folder
from uiollms.files.reading import check_tree
from uiollms.kernels.flash_attention import check_request
from uiollms.kernels.quantized import missing_package
from uiollms.runs.run_files import (
    RUN_FILES,
    TEST_RESULTS,
    check_run_folder,
    check_save_path,
    locked,
)
from uiollms.runs.trackers import tracker_fault
from uiollms.training.estimators import configured_estimator
from uiollms.training.schedule import Schedule
from uiollms.weights.adapters import check_compressor, check_target
from uiollms.weights.base_models import KNOWN_SHAPES, hub_reachable, load_pretrained, resolve_dtype
from uiollms.weights.packaged import package_folder

ENDING = 10.0  # seconds that a run which is stopping may need for its last checkpoint


def check_training(config: EnvConfig, path: str | Path, resumes: bool = False) -> MemoryConfig:
    """Checks everything that train.py reads and writes, and returns the compressor config. With
    `resumes` the schedule is left out, because it depends on the checkpoint. Raises ConfigError
    with a line for every fault."""
    faults = Faults()
    memory, shape = examine_model(config, path, faults)
    examine_training_dtype(config, path, faults)
    entries = data_entries(config)
    examine_entries(entries, memory, shape, path, faults)
    with faults.collect(f"{path}: train.estimator: "):
        configured_estimator(config.train)
    examine_stages(config, memory, shape, path, faults)
    for number in range(len(config.train.stages)):
        entries = {**entries, **stage_entries(config, number)}
    examine_data(entries, config.model.model_name, path, faults)
    examine_base(config, shape, path, faults)
    with faults.collect(f"{path}: model.load_ckp: "):
        check_weights(config.model.load_ckp, memory, any_sizes=True)
    folder = run_folder(config.train.run_dir, config.model.save_ckp, path)
    usable = examine_run_folder(folder, RUN_FILES, path, faults)
    for tracker in config.train.log_with:
        if fault := tracker_fault(tracker):
            faults.add(f'{path}: train.log_with: "{tracker}": {fault}')
    if save_ckp := config.model.save_ckp:
        where = f"{path}: model.save_ckp: "
        with faults.collect(where), reporting_write_errors(save_ckp):
            if usable:
                check_save_path(Path(save_ckp), folder)
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


def check_evaluation(
    config: EnvConfig, path: str | Path, env_conf_tasks: bool
) -> tuple[TaskEntry, ...]:
    """Checks everything that test.py reads and writes, and returns the tasks: those of
    `train.tasks` with `env_conf_tasks`, else those of the file that the field `test` names. Raises
    ConfigError with a line for every fault."""
    faults = Faults()
    memory, shape = examine_model(config, path, faults)
    tasks, file, prefix = config.train.tasks, path, "train.tasks"
    if not env_conf_tasks:
        tasks, file, prefix = (), config.test, "tasks"
        with faults.collect():
            tasks = load_tasks(config.test, path)
    elif not tasks:
        faults.add(f"{path}: train.tasks: is empty, there is nothing to evaluate")
    entries = {f"{prefix}[{i}]": task for i, task in enumerate(tasks)}
    examine_entries(entries, memory, shape, file, faults)
    examine_data(entries, config.model.model_name, file, faults)
    examine_base(config, shape, path, faults)
    weights = find_weights(config)
    field = next(
        field
        for field in ("save_ckp", "load_ckp", "released_ckp")
        if getattr(config.model, field) == weights
    )
    with faults.collect(f"{path}: model.{field}: "):
        check_weights(weights, memory, any_sizes=weights == config.model.load_ckp)
    folder = run_folder(config.train.run_dir, config.model.save_ckp, path)
    examine_run_folder(folder, TEST_RESULTS, path, faults)
    faults.report()
    return tasks


def examine_data(entries: Entries, model_name: str, path: str | Path, faults: Faults) -> None:
    """Finds files and packages that are missing, datasets that can neither be read nor downloaded,
    tasks for which a corpus has no documents, and conversations for a model whose tokenizer has no
    chat template. Only for conversations the tokenizer is loaded."""
    for where, entry in entries.items():
        field, name = corpus_field(entry)
        try:
            corpus, arguments = find_corpus(name, entry.corpus_options)
            needed = corpus.sources_read(*arguments)
        except ConfigError as error:
            faults.add(f"{path}: {where}.{field}: {error}")
            continue
        missing = False
        for source in needed:
            message = source.missing()
            if (
                isinstance(source, HubDataset | HubSplit | HubStream)
                and source.local_folder() is None
            ):
                message = message and (
                    None
                    if hub_reachable()
                    else f"{message}, and {constants.ENDPOINT} cannot be reached"
                )
            if message:
                missing = True
                faults.add(f"{path}: {where}.{field}: {message}")
        if not missing:
            with faults.collect(f"{path}: {where}.{field}: "):
                if corpus.has_messages(*arguments):
                    tokenizer = load_pretrained(AutoTokenizer, model_name)
                    check_template(tokenizer, model_name, f"corpus {name!r}: ")
        try:
            plugin = entry_plugin(entry)
        except ConfigError as error:
            faults.add(f"{path}: {where}.{task_field(entry)}: {error}")
            continue
        if isinstance(entry, CorpusEntry) and entry.task and not corpus.mixed_tasks:
            kind = "synthetic recall" if any(corpus.chunk_range(*arguments)) else corpus.task
            if fault := task_fault(entry.task, kind, plugin):
                faults.add(f"{path}: {where}.task: corpus {name!r} {fault}")
        if isinstance(entry, TaskEntry) and not corpus.mixed_tasks:
            kinds = accepted_kinds(entry.task_type, plugin)
            if corpus.task not in kinds:
                faults.add(
                    f"{path}: {where}: corpus {name!r} has documents for {corpus.task}, task_type "
                    f"{entry.task_type!r} takes documents for {' or '.join(kinds)}"
                )


def examine_base(config: EnvConfig, shape: Any, path: str | Path, faults: Faults) -> None:
    """Checks, without a download, that the base model is available and that this machine has the
    devices, dtypes and kernels that the config sets."""
    model = config.model
    if model.model_name.startswith("package:"):
        with faults.collect():
            package_folder(model.model_name.removeprefix("package:"))
    elif model.model_name in KNOWN_SHAPES and not hub_reachable():  # its shape came from a table
        with faults.collect():
            load_pretrained(AutoConfig, model.model_name)
    if model.quantization and (fault := missing_package()):
        faults.add(f'{path}: model.quantization: "{model.quantization}": {fault}')
    if model.offload_dir is not None:
        with faults.collect(f"{path}: model.offload_dir: "):
            check_folder(Path(model.offload_dir), Path(model.offload_dir))
    dtype = resolve_dtype(model.model_dtype, first_device(model.device_map))
    with faults.collect():
        check_request(
            model.attn_implementation,
            f"{path}: model.attn_implementation",
            dtype,
            model.device_map,
            shape,
        )
    with faults.collect():
        check_local_gpus(model.device_map, path, torch.cuda.device_count())
        if shape is not None and isinstance(model.device_map, dict | int):
            with torch.device("meta"):
                base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
            resolve_map(base, model.device_map, path, this_machine(model.device_map))


def check_weights(
    weights: str | None, memory: MemoryConfig | None, any_sizes: bool = False
) -> None:
    """Raises ConfigError if the weights to be loaded do not exist or were trained with another
    compressor. any_sizes: its sizes may differ, as for weights from which training starts."""
    if weights is not None:
        read_whole(Path(weights), lambda path: examine_weights(path, memory, any_sizes))


def examine_weights(path: Path, memory: MemoryConfig | None, any_sizes: bool) -> None:
    """Checks one version of a file or folder of weights, for `check_weights`."""
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
            f"{path}: is no checkpoint: it is neither a .pth file nor a folder with "
            "memory_config.json; give the path of one that train.py or save_pretrained wrote"
        )
    if memory:
        try:
            check_compressor(path, memory, any_sizes)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None


def examine_run_folder(
    folder: Path, names: tuple[str, ...], path: str | Path, faults: Faults
) -> bool:
    """Checks that a run can write its files `names` into a folder, without replacing files that no
    run has written. Returns whether the folder can exist at all. `path` is that of the config."""
    usable = False
    with faults.collect(f"{path}: train.run_dir: "):
        check_folder(folder, folder)
        usable = True
        check_run_folder(folder, names)
    return usable


def check_folder(folder: Path, shown: Path) -> None:
    """Raises ConfigError if a folder can neither be written nor created, without creating it.
    `shown` is its name in the message."""
    with reporting_write_errors(shown):
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise ConfigError(
            f"{shown}: cannot be written (Not a directory: {existing}); choose another path"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{shown}: cannot be written (no permission to write in {existing}); choose another "
            "path"
        )


def check_can_save(save_ckp: str | None, stack: ExitStack) -> None:
    """Locks the path of the weights until `stack` is closed, and checks that they can be written,
    before training rather than at the first save. Raises ConfigError."""
    if save_ckp is not None:
        with reporting_write_errors(save_ckp):
            path = Path(os.path.realpath(save_ckp))
            make_folder(path.parent)
            fault = "another run saves its weights here; choose another model.save_ckp"
            lock = path.with_name(f".{path.name}-lock")
            stack.enter_context(locked(lock, f"{save_ckp}: {fault}", ENDING))
            recover(path)
            check_target(Path(save_ckp))
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-").close()
