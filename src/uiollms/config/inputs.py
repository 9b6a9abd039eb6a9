"""Find the files that a config names: in the working directory, else beside the config.

Every path that is found beside the config is logged. Files that a command writes are not looked up:
their paths always start from the working directory.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TypeVar

from uiollms.config.corpora import CorpusEntry, TaskEntry
from uiollms.config.sections import EnvConfig
from uiollms.files.atomic import whole_folder
from uiollms.files.folders import shipped_dir
from uiollms.files.globs import matching_files

log = logging.getLogger(__name__)
Entry = TypeVar("Entry", CorpusEntry, TaskEntry)
PATHS = ("config", "model_name", "load_ckp", "released_ckp")  # of `model`


def find_config(path: str | Path) -> Path:
    """The path of a config. A name such as smollm2-8x.json or config/experiments/learning.json that
    does not exist in the working directory is that of a config of this package, if there is one."""
    shipped = shipped_dir() / path
    first, *rest = Path(path).parts or ("",)
    if os.path.lexists(path) or (rest and first != "config") or not os.path.isfile(shipped):
        return Path(path)
    return shipped


def find_inputs(config: EnvConfig, path: str | Path) -> EnvConfig:
    """The config, which was read from `path`, with absolute paths for the inputs that exist beside
    it and not in the working directory: the compressor config, weights, a folder of the base, the
    task file, and the files of `files:` corpora."""
    folder = config_folder(path)
    model, train = config.model, config.train

    def found(name: str | None, field: str) -> str | None:
        beside = folder / (name or "")
        if not name or not os.path.exists(beside) or os.path.exists(name):
            return name
        # Weights whose folder is being replaced have another name for a moment.
        return name if whole_folder(Path(name)).exists() else reported(field, str(beside))

    paths = {name: found(getattr(model, name), f"model.{name}") for name in PATHS}
    corpora = tuple(with_found_files(entry, folder) for entry in train.corpus)
    stages = tuple(
        stage.model_copy(
            update={"corpus": tuple(with_found_files(entry, folder) for entry in stage.corpus)}
        )
        if stage.corpus
        else stage
        for stage in train.stages
    )
    tasks = tuple(with_found_files(task, folder) for task in train.tasks)
    return config.model_copy(
        update={
            "model": model.model_copy(update=paths),
            "test": found(config.test, "test"),
            "train": train.model_copy(update={"corpus": corpora, "stages": stages, "tasks": tasks}),
        }
    )


def config_folder(path: str | Path) -> Path:
    """The absolute path of the folder in which the inputs of a config are looked up: its own, or
    for a config of the package that was found by its name the one from which the name starts."""
    return Path(os.path.abspath(path)).parent if find_config(path) == Path(path) else shipped_dir()


def with_found_files(entry: Entry, folder: Path) -> Entry:
    """An entry of corpora or tasks whose `files:` pattern starts from `folder` if it matches files
    there and none in the working directory. Other entries do not change."""
    field = "task_name" if isinstance(entry, TaskEntry) else "name"
    name = getattr(entry, field)
    head, _, pattern = name.partition(":")
    pattern = pattern.strip()
    if "".join(head.lower().split()) != "files" or not pattern:
        return entry
    beside = str(folder / pattern)
    if beside == pattern or matching_files(pattern) or not matching_files(beside):
        return entry
    return entry.model_copy(update={field: f"files:{reported(name, beside)}"})


def reported(what: str, path: str) -> str:
    """Logs a path that was found beside the config, in one of several processes, and returns it."""
    if os.environ.get("RANK", "0") == "0":
        log.info("%s is read from %s", what, path)
    return path
