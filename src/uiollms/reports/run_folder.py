"""What a run folder holds, read as far as it goes, with a note for whatever is not there."""

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

from uiollms.build import weights_of
from uiollms.config.load import load_memory_config, parse
from uiollms.config.sections import EnvConfig, MemoryConfig
from uiollms.evaluation.attention_mass import AttentionMass
from uiollms.evaluation.results import TaskResult
from uiollms.evaluation.saved_results import load_token_nlls
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import finite, read_json
from uiollms.files.reading import check_tree
from uiollms.runs.metrics import examine_metrics
from uiollms.runs.state import saved_steps

Part = TypeVar("Part")
ATTENTION = "attention.safetensors"


@dataclass
class Missing:
    """Something that the report does not show: why, and the command that would change it ("" if
    none does)."""

    what: str
    why: str
    command: str = ""


@dataclass
class RunFolder:
    """A run folder's files as values. config, versions: of the training if there was one, else
    of the evaluation; results: of test.py, else training's last evaluation (`evaluated` says
    which); nlls: results with every token; weights: what test.py, a report and a reader would
    take for the trained ones."""

    path: Path
    config: EnvConfig | None = None
    compressor: MemoryConfig | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: list[TaskResult] = field(default_factory=list)
    evaluated: str = ""
    nlls: list[TaskResult] = field(default_factory=list)
    weights: str | None = None
    attention: AttentionMass | None = None
    missing: list[Missing] = field(default_factory=list)

    @property
    def weights_name(self) -> str:
        """The weights' path, within the run folder from there: it may be moved."""
        path = Path(self.weights or "untrained")
        return str(path.relative_to(self.path) if path.is_relative_to(self.path) else path)

    @property
    def test_command(self) -> str:
        """What evaluates this run's weights into this folder."""
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
        if newest:  # not what another run may have left at save_ckp since
            words += ["--set", "model.save_ckp=null", "--set", f"model.load_ckp={newest}"]
        return shlex.join(words)

    def part(self, what: str, name: str, read: Callable[[Path], Part], command: str) -> Part | None:
        """What `read` makes of a file; None with a note where it is not there or not what this
        version writes."""
        path = self.path / name
        if not os.path.lexists(path):
            self.missing.append(Missing(what, f"{path} does not exist", command))
            return None
        if not path.is_file():  # a folder, a link to nothing, a pipe that would be waited for
            self.missing.append(Missing(what, f"{path} is not a file", command))
            return None
        try:
            check_tree(path)
            return read(path)
        except KeyError as error:
            reason = f"{path} has no {error}: another version wrote it"
        except FAULTS as error:
            # Of what is wrong with a config there is a line for each, with the file in it.
            lines = str(error).splitlines() or [type(error).__name__]
            self.missing += [Missing(what, line, command) for line in lines[:-1]]
            reason = (
                lines[-1]
                if lines[-1].startswith(str(path))
                else f"{path} cannot be read: {lines[-1]}"
            )
        self.missing.append(Missing(what, reason, command))
        return None


# What a file that somebody has edited, or that is none of a run's, can make of what reads and shows
# it. A ConfigError is a ValueError.
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
MOST_RESULTS = 100  # panels in a picture


def read_folder(path: Path) -> RunFolder:
    """Raises ConfigError for a folder that holds neither metrics.jsonl nor test.json."""
    if not any(os.path.lexists(path / name) for name in ("metrics.jsonl", "test.json")):
        what = "holds neither metrics.jsonl nor test.json" if path.is_dir() else "is not a folder"
        raise ConfigError(
            f"{path}: {what}; a run folder is what train.py or test.py made, see train.run_dir"
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
    of = (path / "test.json").read_bytes() if tested else None
    read = partial(load_token_nlls, of=of)
    run.nlls = (
        run.part("perplexity by length", "test-nll.safetensors", read, run.test_command) or []
    )
    newest = newest_checkpoint(path)
    run.weights = str(newest) if newest else find_weights(run.config, tested)
    run.compressor = find_compressor(run, newest)
    return run


def read_tested(run: RunFolder) -> dict[str, Any]:
    """test.json, without what has another type than test.py writes."""
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
            why = f"{run.path / 'test.json'}: {name}: is none that test.py writes"
            run.missing.append(Missing(what, why, run.test_command))
        else:
            tested[name] = finite(found[name])
    if "versions" in tested:
        tested["versions"] = plain(tested["versions"])
    return tested


def read_lines(run: RunFolder, path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are such, and a note of the others."""
    lines, faults = examine_metrics(path.parent)
    for fault in faults[:5]:
        run.missing.append(Missing("a line of the training curve", f"{path}: {fault}"))
    if faults[5:]:
        run.missing.append(
            Missing("lines of the training curve", f"{path}: {len(faults) - 5} more that are none")
        )
    if not lines:
        raise ValueError("no line of it is one of a run")
    return [line for _, line in lines]


def read_attention(path: Path) -> AttentionMass:
    """Raises KeyError where the file does not name what was measured."""
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
    return plain(read_object(path))


def plain(versions: dict[str, Any]) -> dict[str, Any]:
    """The versions that are texts, as all that are written are."""
    return {name: value for name, value in versions.items() if isinstance(value, str | None)}


def read_results(run: RunFolder, tested: dict[str, Any]) -> None:
    def take(name: str, summaries: list[dict[str, Any]], said: str) -> None:
        if summaries and not run.results:
            what = f"the evaluation in {name}"
            found = run.part(what, name, lambda _: results_of(summaries), run.test_command)
            run.results, run.evaluated = found or [], said

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


def results_of(summaries: list[dict[str, Any]]) -> list[TaskResult]:
    """Raises KeyError, ValueError for what is no result, and for more than a page can show."""
    if len(summaries) > MOST_RESULTS:
        raise ValueError(f"{len(summaries)} results, a report shows up to {MOST_RESULTS}")
    return [TaskResult.from_summary(summary) for summary in summaries]


def newest_checkpoint(path: Path) -> Path | None:
    saved = saved_steps(path / "checkpoints")
    return saved[-1] if saved else None


def find_weights(config: EnvConfig | None, tested: dict[str, Any]) -> str | None:
    """The weights that test.py evaluated, else those it would."""
    return tested.get("weights") or (weights_of(config) if config else None)


def find_compressor(run: RunFolder, checkpoint: Path | None) -> MemoryConfig | None:
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
