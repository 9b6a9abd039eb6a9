"""Attacks every command with hostile configs, data and saved files, and with kills. The exit code
is 1 if there was any fault.

python -m fuzz                                # the trials of docs/fuzz.md, for minutes
python -m fuzz --configs 40 --data 40 --saved 20 --kills 2
python -m fuzz --only configs:17 --seed 0     # one trial again

These are faults: a traceback, a command that does not end within 20 s, an exit code that no command
has, exit code 2 without a message, a change to a file of the user, and a command that cannot
continue after a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", OMP_WAIT_POLICY="PASSIVE"
)

# These slow imports run here once, so that no fork repeats them.
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import torch
import torch.utils.tensorboard

import uiollms.__main__
import uiollms.cli.convert
import uiollms.cli.data
import uiollms.cli.report
import uiollms.cli.study  # noqa: F401
from fuzz.attacks import ATTACKS, KILLABLE, attack_with_kill, draw_trial, undisturbed_step
from fuzz.trials import Outcome, Trial, run_all
from fuzz.workspace import make_workspace
from uiollms.runs.environment import device_name, environment

COUNTS = {"configs": 1500, "data": 1500, "saved": 500, "kills": 80}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for kind, count in COUNTS.items():
        parser.add_argument(
            f"--{kind}", type=int, default=count, metavar="N", help=f"trials ({count})"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all trials (0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="trials at a time (2)")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="run only this trial")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the counts")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # `environment` calls git and caches the answer, here once for all forks.
    environment()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        directory = Path(name)
        workspace = directory / "workspace"
        make_workspace_in_child(workspace)
        shutil.rmtree(workspace / "cache", ignore_errors=True)
        outcomes = attack(args, workspace, directory)
    counts = summary(outcomes, args.seed, time.monotonic() - began)
    print(json.dumps(counts, indent=1))
    if args.out:
        args.out.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return int(any(outcome.faults for outcome in outcomes))


def make_workspace_in_child(workspace: Path) -> None:
    """Makes the workspace in a child process, so that this process starts no threads. Forks would
    lack them."""
    child = os.fork()
    if not child:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            make_workspace(workspace)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the workspace of the attacks could not be made")


def attack(args: argparse.Namespace, workspace: Path, directory: Path) -> list[Outcome]:
    """Runs the trials on copies of the workspace and prints their faults."""
    seconds = {}
    if args.kills or (args.only or "").startswith("kills"):
        timed = [
            Trial(name, 0, lambda folder, name=name: (name, [undisturbed_step(name)]))
            for name in KILLABLE
        ]
        for outcome in run_all(timed, workspace, directory, workers=1):
            assert not outcome.faults, outcome
            seconds[outcome.trial.kind] = outcome.seconds

    def trials() -> Iterator[Trial]:
        for kind in COUNTS:
            for number in range(getattr(args, kind)):
                yield trial(kind, number)

    def trial(kind: str, number: int) -> Trial:
        prepare = ATTACKS.get(kind) or (lambda rng, folder: attack_with_kill(rng, folder, seconds))
        return draw_trial(kind, args.seed, prepare, number)

    chosen = trials()
    if args.only:
        kind, _, number = args.only.partition(":")
        chosen = iter([trial(kind, int(number))])
    outcomes = []
    for outcome in run_all(chosen, workspace, directory, args.workers):
        outcomes.append(outcome)
        for kind, message in outcome.faults:
            print(f"{outcome.trial.name} ({outcome.what}): {kind}: {message}", flush=True)
        if len(outcomes) % 100 == 0:
            print(f"{len(outcomes)} trials", file=sys.stderr, flush=True)
    return outcomes


def summary(outcomes: list[Outcome], seed: int, seconds: float) -> dict[str, object]:
    """Returns the counts of every kind of attack, and what they depend on."""
    rows = {}
    for kind in COUNTS:
        trials = [outcome for outcome in outcomes if outcome.trial.kind == kind]
        faults = Counter(name for outcome in trials for name, _ in outcome.faults)
        rows[kind] = dict(
            trials=len(trials),
            refused=sum(outcome.refused for outcome in trials),
            killed=sum(outcome.killed for outcome in trials),
            wrong=dict(faults),
            slowest_seconds=round(max((outcome.seconds for outcome in trials), default=0.0), 1),
        )
    versions = environment()
    about = dict(
        seed=seed,
        seconds=round(seconds),
        machine=device_name([]),
        python=versions["python"],
        torch=versions["torch"],
    )
    return dict(about, **rows)


if __name__ == "__main__":
    sys.exit(main())
