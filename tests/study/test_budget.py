"""The study of memory and its alternatives by slots and by length, on the tiny model."""

import csv
import json
from pathlib import Path

import pytest

from uiollms.cli.study import main
from uiollms.config.corpora import TaskEntry
from uiollms.evaluation.evaluator import Evaluation
from uiollms.files.errors import ConfigError

SIZES = ["--corpus", "files:book*.txt", "--documents", "3", "--chunk_size", "16", "--out", "b"]
MODES = ["--modes", "window", "shuffled", "recent", "streaming", "raw", "pooled", "snapkv"]


@pytest.fixture
def study(workspace, monkeypatch):
    monkeypatch.setenv("UIOLLMS_KVPRESS", str(workspace / "absent"))

    def run(*options):
        main(["budget", "--env_conf", "env.json", "--quiet", *SIZES, *MODES, *options])
        return json.loads(Path("b/results.json").read_text())["rows"]

    return run


def test_points_are_those_of_an_evaluation(study, workspace):
    """128 positions: the raw modes stop before a document of 160 tokens, memory goes on. At 4x the
    sweeps share a point."""
    options = ["--tokens", "64", "--ratios", "2", "4", "--ratio", "4", "--lengths", "64", "160"]
    rows = study(*options)
    assert len(rows) == 4 * 8
    setting = json.loads(Path("b/results.json").read_text())["setting"]
    assert (setting["recent_tokens"], setting["ratio"]) == (0, 4)
    points = {(r["sweep"], r["tokens"], r["ratio"], r["mode"]): r for r in rows}
    for ratio in (2, 4):
        # The first context of 3 chunks is 48 tokens.
        for mode in ("memory", "recent", "streaming", "pooled"):
            assert points["slots", 64, ratio, mode]["slots"] == 48 // ratio
        assert points["slots", 64, ratio, "raw"]["nll"] == points["slots", 64, 2, "raw"]["nll"]
        row = points["slots", 64, ratio, "snapkv"]
        assert row["nll"] is None and "absent" in row["note"]
    assert points["length", 64, 4, "memory"]["nll"] == points["slots", 64, 4, "memory"]["nll"]
    for mode in ("raw", "pooled"):
        row = points["length", 160, 4, mode]
        assert row["nll"] is None and "longer than the base's positions" in row["note"]
    assert points["length", 160, 4, "streaming"]["nll"] > 0
    from uiollms.build import load_memory_lm
    from uiollms.config.load import load_env_config

    task = TaskEntry(
        task_type="perplexity",
        task_name="files:book*.txt",
        num_instance=3,
        truncation=64,
        documents="full",
        protocols=("last.15",),
        compare=("window", "streaming"),
        chunk_size=16,
        num_memory=4,
    )
    model, tokenizer = load_memory_lm(load_env_config("env.json"), "env.json")
    (scores,) = Evaluation(model, tokenizer, [task]).run()
    for mode, numbers in scores.summarize().modes.items():
        row = points["slots", 64, 4, mode]
        assert (row["nll"], row["documents"]) == (pytest.approx(numbers["nll"]), 3)
        assert [row["low"], row["high"]] == pytest.approx(numbers["nll_interval_95"])
    row, summary = points["slots", 64, 4, "window"], scores.summarize()
    found = [row["above_memory"], row["above_low"], row["above_high"]]
    gain = summary.comparison.below_window
    assert found == pytest.approx([gain.value, *gain.interval_95])
    # At 4x the NLL without slots is that of the point at 2x, the difference is to memory at 4x.
    nll = {mode: points["slots", 64, 4, mode]["nll"] for mode in ("raw", "memory")}
    above = points["slots", 64, 4, "raw"]["above_memory"]
    assert above == pytest.approx(nll["raw"] - nll["memory"])
    assert points["slots", 64, 4, "memory"]["above_memory"] is None
    with open("b/results.csv") as file:
        table = list(csv.DictReader(file))
    assert [line["mode"] for line in table] == [row["mode"] for row in rows]
    assert Path("b/plot.png").stat().st_size > 10_000 and Path("b/table.md").exists()


def test_the_setting_has_no_ratio_that_no_point_used(study):
    (row, *_) = study("--tokens", "32", "--ratios", "2", "--lengths")
    assert row["ratio"] == 2
    assert "ratio" not in json.loads(Path("b/results.json").read_text())["setting"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ratios", "3"], "--ratios: 3 does not divide the chunk size 16"),
        (["--ratio", "3"], "--ratio: 3 does not divide the chunk size 16"),
        (["--ratios", "4", "--tokens", "72"], "72 is not a multiple of the chunk size 16"),
        (["--ratios", "--lengths", "16"], "16 .* has fewer than 2 chunks"),
        (["--ratios", "--lengths"], "found no point in either"),
        (["--modes", "bm25"], "bm25 chooses passages by a question"),
        (["--modes", "snapkV"], "mode 'snapkV' is unknown"),
    ],
)
def test_points_that_do_not_fit_are_refused_without_the_model(study, monkeypatch, options, message):
    monkeypatch.setattr("uiollms.cli.study_budget.load_study_model", None)
    with pytest.raises(ConfigError, match=message):
        study("--tokens", "64", "--lengths", "64", "--ratios", "4", *options)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ratios", "8"], "has 0 documents of 512 tokens, 2 are needed"),
        (["--ratios", "2"], "a document of 512 tokens exceeds the capacity"),
    ],
)
def test_points_that_no_document_fits_are_refused(study, options, message):
    with pytest.raises(ConfigError, match=message):
        study("--tokens", "512", "--lengths", *options)
