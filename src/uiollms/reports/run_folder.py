"""Reads the files of a run folder, and notes what is missing or cannot be read."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from uiollms.build import find_weights
from uiollms.config.load import load_memory_config, parse
from uiollms.config.sections import EnvConfig, MemoryConfig
from uiollms.evaluation.attention_mass import AttentionMass
from uiollms.evaluation.results import TaskScores, TaskSummary
from uiollms.evaluation.saved_results import load_token_nlls
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import read_json, replace_nonfinite
from uiollms.files.reading import check_tree
from uiollms.runs.metrics import examine_metrics
from uiollms.runs.state import saved_steps

Part = TypeVar("Part")
ATTENTION_FILE = "attention.safetensors"
MAX_RESULTS = 100  # panels in a plot
# Errors that reading and showing a file can raise if somebody has edited it, or if it is not a
# run's. A ConfigError is a ValueError.
FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    SafetensorError,
    TypeError,
    ValueError,
)


@dataclass
class Missing:
    """A part that the report does not show, the reason, and the command that makes it ("" if there
    is none)."""

    what: str
    why: str
    command: str = ""


@dataclass
class RunFolder:
    """The files of a run folder as values.

    config, versions: of the training, or of the evaluation if the folder has no training
    results:   of test.py, or else of training's last evaluation
    evaluated: which evaluation the results are from
    nlls:      results with the scores of every token
    weights:   path of the weights that test.py evaluates
    missing:   the parts that are missing, with reasons
    """

    path: Path
    config: EnvConfig | None = None
    compressor: MemoryConfig | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: list[TaskSummary] = field(default_factory=list)
    evaluated: str = ""
    nlls: list[TaskScores] = field(default_factory=list)
    weights: str | None = None
    attention: AttentionMass | None = None
    missing: list[Missing] = field(default_factory=list)

    @property
    def weights_name(self) -> str:
        """The path of the weights. Inside the run folder it is relative to the folder, which may be
        moved."""
        path = Path(self.weights or "untrained")
        return str(path.relative_to(self.path) if path.is_relative_to(self.path) else path)

    @property
    def test_command(self) -> str:
        """The command that evaluates this run's weights and writes into this folder."""
        conf = self.path / "config.json"
        words = [
            "python",
            "test.py",
            "--env_conf",
            str(conf if conf.exists() else "FILE"),
            "--set",
            f"train.run_dir={self.path}",
        ]
        newest = newest_checkpoint(self.path)
        if newest:  # another run may have overwritten save_ckp since
            words += ["--set", "model.save_ckp=null", "--set", f"model.load_ckp={newest}"]
        return shlex.join(words)

    def part(self, what: str, name: str, read: Callable[[Path], Part], command: str) -> Part | None:
        """Reads the file `name`. If it does not exist or cannot be read, returns None and adds the
        part `what` to `missing`."""
        path = self.path / name
        if not os.path.lexists(path):
            self.missing.append(Missing(what, f"{path} does not exist", command))
            return None
        if not path.is_file():  # a folder, a dangling link, or a pipe, whose reader would block
            self.missing.append(Missing(what, f"{path} is not a file", command))
            return None
        try:
            check_tree(path)
            return read(path)
        except KeyError as error:
            reason = f"{path} has no {error}: another version wrote it"
        except FAULTS as error:
            # A config's error has one line per fault, and each names the file.
            lines = str(error).splitlines() or [type(error).__name__]
            self.missing += [Missing(what, line, command) for line in lines[:-1]]
            reason = (
                lines[-1]
                if lines[-1].startswith(str(path))
                else f"{path} cannot be read: {lines[-1]}"
            )
        self.missing.append(Missing(what, reason, command))
        return None


def read_folder(path: Path) -> RunFolder:
    """Reads a run folder. Raises ConfigError if it has neither metrics.jsonl nor test.json."""
    if not any(os.path.lexists(path / name) for name in ("metrics.jsonl", "test.json")):
        what = "has neither metrics.jsonl nor test.json" if path.is_dir() else "is not a folder"
        raise ConfigError(
            f"{path}: {what}; expected a run folder that train.py or test.py wrote, see "
            "train.run_dir"
        )
    run = RunFolder(path)
    train = "python train.py --env_conf FILE"
    tested = read_tested(run)
    if os.path.lexists(path / "config.json") or "config" not in tested:
        run.config = run.part(
            "what was run", "config.json", lambda p: parse(EnvConfig, read_json(p), p), train
        )
    else:
        run.config = run.part(
            "what was run",
            "test.json",
            lambda p: parse(EnvConfig, tested["config"], p),
            run.test_command,
        )
    run.versions = tested.get("versions", {})
    if os.path.lexists(path / "versions.json"):
        run.versions = run.part("machine and versions", "versions.json", read_versions, train) or {}
    run.metrics = (
        run.part("the training curve", "metrics.jsonl", partial(read_lines, run), train) or []
    )
    read_results(run, tested)
    test_json = (path / "test.json").read_bytes() if tested else None
    read = partial(load_token_nlls, test_json=test_json)
    run.nlls = (
        run.part("perplexity by length", "test-nll.safetensors", read, run.test_command) or []
    )
    newest = newest_checkpoint(path)
    run.weights = (
        str(newest)
        if newest
        else tested.get("weights") or (find_weights(run.config) if run.config else None)
    )
    run.compressor = find_compressor(run, newest)
    return run


def read_tested(run: RunFolder) -> dict[str, Any]:
    """The entries of test.json, without those of another type than test.py writes."""
    what = "the evaluation by test.py"
    found = run.part(what, "test.json", read_object, run.test_command) or {}
    tested: dict[str, Any] = {}
    kinds = {
        "weights": (str, type(None)),
        "config": (dict,),
        "versions": (dict,),
        "results": (list,),
    }
    for name, kind in kinds.items():
        if name not in found:
            continue
        if not isinstance(found[name], kind) or (
            name == "results" and not all(isinstance(r, dict) for r in found[name])
        ):
            why = f"{run.path / 'test.json'}: {name}: is not what test.py writes"
            run.missing.append(Missing(what, why, run.test_command))
        else:
            tested[name] = replace_nonfinite(found[name])
    if "versions" in tested:
        tested["versions"] = text_values(tested["versions"])
    return tested


def read_lines(run: RunFolder, path: Path) -> list[dict[str, Any]]:
    """The valid lines of metrics.jsonl. The others are added to `missing`. Raises ValueError if no
    line is valid."""
    lines, faults = examine_metrics(path.parent)
    for fault in faults[:5]:
        run.missing.append(Missing("a line of the training curve", f"{path}: {fault}"))
    if faults[5:]:
        run.missing.append(
            Missing("lines of the training curve", f"{path}: {len(faults) - 5} more invalid lines")
        )
    if not lines:
        raise ValueError("none of its lines is one that a run writes")
    return [line for _, line in lines]


def read_attention(path: Path) -> AttentionMass:
    """Reads the attention of a run. Raises KeyError if the file does not describe what was
    measured."""
    mass = AttentionMass.load(path)
    for name in ("tokens", "task", "chunk_size", "num_memory", "weights"):
        mass.about[name]
    return mass


def read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"a JSON object was expected, found {type(value).__name__}")
    return value


def read_versions(path: Path) -> dict[str, Any]:
    return text_values(read_object(path))


def text_values(versions: dict[str, Any]) -> dict[str, Any]:
    """The versions that are text or null, the types that a run writes."""
    return {name: value for name, value in versions.items() if isinstance(value, str | None)}


def read_results(run: RunFolder, tested: dict[str, Any]) -> None:
    """Sets `results` and `evaluated` from test.json, or else from training's last evaluation."""

    def take(name: str, found: list[dict[str, Any]], evaluated: str) -> None:
        if found and not run.results:
            what = f"the evaluation in {name}"
            results = run.part(what, name, lambda _: read_summaries(found), run.test_command)
            run.results, run.evaluated = results or [], evaluated

    take(
        "test.json",
        tested.get("results", []),
        f"test.py, weights: {tested.get('weights') or 'untrained'}",
    )
    for line in [line for line in run.metrics if line.get("eval")][-1:]:
        take(
            "metrics.jsonl",
            line["eval"],
            f"training's last evaluation, at iteration {line['iteration']}",
        )


def read_summaries(found: list[dict[str, Any]]) -> list[TaskSummary]:
    """Raises KeyError or ValueError for invalid summaries, and for more than a page can show."""
    if len(found) > MAX_RESULTS:
        raise ValueError(f"{len(found)} results, a report shows up to {MAX_RESULTS}")
    return [TaskSummary.from_json(summary) for summary in found]


def newest_checkpoint(path: Path) -> Path | None:
    saved = saved_steps(path / "checkpoints")
    return saved[-1] if saved else None


def find_compressor(run: RunFolder, checkpoint: Path | None) -> MemoryConfig | None:
    """The compressor config of the checkpoint, or else the one that the run's config names."""
    paths = [checkpoint / "memory_config.json"] if checkpoint else []
    paths += [Path(run.config.model.config)] if run.config else []
    for path in paths:
        if path.is_file():
            try:
                return load_memory_config(path)
            except ConfigError as error:
                run.missing += [Missing("the compressor", line) for line in str(error).splitlines()]
    return None


def config_text(config: EnvConfig) -> str:
    return json.dumps(config.model_dump(mode="json"), indent=4)
