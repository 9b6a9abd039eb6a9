"""Makes a table of several commands: those of the paper, `uiollms study paper-table1` and others,
and our own, `uiollms study ablation-estimators` and `ablation-design`.

    uiollms study paper-table5 --scale small
    uiollms study paper-table5 --scale paper --dry_run
    uiollms study paper-table1 --scale paper --set model.device_map=0
    uiollms study ablation-estimators

A table consists of steps, which are commands of this package. A finished step is written to
steps.jsonl in the folder of the results and skipped when the command is started again; a training
that was interrupted continues from its last checkpoint. --dry_run prints the steps, their configs
and what their trainings cost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uiollms.config.load import apply_override, load_env_config
from uiollms.config.sections import EnvConfig
from uiollms.files.atomic import make_folder, replace_text
from uiollms.files.errors import ConfigError
from uiollms.files.folders import cache_dir, shipped_dir
from uiollms.files.json_files import as_json, read_json
from uiollms.planning.planner import Plan, make_plan
from uiollms.study.ablations import design_table, estimators_table
from uiollms.study.experiments import (
    Experiment,
    Step,
    StudyTable,
    plot_cells,
    read_cells,
)
from uiollms.study.paper_tables import PAPER_TABLES

Rows = list[dict[str, Any]]
Run = Callable[[Sequence[str]], None]
TABLES: dict[str, Callable[[], StudyTable]] = {
    **PAPER_TABLES,
    "ablation-estimators": estimators_table,
    "ablation-design": design_table,
}


def add_arguments(command: argparse.ArgumentParser, name: str) -> None:
    """name: of the table"""
    command.add_argument(
        "--scale",
        choices=list(TABLES[name]().steps),
        default="small",
        help="small: for two cores. paper: Llama-2-7B at the paper's settings, for GPUs (small)",
    )
    command.add_argument(
        "--dry_run", action="store_true", help="print what would run and what it costs"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field of every config, such as model.device_map=0",
    )


def make_table(args: argparse.Namespace, out: Path, run: Run | None = None) -> tuple[Any, Rows]:
    """Runs the unfinished steps of a table. Returns its settings and its rows as numbers.

    run: runs a command of this package, by default in a process of its own
    """
    table = TABLES[args.what]()
    make_folder(out)
    done = finished_steps(out)
    for step in table.steps[args.scale]:
        step = prepare(step, out, args.set)
        if record_of(step) in done:
            args.output.print_text(f"finished before: {shell_line(step.command)}")
            continue
        args.output.print_text(f"{step.what}: {shell_line(step.command)}")
        (run or run_command)([*step.command, "--quiet"])
        with (out / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(as_json(record_of(step)) + "\n")
    rows = read_cells(table.cells[args.scale], out, with_paper=table.source is not None)
    plot_cells(rows, out / "plot.png")
    setting = {"table": args.what, "scale": args.scale, "title": table.title, "set": args.set}
    source = {"source": table.source} if table.source else {}
    return setting | source | {"notes": table.notes[args.scale]}, rows


def finished_steps(out: Path) -> list[Any]:
    """The records of finished steps. A last line that was not written completely is left out."""
    path, found = out / "steps.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    replace_text(path, "".join(as_json(record) + "\n" for record in found))
    return found


def record_of(step: Step) -> Any:
    """What identifies a step: another command or config is another step."""
    config = json.loads(as_json(step.experiment.train)) if step.experiment else None
    return {"name": step.name, "command": [*step.command], "config": config}


def prepare(step: Step, out: Path, overrides: Sequence[str]) -> Step:
    """A step whose command has its folders, and whose config is written to env.json in its folder.
    The experiment of the result has the config's complete contents in `train`. Overrides apply to
    written configs, and follow --env_conf of a shipped one."""
    folder = out / step.name
    paths = {"{folder}": str(folder), "{shared}": str(cache_dir() / "study")}
    command = list(step.command)
    for name, path in paths.items():
        command = [argument.replace(name, path) for argument in command]
    if step.experiment is None:
        if "--env_conf" in command:
            command += [part for override in overrides for part in ("--set", override)]
        return replace(step, command=command)
    make_folder(folder)
    contents = write_config(step.experiment, folder, overrides)
    return replace(
        step, command=command, experiment=Experiment(step.experiment.base, train=contents)
    )


def write_config(experiment: Experiment, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Writes env.json, memory.json and tasks.json of an experiment. Returns the contents of all."""
    config = read_json(shipped_dir() / experiment.base)
    shipped = shipped_dir() / config["model"]["config"]
    memory = read_json(shipped if shipped.exists() else config["model"]["config"])
    memory |= experiment.memory
    config["model"] |= experiment.model
    config["train"] |= experiment.train
    config["train"]["run_dir"] = str(folder)
    config["model"]["config"] = str(folder / "memory.json")
    config["model"]["save_ckp"] = str(folder / "checkpoint")
    for name in ("load_ckp", "released_ckp"):
        if weights := config["model"].get(name):
            shipped = shipped_dir() / weights
            path = shipped if shipped.exists() else weights.replace("{table}", str(folder.parent))
            config["model"][name] = str(path)
    config["test"] = str(folder / "tasks.json")
    for part in (config, memory):
        part.pop("$schema", None)
    for override in overrides:
        apply_override(config, override, folder / "env.json")
    files = {"env.json": config, "memory.json": memory, "tasks.json": list(experiment.tasks)}
    for name, contents in files.items():
        replace_text(folder / name, as_json(contents, indent=4) + "\n")
    return files


def run_command(command: Sequence[str]) -> None:
    """Runs a command of this package in a process of its own, which frees its memory at its end.
    Raises ConfigError if it fails; it has printed why."""
    done = subprocess.run([sys.executable, "-m", "uiollms", *command])
    if done.returncode:
        raise ConfigError(
            f"`{shell_line(command)}` ended with exit code {done.returncode}; started again, the "
            "table continues with this step"
        )


def shell_line(command: Sequence[str]) -> str:
    return "uiollms " + " ".join(command)


# ---- Dry run -------------------------------------------------------------------------------------


def describe_table(args: argparse.Namespace, out: Path) -> tuple[Any, Rows]:
    """Prints the steps of a table with what they cost, and writes only their configs. Returns
    settings and a row per step."""
    table: StudyTable = TABLES[args.what]()
    source = f"The paper: {table.source}.\n" if table.source else ""
    args.output.print_text(f"{table.title}, scale {args.scale}\n{source}{table.notes[args.scale]}")
    rows: Rows = []
    for step in table.steps[args.scale]:
        step = prepare(step, out, args.set)
        row = {"step": step.what, "command": shell_line(step.command)} | costs(step, out)
        rows.append(row)
        args.output.print_text("\n" + "\n".join(f"{k}: {v}" for k, v in row.items() if v != ""))
    setting = {"table": args.what, "scale": args.scale, "set": args.set}
    return setting, rows


def costs(step: Step, out: Path) -> dict[str, Any]:
    """What a step takes: of a training the memory of its devices and its FLOPs, of an evaluation
    its documents and tokens."""
    if step.experiment is None:
        return {}
    path = out / step.name / "env.json"
    config = load_env_config(path)
    if step.command[0] == "train":
        return training_costs(config, make_plan(config, path))
    tasks = read_json(out / step.name / "tasks.json")
    documents = sum(task["num_instance"] for task in tasks)
    tokens = sum(task["num_instance"] * task["truncation"] for task in tasks)
    modes = max(1 + len(task.get("compare", ())) for task in tasks)
    return {"documents": documents, "tokens": f"at most {tokens:,}, in up to {modes} modes"}


def training_costs(config: EnvConfig, plan: Plan) -> dict[str, Any]:
    """The plan of a training in words. FLOPs are those of the longest document for all of them."""
    need = ", ".join(f"{device} {n.total / 2**30:.1f} GiB" for device, n in plan.need.items())
    documents = config.train.train_iters
    return {
        "documents": documents,
        "tokens": f"at most {plan.length:,} in a document",
        "memory": need,
        "FLOPs": f"at most {plan.flops * documents:.2e}",
    }
