"""The short form of `make fuzz` (docs/fuzz.md): a few of each kind of attack, and that its watch
sees what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # fuzz/ is run from the repository, not installed

from fuzz.mutate import changed_bytes, changed_json, changed_tensors, doubled_key, make_special
from fuzz.trials import Step, Trial, judged, run_all

ROOT = Path(__file__).parent.parent
GOOD = {"a": {"b": [1, 2.5, "c"]}, "d": None}


def test_a_short_attack_finds_nothing(tmp_path):
    counts = ["--configs", "24", "--data", "24", "--saved", "16", "--kills", "2", "--workers", "1"]
    command = [
        sys.executable,
        "-m",
        "fuzz",
        *counts,
        "--seed",
        "1",
        "--out",
        str(tmp_path / "counts.json"),
    ]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=250
    )
    assert done.returncode == 0, done.stdout.decode()
    found = json.loads((tmp_path / "counts.json").read_text())
    assert [found[kind]["trials"] for kind in ("configs", "data", "saved", "kills")] == [
        24,
        24,
        16,
        2,
    ]
    assert found["configs"]["refused"] > 8 and found["data"]["refused"] > 8


def test_what_is_drawn_depends_on_the_seed_alone():
    data = b'{"text": "It was a bright day."}\n' * 3
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    tensors = len(header).to_bytes(8, "little") + header + b"\0"
    for draw in (changed_json, doubled_key):
        assert len({draw(Random(i), GOOD) for i in range(40)}) > 4
        assert draw(Random(3), GOOD) == draw(Random(3), GOOD)
    for draw, good in ((changed_bytes, data), (changed_tensors, tensors)):
        assert sum(draw(Random(i), good) != good for i in range(40)) > 30
        assert draw(Random(3), good) == draw(Random(3), good)


def test_special_things_take_a_files_place(tmp_path):
    kinds = set()
    for i in range(60):
        path = tmp_path / f"{i}"
        path.write_text("a")
        kinds.add(make_special(Random(i), path))
    assert len(kinds) == 9


@pytest.mark.parametrize(
    "code, said, fault",
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
def test_what_counts_as_a_fault(code, said, fault):
    assert [kind for kind, _ in judged(Step(["train.py"]), code, said)] == [fault] * bool(fault)


def test_the_watch_sees_lost_bytes_and_what_hangs(tmp_path, monkeypatch):
    (tmp_path / "world").mkdir()
    (tmp_path / "world/mine.txt").write_text("mine")
    monkeypatch.setattr("fuzz.trials.HANG", 1.0)
    losing = Trial("loses", 0, lambda folder: ("", [Step(["loses"])]))
    hanging = Trial("hangs", 0, lambda folder: ("", [Step(["hangs"])]))
    doing = {"loses": lambda: Path("mine.txt").unlink(), "hangs": lambda: os.read(os.pipe()[0], 1)}
    monkeypatch.setattr("fuzz.trials.call", lambda name: doing[name]() and 0 or 0)
    found = {
        o.trial.kind: [kind for kind, _ in o.faults]
        for o in run_all([losing, hanging], tmp_path / "world", tmp_path, 2)
    }
    assert found == {"loses": ["lost"], "hangs": ["hang"]}
