"""Send a run's numbers to wandb, trackio or mlflow through accelerate's trackers.

They are further copies of metrics.jsonl, so an error of a tracker causes one warning and the run
continues. Each tracker's own environment variables decide where its data goes (WANDB_MODE,
MLFLOW_TRACKING_URI, TRACKIO_DIR ...).
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import accelerate.utils

from uiollms.files.atomic import replace_text
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import as_json, read_json

log = logging.getLogger("uiollms")
IDS = "trackers.json"  # in the run folder: the tracker's name -> how the tracker finds the run
PROJECT = "uiollms"  # of wandb and trackio; mlflow's experiment
MLFLOW_FORBIDS = re.compile(r"[^/\w.\- :]")  # characters in the name of a metric


def tracker_fault(name: str) -> str | None:
    """Why a tracker of `train.log_with` cannot be used, or None if it can. TensorBoard is written
    by board.py, and its package is one that this package requires."""
    if name == "tensorboard":
        return None
    is_available = getattr(accelerate.utils, f"is_{name}_available", None)
    if is_available is None:
        version = importlib.metadata.version("accelerate")
        return f'accelerate {version} has no tracker "{name}"; run pip install -U accelerate'
    if not is_available():
        return f"the package {name} is not installed; run pip install {name}, or leave it out"
    return None


class Tracker:
    """A run in one of the trackers. If `folder` contains the identity of a run that is resumed, the
    tracker continues that run, else it begins a new one. `constants` are the hyperparameters."""

    def __init__(self, name: str, folder: Path, constants: Mapping[str, Any]) -> None:
        self.name, self.works = name, True
        settings: dict[str, Any]
        with self.reporting_errors():
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            ids = read_ids(folder)
            identity, project = ids.get(name), PROJECT
            number, settings = identity, {"name": folder.absolute().name}
            if name == "wandb":
                project = os.environ.get("WANDB_PROJECT", PROJECT)
                number = identity or secrets.token_hex(4)
                settings |= {"id": number, "resume": "allow", "dir": str(folder)}
            elif name == "trackio":  # finds a run by its name, which must be the run's own
                number = identity or f"{folder.absolute().name}-{secrets.token_hex(4)}"
                settings = {"name": number, "resume": "allow"}
            else:
                settings = {"run_id": identity, "run_name": folder.absolute().name}
            self.tracker = LOGGER_TYPE_TO_CLASS[name](project, **settings)
            if start := getattr(self.tracker, "start", None):  # older versions start by themselves
                start()
            if name == "mlflow":
                number = self.tracker.tracker.info.run_id
            if identity is None or name != "mlflow":  # mlflow cannot change those of a resumed run
                self.tracker.store_init_configuration(
                    {
                        key: json.dumps(value) if isinstance(value, list | tuple | dict) else value
                        for key, value in constants.items()
                    }
                )
            if identity is None:
                replace_text(folder / IDS, as_json({**ids, name: number}, indent=4) + "\n")

    def add(self, iteration: int, scalars: Iterable[tuple[str, float]]) -> None:
        """Logs the numbers of one iteration, given as (name, number)."""
        if not self.works:
            return
        with self.reporting_errors():
            values = dict(scalars)
            if self.name == "mlflow":
                values = {MLFLOW_FORBIDS.sub("_", name): value for name, value in values.items()}
            self.tracker.log(values, step=iteration)

    def close(self) -> None:
        """Ends the tracker's run, which may wait until its numbers are sent."""
        if self.works:
            with self.reporting_errors():
                self.tracker.finish()

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Turns any error of a block into a warning, after which nothing more is sent. What a
        tracker prints to stdout goes to stderr, because stdout may be the output of --json."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # no error of any kind is worth the run
            self.works = False
            reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
            effect = f"the run continues without {self.name}, metrics.jsonl has all numbers"
            log.warning("%s: cannot be used (%s); %s", self.name, reason, effect)


def read_ids(folder: Path) -> dict[str, str]:
    """The contents of trackers.json, {} if there is none. Raises ConfigError for other JSON."""
    path = folder / IDS
    if not path.exists():
        return {}
    ids = read_json(path)
    if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
        raise ConfigError(f"{path}: expected an object of trackers and names of runs; remove it")
    return ids
