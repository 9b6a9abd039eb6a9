"""Read the JSON files into typed sections. Nothing here loads a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from uiollms.config.corpora import Checked, TaskEntry
from uiollms.config.inputs import config_folder, find_config, find_inputs, with_found_files
from uiollms.config.partial import with_other_faults
from uiollms.config.sections import EnvConfig, MemoryConfig, TestFile
from uiollms.files.errors import ConfigError, describe_fault, shortened
from uiollms.files.folders import set_config_folder
from uiollms.files.json_files import DEEPEST, find_unusable, loads, read_json

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=Checked)


def parse(model: type[Model], value: Any, path: str | Path) -> Model:
    """Parses a JSON value into a typed object. Raises ConfigError with one line for each fault."""
    if fault := find_unusable(value):
        raise ConfigError(f"{path}: {fault}")
    try:
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        raise ConfigError(
            "\n".join(describe_fault(fault, model, path) for fault in error.errors())
        ) from None


def load_env_config(
    path: str | Path,
    overrides: list[str] | None = None,
    check: Callable[[EnvConfig], object] | None = None,
) -> EnvConfig:
    """Reads an environment config and apply `overrides`, strings such as "train.max_lr=3e-5" with
    values in JSON. Raises ConfigError with one line for each fault. It also reports the faults
    that `check` finds in the config without its faulty fields, so that all can be mended at once.

    A config of this package is found by its name. Inputs that do not exist in the working directory
    are looked up beside the config (config/inputs.py).
    """
    file = find_config(path)
    if file != Path(path):
        log.info("%s is read from %s", path, file)
    value = read_json(file if file != Path(path) else path)
    set_config_folder(config_folder(path))
    for override in overrides or []:
        apply_override(value, override, path)
    try:
        config = parse(EnvConfig, value, path)
    except ConfigError as error:

        def check_rest(rest: EnvConfig) -> None:
            assert check is not None
            check(find_inputs(rest, path))

        raise with_other_faults(error, EnvConfig, value, check and check_rest) from None
    return find_inputs(config, path)


def load_memory_config(path: str | Path) -> MemoryConfig:
    return parse(MemoryConfig, read_json(path), path)


def load_tasks(path: str | Path, env_conf: str | Path | None = None) -> tuple[TaskEntry, ...]:
    """Reads a task file. With `env_conf`, the config that names it, files of tasks that do not
    exist in the working directory are looked up beside that config."""
    value = read_json(path)
    tasks = parse(TestFile, {"tasks": value} if isinstance(value, list) else value, path).tasks
    if env_conf is None:
        return tasks
    return tuple(with_found_files(task, config_folder(env_conf)) for task in tasks)


def apply_override(value: Any, override: str, path: str | Path) -> None:
    """Sets one field of a JSON object in place. Raises ConfigError if no such field can exist.

    override: the field and its value in JSON, "train.corpus.0.truncation=2048"; a value that is
    not JSON is a string.
    """
    key, equals, text = override.partition("=")
    shown = f"--set {shortened(override)}"
    if not equals:
        raise ConfigError(f"{shown}: expected field=value, such as train.max_lr=3e-5")
    try:
        new = loads(text, f"--set {shortened(key)}")
    except json.JSONDecodeError:
        new = text
    *parents, last = key.split(".")
    if len(parents) >= DEEPEST:
        raise ConfigError(f"{shown}: {path} has no field so deep")
    for part in parents:
        try:
            value = value[int(part)] if isinstance(value, list) else value.setdefault(part, {})
        except (ValueError, IndexError, AttributeError):
            way = f"has no {shortened(part)!r} in the path {shortened(key)!r}"
            raise ConfigError(f"{shown}: {path} {way}") from None
    try:
        value[int(last) if isinstance(value, list) else last] = new
    except (ValueError, IndexError, TypeError):
        raise ConfigError(f"{shown}: {path} has no {shortened(key)!r}") from None
