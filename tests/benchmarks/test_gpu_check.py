"""Tests of the prepared check for a GPU, which run on the CPU, and of its data."""

import contextlib
import importlib
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import gpu_check, gpu_train
from benchmarks.recall_data import Corpus, Facts
from packaging.requirements import Requirement
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["correctness", "speed", "train"])
def test_every_part_of_the_check_runs_without_a_gpu(part, tmp_path, tiny_folder):
    options = ["--device", "cpu", "--model", "tiny", "--base", str(tiny_folder)]
    assert gpu_check.main(["--part", part, *options, "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {part}
    assert all(line["status"] == 0 and line["output"] for line in lines)
    if part == "train":
        report = json.loads((tmp_path / "train" / "results.json").read_text())
        found = report["results"][0]
        assert report["steps"] > 2 and {"window", "shuffled", "own", "raw", "bound"} <= set(found)
        assert (tmp_path / "train" / "adapter.safetensors").exists()


@pytest.mark.parametrize("part", ["correctness", "speed", "train"])
def test_the_commands_for_a_gpu_are_understood(part):
    """Without a GPU they cannot run, but every option and case of theirs is parsed."""
    parser = gpu_check.make_parser()
    options = parser.parse_args(["--part", part, "--texts", "*.txt"])
    for step in gpu_check.steps(part, options):
        *_, module = step.arguments[:2]
        arguments = step.arguments[2:]
        if module == "benchmarks.gpu_train":
            assert gpu_train.parse(arguments).texts == "*.txt"
        elif module == "pytest":
            assert all((ROOT / name).exists() for name in arguments if name.endswith(".py"))
        else:
            made = importlib.import_module(module).make_parser()
            assert made.parse_args(arguments).device == "cuda"


@pytest.mark.parametrize("sizes", [["--sizes", "64/8/3", "256/32/8", "--measured", "256/32/8"], []])
def test_recent_tokens_of_a_training_fit_its_smallest_chunk(sizes, capsys):
    assert gpu_train.parse(["--recent_tokens", "64", *sizes]).recent_tokens == 64
    with pytest.raises(SystemExit):
        gpu_train.parse(["--recent_tokens", "65", *sizes])
    assert "found 65, allowed are 0 to 64" in capsys.readouterr().err
    only = ["--seconds", "0", "--measured", "256/16/8"]  # chunks of 64 are not read
    assert gpu_train.parse(["--recent_tokens", "112", *only]).recent_tokens == 112


def test_no_step_starts_without_time_and_none_outlives_its_part(tmp_path, monkeypatch):
    slow = gpu_check.Step("slow", ["-c", "import time; time.sleep(60)"], 50)
    monkeypatch.setattr(gpu_check, "steps", lambda part, options: [slow, slow])
    options = ["--part", "speed", "--seconds_of_speed", "6", "--out", str(tmp_path)]
    assert gpu_check.main(options) == 1
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["stopped after 6 s", "left out: no time"]


def test_the_tests_on_a_gpu_need_only_the_packages_dependencies(tmp_path):
    """Whatever else `make setup` installs cannot be imported here, and its plugins of pytest are
    not loaded."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[\[<>=~;]", text)[0] for text in sum(optional(project), [])]
    modules = {"PyYAML": "yaml", "pytest-xdist": "xdist", "pytest-timeout": "pytest_timeout"}
    names = sorted(set(names) - {"pytest"} - required(project["dependencies"]))
    blocked = {modules.get(name, name.replace("-", "_").lower()) for name in names}
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"for name in {sorted(blocked)}:\n"
        "    sys.modules[name] = None  # import raises ImportError\n"
    )
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only"]
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / "src", ROOT)))
    environment = os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "test_gpu.py" in ran.stdout and "test_flash.py" in ran.stdout and len(blocked) > 5


def required(texts: list[str]) -> set[str]:
    """The names of these packages and of all that they need: huggingface-hub imports httpx2."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in texts]
    while waiting:
        package = waiting.pop()
        if package.name in found or (package.marker and not package.marker.evaluate({"extra": ""})):
            continue
        found.add(package.name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            waiting += map(Requirement, importlib.metadata.requires(package.name) or [])
    return found


def optional(project: dict) -> list[list[str]]:
    """The optional dependencies, without the small model, which the tests on a GPU may use."""
    return [texts for name, texts in project["optional-dependencies"].items() if name != "smollm2"]


def test_a_failed_step_is_reported_and_the_next_one_runs(tmp_path, monkeypatch):
    wrong = gpu_check.Step("wrong", ["-c", "print('here'); raise SystemExit(3)"], 60)
    slow = gpu_check.Step("slow", ["-c", "import time; time.sleep(60)"], 0.5)
    right = gpu_check.Step("right", ["-c", "print(1)"], 60)
    monkeypatch.setattr(gpu_check, "steps", lambda part, options: [wrong, slow, right])
    assert gpu_check.main(["--part", "speed", "--out", str(tmp_path)]) == 1
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == [3, "stopped after 0 s", 0]
    assert lines[0]["output"] == ["here"]


def test_crops_lie_within_one_text():
    corpus = Corpus.joined(torch.arange(30).int(), np.array([5, 20, 5]))
    crops = corpus.crops(200, 8, random.Random(0))
    assert crops.shape == (200, 8) and (crops.diff() == 1).all()
    # Only the second text has 8 tokens, and every crop of it is drawn.
    assert set(crops[:, 0].tolist()) == set(range(5, 18))
    assert corpus.first(9, 5)[:, 0].tolist() == [0, 5, 25]
    with pytest.raises(ValueError, match="no text of the corpus has 21 tokens"):
        corpus.crops(1, 21, random.Random(0))


def test_every_value_to_recall_was_stated_before(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    facts, rng = Facts(tokenizer, 50, 0), random.Random(0)
    letter = tokenizer("z")["input_ids"][0]
    filler = Corpus.joined(torch.full((2000,), letter).int(), np.array([2000]))
    ids, masks = facts.documents(filler, 4, 1200, 300, rng)
    assert ids.shape == (4, 1200) and masks.shape == (4, 300)
    for document, mask in zip(ids, masks, strict=True):
        text, last = tokenizer.decode(document[:900]), document[900:]
        edges = mask.diff(prepend=torch.zeros(1, dtype=mask.dtype), append=torch.zeros(1).long())
        starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
        assert len(starts) > 2
        for start, stop in zip(starts, stops, strict=True):
            assert tokenizer.decode(last[start:stop]) in text
