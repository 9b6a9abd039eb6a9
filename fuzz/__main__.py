"""Attack every command: hostile configs, data and saved files, and kills; exit code 1 if
anything went wrong.

python -m fuzz                                # what docs/fuzz.md counts: minutes
python -m fuzz --configs 40 --data 40 --saved 20 --kills 2
python -m fuzz --only configs:17 --seed 0     # one trial again

Wrong is: a traceback, nothing at the end of 20 s, an exit code that no command has, exit code 2
without a word, a change to a file of the user's, a command that cannot go on after a kill.
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

import matplotlib.figure  # noqa: F401  slow imports happen here, once, for all forks
import peft  # noqa: F401
import torch
import torch.utils.tensorboard

import uiollms.__main__
import uiollms.cli.convert
import uiollms.cli.data
import uiollms.cli.report
import uiollms.cli.study  # noqa: F401
from fuzz.attacks import ATTACKS, KILLED, attack_by_kill, drawn, time_of
from fuzz.trials import Outcome, Trial, run_all
from fuzz.world import make_world
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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="trials at a time (2)")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one trial alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the counts go as JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment()  # asks git, once for all forks
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as room:
        world = Path(room) / "world"
        make_apart(world)
        shutil.rmtree(world / "cache", ignore_errors=True)
        outcomes = attack(args, world, Path(room))
    counts = summary(outcomes, args.seed, time.monotonic() - began)
    print(json.dumps(counts, indent=1))
    if args.out:
        args.out.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return int(any(outcome.faults for outcome in outcomes))


def make_apart(world: Path) -> None:
    """The world in a process of its own: this one starts no threads, which forks would lack."""
    child = os.fork()
    if not child:
        code = 70
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            make_world(world)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the world of the attacks could not be made")


def attack(args: argparse.Namespace, world: Path, room: Path) -> list[Outcome]:
    seconds = {}
    if args.kills or (args.only or "").startswith("kills"):
        timed = [
            Trial(name, 0, lambda folder, name=name: (name, [time_of(name)])) for name in KILLED
        ]
        for outcome in run_all(timed, world, room, workers=1):
            assert not outcome.faults, outcome
            seconds[outcome.trial.kind] = outcome.seconds

    def trials() -> Iterator[Trial]:
        for kind in COUNTS:
            for number in range(getattr(args, kind)):
                yield trial(kind, number)

    def trial(kind: str, number: int) -> Trial:
        how = ATTACKS.get(kind) or (lambda rng, folder: attack_by_kill(rng, folder, seconds))
        return drawn(kind, args.seed, how, number)

    chosen = trials()
    if args.only:
        kind, _, number = args.only.partition(":")
        chosen = iter([trial(kind, int(number))])
    found = []
    for outcome in run_all(chosen, world, room, args.workers):
        found.append(outcome)
        for kind, words in outcome.faults:
            print(f"{outcome.trial.name} ({outcome.what}): {kind}: {words}", flush=True)
        if len(found) % 100 == 0:
            print(f"{len(found)} trials", file=sys.stderr, flush=True)
    return found


def summary(outcomes: list[Outcome], seed: int, seconds: float) -> dict[str, object]:
    rows = {}
    for kind in COUNTS:
        own = [outcome for outcome in outcomes if outcome.trial.kind == kind]
        wrong = Counter(name for outcome in own for name, _ in outcome.faults)
        slowest = round(max((outcome.seconds for outcome in own), default=0.0), 1)
        rows[kind] = dict(
            trials=len(own), refused=sum(o.refused for o in own), killed=sum(o.killed for o in own)
        )
        rows[kind] |= dict(wrong=dict(wrong), slowest_seconds=slowest)
    versions = environment()
    about = dict(
        seed=seed,
        seconds=round(seconds),
        machine=device_name(),
        python=versions["python"],
        torch=versions["torch"],
    )
    return dict(about, **rows)


if __name__ == "__main__":
    sys.exit(main())
