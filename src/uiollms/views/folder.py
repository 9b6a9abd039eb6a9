"""What a run folder holds, read as far as it goes, with a note for whatever is not there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from uiollms.attention_mass import AttentionMass
from uiollms.config import ConfigError, EnvConfig, MemoryConfig, load_memory_config, parse, read_json
from uiollms.metrics import read_metrics
from uiollms.results import TaskResult, load_token_nlls
from uiollms.run_state import saved_steps
from uiollms.saving import weights_of

Part = TypeVar("Part")
ATTENTION = "attention.safetensors"


@dataclass
class Missing:
    """Something that the report does not show: why, and the command that would change it ("" if none does)."""

    what: str
    why: str
    command: str = ""


@dataclass
class RunFolder:
    """A run folder's files as values. config, versions: of the training if there was one, else of the evaluation; results: of
    test.py, else training's last evaluation (`evaluated` says which); nlls: results with every token; weights: what test.py, a
    report and a reader would take for the trained ones."""

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
        words = ["python", "test.py", "--env_conf", str(conf if conf.exists() else "FILE"), "--set", f"train.run_dir={self.path}"]
        newest = newest_checkpoint(self.path)
        if newest:  # not what another run may have left at save_ckp since
            words += ["--set", "model.save_ckp=null", "--set", f"model.load_ckp={newest}"]
        return shlex.join(words)

    def part(self, what: str, name: str, read: Callable[[Path], Part], command: str) -> Part | None:
        """What `read` makes of a file; None with a note where it is not there or not what this version writes."""
        path = self.path / name
        if not path.exists():
            self.missing.append(Missing(what, f"{path} does not exist", command))
            return None
        try:
            return read(path)
        except KeyError as error:
            reason = f"{path} has no {error}: another version wrote it"
        except (ConfigError, TypeError, ValueError, OSError, SafetensorError) as error:
            reason = f"{path} cannot be read: {error}"
        self.missing.append(Missing(what, reason, command))
        return None


def read_folder(path: Path) -> RunFolder:
    """Raises ConfigError for a folder that holds neither metrics.jsonl nor test.json."""
    if not any((path / name).exists() for name in ("metrics.jsonl", "test.json")):
        what = "holds neither metrics.jsonl nor test.json" if path.is_dir() else "is not a folder"
        raise ConfigError(f"{path}: {what}; a run folder is what train.py or test.py made, see train.run_dir")
    run = RunFolder(path)
    train = "python train.py --env_conf FILE"
    tested = run.part("the evaluation by test.py", "test.json", read_object, run.test_command) or {}
    if (path / "config.json").exists() or "config" not in tested:
        run.config = run.part("what was run", "config.json", lambda p: parse(EnvConfig, read_json(p), p), train)
    else:
        run.config = run.part("what was run", "test.json", lambda p: parse(EnvConfig, tested["config"], p), run.test_command)
    run.versions = tested.get("versions", {})
    if (path / "versions.json").exists():
        run.versions = run.part("machine and versions", "versions.json", read_object, train) or {}
    run.metrics = run.part("the training curve", "metrics.jsonl", lambda p: read_metrics(p.parent), train) or []
    read_results(run, tested)
    run.nlls = run.part("perplexity by length", "test-nll.safetensors", load_token_nlls, run.test_command) or []
    newest = newest_checkpoint(path)
    run.weights = str(newest) if newest else find_weights(run.config, tested)
    run.compressor = find_compressor(run.config, newest)
    return run


def read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"a JSON object was expected, found {type(value).__name__}")
    return value


def read_results(run: RunFolder, tested: dict[str, Any]) -> None:
    def take(name: str, summaries: list[dict[str, Any]], said: str) -> None:
        if summaries and not run.results:
            what = f"the evaluation in {name}"
            found = run.part(what, name, lambda _: [TaskResult.from_summary(summary) for summary in summaries], run.test_command)
            run.results, run.evaluated = found or [], said

    take("test.json", tested.get("results", []), f"test.py, weights: {tested.get('weights') or 'untrained'}")
    for line in [line for line in run.metrics if line.get("eval")][-1:]:
        take("metrics.jsonl", line["eval"], f"training's last evaluation, at iteration {line['iteration']}")


def newest_checkpoint(path: Path) -> Path | None:
    saved = saved_steps(path / "checkpoints")
    return saved[-1] if saved else None


def find_weights(config: EnvConfig | None, tested: dict[str, Any]) -> str | None:
    """The weights that test.py evaluated, else those it would."""
    return tested.get("weights") or (weights_of(config) if config else None)


def find_compressor(config: EnvConfig | None, checkpoint: Path | None) -> MemoryConfig | None:
    paths = [checkpoint / "memory_config.json"] if checkpoint else []
    paths += [Path(config.model.config)] if config else []
    return next((load_memory_config(path) for path in paths if path.exists()), None)


def config_text(config: EnvConfig) -> str:
    return json.dumps(config.model_dump(mode="json"), indent=4)
