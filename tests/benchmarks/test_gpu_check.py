"""Tests of the prepared check for a GPU, which run on the CPU, and of its data."""

import json
import random

import numpy as np
import pytest
import torch
from benchmarks import gpu_check
from benchmarks.recall_data import Corpus, Facts
from transformers import AutoTokenizer


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
