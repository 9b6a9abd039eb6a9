"""Tests of `make fuzz` (docs/fuzz.md). They run a few attacks of each kind, and check that the
attacks are reproducible and that faults are detected."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

# fuzz/ is not installed; it runs from the repository.
sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzz.mutate import make_special, mutate_bytes, mutate_json, mutate_tensors, repeat_key
from fuzz.trials import Step, Trial, find_faults, run_all

ROOT = Path(__file__).parent.parent
GOOD = {"a": {"b": [1, 2.5, "c"]}, "d": None}


def test_a_short_run_of_all_attacks_finds_no_fault(tmp_path):
    counts = ["--configs", "24", "--data", "24", "--saved", "16", "--kills", "2", "--workers", "1"]
    output = ["--seed", "1", "--out", str(tmp_path / "counts.json")]
    command = [sys.executable, "-m", "fuzz", *counts, *output]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=250
    )
    assert done.returncode == 0, done.stdout.decode()
    found = json.loads((tmp_path / "counts.json").read_text())
    trials = {kind: found[kind]["trials"] for kind in ("configs", "data", "saved", "kills")}
    assert trials == {"configs": 24, "data": 24, "saved": 16, "kills": 2}
    assert found["configs"]["refused"] > 8 and found["data"]["refused"] > 8


def test_mutations_depend_on_the_seed_alone():
    data = b'{"text": "It was a bright day."}\n' * 3
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    tensors = len(header).to_bytes(8, "little") + header + b"\0"
    for draw in (mutate_json, repeat_key):
        assert len({draw(Random(i), GOOD) for i in range(40)}) > 4
        assert draw(Random(3), GOOD) == draw(Random(3), GOOD)
    for draw, good in ((mutate_bytes, data), (mutate_tensors, tensors)):
        assert sum(draw(Random(i), good) != good for i in range(40)) > 30
        assert draw(Random(3), good) == draw(Random(3), good)


def test_a_file_is_replaced_by_every_kind_of_special_file(tmp_path):
    kinds = set()
    for i in range(60):
        path = tmp_path / f"{i}"
        path.write_text("a")
        kinds.add(make_special(Random(i), path))
    assert len(kinds) == 9


@pytest.mark.parametrize(
    "code, output, fault",
    [
        (0, "", None),
        (2, "env.json: wrong", None),
        (2, "", "silence"),
        (1, "wrong", "exit code"),
        (-9, "", "exit code"),
        (2, "x" * 5000, "long line"),
        (1, "Traceback (most recent call last):\nValueError", "traceback"),
        (70, "", "traceback"),
    ],
)
def test_exit_codes_and_output_that_are_faults(code, output, fault):
    assert [kind for kind, _ in find_faults(Step(["train.py"]), code, output)] == [fault] * bool(
        fault
    )


def test_lost_bytes_and_hanging_programs_are_faults(tmp_path, monkeypatch):
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace/mine.txt").write_text("mine")
    monkeypatch.setattr("fuzz.trials.HANG", 1.0)
    losing = Trial("loses", 0, lambda folder: ("", [Step(["loses"])]))
    hanging = Trial("hangs", 0, lambda folder: ("", [Step(["hangs"])]))
    doing = {"loses": lambda: Path("mine.txt").unlink(), "hangs": lambda: os.read(os.pipe()[0], 1)}
    monkeypatch.setattr("fuzz.trials.call", lambda name: doing[name]() and 0 or 0)
    found = {
        o.trial.kind: [kind for kind, _ in o.faults]
        for o in run_all([losing, hanging], tmp_path / "workspace", tmp_path, 2)
    }
    assert found == {"loses": ["lost"], "hangs": ["hang"]}
