"""Tests the commands that make the paper's tables: their steps, how they continue, and the numbers
that they read."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_base
from test_commands import ROOT

from uiollms.__main__ import main as uiollms_main
from uiollms.build import check_env
from uiollms.cli.common import Output
from uiollms.cli.common import make_parser as program_parser
from uiollms.cli.study import main as study
from uiollms.cli.study_options import make_parser
from uiollms.cli.study_tables import (
    TABLES,
    describe_table,
    finished_steps,
    make_table,
    prepare,
)
from uiollms.config.load import load_env_config, load_memory_config, load_tasks
from uiollms.evaluation.statistics import Estimate
from uiollms.files.errors import ConfigError
from uiollms.study.ablations import step_share
from uiollms.study.experiments import (
    SCALES,
    Cell,
    Experiment,
    StudyTable,
    of_seeds,
    of_test,
    plot_cells,
    read_cells,
    table_texts,
)
from uiollms.study.paper_tables import PAPER_TABLES, train_and_test
from uiollms.study.recall import VOCABULARY


def arguments(*words: str):
    args = make_parser().parse_args([*words])
    args.output = Output(quiet=True)
    return args


@pytest.mark.parametrize(
    "name, scale", [(name, scale) for name, make in TABLES.items() for scale in make().steps]
)
def test_every_step_is_a_command_with_a_valid_config(tmp_path, monkeypatch, name, scale):
    monkeypatch.chdir(tmp_path)
    table = TABLES[name]()
    names = [step.name for step in table.steps[scale]]
    read = {cell.step for cell in table.cells[scale]}
    assert read == set(names) if table.source else read < set(names)
    for step in table.steps[scale]:
        step = prepare(step, Path("out"), [])
        program, *rest = step.command
        if program == "study":
            args = make_parser().parse_args(rest)
            assert args.out == Path("out") / step.name
            if hasattr(args, "env_conf"):
                load_env_config(args.env_conf)
            continue
        args = program_parser("x", evaluation=program == "test").parse_args(rest)
        config = load_env_config(args.env_conf)
        check_env(config, args.env_conf)
        assert config.train.run_dir == f"out/{step.name}"
        assert len(load_tasks(config.test)) >= 1
        if config.model.load_ckp:  # weights are only loaded into a compressor of their sizes
            trained = Path(config.model.load_ckp) / "memory_config.json"
            if config.model.load_ckp == "out/start/checkpoint":
                assert names.index("start") < names.index(step.name)
                trained = Path("out/start/memory.json")
            assert load_memory_config(config.model.config) == load_memory_config(trained)
        if program == "train":  # test.py then evaluates what was trained
            assert config.model.save_ckp == f"out/{step.name}/checkpoint"


def test_the_papers_numbers_are_those_of_the_faithfulness_page():
    """So none is invented: every number has its source on that page."""
    page = (ROOT / "docs/faithfulness.md").read_text() + (ROOT / "docs/results.md").read_text()
    known = {
        cell.paper
        for make in PAPER_TABLES.values()
        for scale in SCALES
        for cell in make().cells[scale]
        if cell.paper is not None
    }
    assert len(known) == 13
    for number in known:
        assert f"{number:g}" in page or f"{number:.3f}" in page, number


def tiny_table() -> StudyTable:
    """A training and an evaluation of the tiny model, and an evaluation alone."""
    task = {"task_type": "perplexity", "task_name": "files:book*.txt", "num_instance": 3}
    task |= {"truncation": 100, "compare": ["window"]}
    few = {"train_iters": 2, "save": 1, "eval": 2, "tasks": []}
    trained = Experiment("env.json", train=few, tasks=[task])
    alone = replace(trained, memory={"num_memory": 4})
    steps = [*train_and_test("one", trained, "one"), train_and_test("two", alone, "two")[1]]
    cells = [
        Cell("one", "perplexity", "one", of_test(0, "perplexity"), 9.84),
        Cell("two", "NLL", "two", of_test(0, "nll", "window")),
        Cell("two", "window - own", "two", of_test(0, "below_window")),
    ]
    notes = {"small": "tiny"}
    return StudyTable("a table", "a paper", notes, {"small": steps}, {"small": cells})


@pytest.fixture
def with_tiny_table(workspace, monkeypatch):
    """`paper-table1` is the table of `tiny_table`, with the workspace's config as shipped one."""
    monkeypatch.setattr("uiollms.cli.study_tables.shipped_dir", lambda: workspace)
    monkeypatch.setitem(TABLES, "paper-table1", tiny_table)


def test_a_table_continues_with_the_step_that_failed(with_tiny_table):
    calls = []

    def run(command):
        calls.append((command[0], Path(command[2]).parent.name))
        if len(calls) == 2:
            raise ConfigError("the machine went away")
        assert not uiollms_main(command)

    args, out = arguments("paper-table1"), Path("out/table")
    with pytest.raises(ConfigError, match="went away"):
        make_table(args, out, run)
    with (out / "steps.jsonl").open("a") as file:
        file.write('{"name": "one", "comm')  # killed while it wrote
    assert len(finished_steps(out)) == 1
    setting, rows = make_table(args, out, run)
    assert calls == [("train", "one"), ("test", "one"), ("test", "one"), ("test", "two")]
    assert setting["table"] == "paper-table1" and setting["notes"] == "tiny"

    one, two = (json.loads((out / name / "test.json").read_text()) for name in ("one", "two"))
    assert one["weights"] == "out/table/one/checkpoint" and two["weights"] is None
    assert one["results"][0]["num_memory"] == 2 and two["results"][0]["num_memory"] == 4
    (one,), (two,) = one["results"], two["results"]
    assert rows[0]["here"] == one["memory"]["perplexity"] and rows[0]["paper"] == 9.84
    assert [rows[0]["low"], rows[0]["high"]] == one["memory"]["interval_95"]
    assert rows[1]["here"] == two["window"]["nll"]
    assert rows[2]["here"] == two["below_window"]
    assert [rows[2]["low"], rows[2]["high"]] == two["below_window_interval_95"]
    texts = table_texts(rows)
    assert [text["paper"] for text in texts] == ["9.84", "not stated here", "not stated here"]
    assert (out / "plot.png").stat().st_size > 5_000

    make_table(args, out, run)  # nothing is left to do
    assert len(calls) == 4
    make_table(arguments("paper-table1", "--set", "model.attn_implementation=sdpa"), out, run)
    assert len(calls) == 7  # another config: all steps run again


def test_a_dry_run_prints_steps_and_costs_and_runs_nothing(with_tiny_table, capsys):
    args = arguments("paper-table1", "--dry_run")
    args.output = Output()
    _, rows = describe_table(args, Path("out/table"))
    text = capsys.readouterr().out
    assert "uiollms train --env_conf out/table/one/env.json --resume" in text
    assert [row["documents"] for row in rows] == [2, 3, 3]
    assert rows[0]["memory"].startswith("cpu ") and float(rows[0]["FLOPs"].split()[-1]) > 1e6
    assert rows[1]["tokens"] == "at most 300, in up to 2 modes"
    assert not list(Path("out/table").glob("*/test.json"))


def test_a_failed_command_ends_the_table_with_one_line(with_tiny_table, monkeypatch):
    for book in Path().glob("book*.txt"):
        book.unlink()
    with pytest.raises(ConfigError, match="--quiet` ended with exit code 2; started again, the"):
        make_table(arguments("paper-table1"), Path("out/table"))


def test_table6_reads_the_curves_of_its_trainings(workspace, monkeypatch, capsys):
    """The base is an untrained one, and every training has one step and few documents."""
    base = make_base(vocab_size=VOCABULARY, max_position_embeddings=128)
    monkeypatch.setattr("uiollms.cli.study.train_base", lambda folder, bar: base)

    def run(command):
        short = {"80": "1", "3": "2"}
        assert not uiollms_main([short.get(word, word) for word in command])

    monkeypatch.setattr("uiollms.cli.study_tables.run_command", run)
    study(["paper-table6", "--out", "out/table6"])
    found = json.loads(Path("out/table6/results.json").read_text())
    last = {}
    for step in ("head", "no-head"):
        (path,) = Path("out/table6").glob(f"{step}/distance-4/curves.jsonl")
        setting, *curves = map(json.loads, path.read_text().splitlines())
        assert setting["memory"]["transfer_head"] == (step == "head")
        for curve in curves:
            assert curve["S"] == 2
            last.setdefault((step, curve["estimator"]), []).append(curve["nll"][-1])
    assert {key: len(nll) for key, nll in last.items()} == {
        ("head", "uio"): 2,
        ("head", "tbptt"): 2,
        ("no-head", "uio"): 2,
    }
    rows = {(row["row"], row["number"].split()[1]): row for row in found["rows"]}
    for row, key in (
        ("UIO-TBPTT with transfer head", ("head", "uio")),
        ("UIO-TBPTT without transfer head", ("no-head", "uio")),
        ("TBPTT with transfer head", ("head", "tbptt")),
    ):
        nll = last[key]
        assert rows[row, "of"]["here"] == pytest.approx(statistics.mean(nll))
        # 12.706 is the quantile of Student's t for two values.
        half = 12.706 * statistics.stdev(nll) / math.sqrt(2)
        assert rows[row, "of"]["high"] - rows[row, "of"]["here"] == pytest.approx(half)
        if key != ("head", "uio"):
            gain = statistics.mean(a - b for a, b in zip(nll, last["head", "uio"], strict=True))
            assert rows[row, "minus"]["here"] == pytest.approx(gain)
    assert "not stated here" in Path("out/table6/table.md").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    assert "not stated" in shown and f"{rows[row, 'of']['here']:.3f}" in shown


def test_ablations_read_paired_differences(tmp_path):
    """By hand: seed by seed the variant is 0.5, 0.7 above its base at the end. In equal time it
    has half of the iterations, where its curve is 1 higher."""
    for name, shift in (("base", (0.0, 0.0)), ("variant", (0.5, 0.7))):
        for seed in (0, 1):
            lines = [
                {"iteration": i, "eval": [{"bound": 2 - nll, "memory": {"nll": nll}}]}
                for i, nll in ((10, 3 + seed + shift[seed]), (20, 1 + seed + shift[seed]))
            ]
            (tmp_path / f"{name}-{seed}").mkdir()
            text = "".join(json.dumps(line) + "\n" for line in [{"iteration": 5}, *lines])
            (tmp_path / f"{name}-{seed}/metrics.jsonl").write_text(text)

    def share(table, variant):
        assert table == tmp_path
        return {"base": 1.0, "variant": 0.75}[variant]

    def read(*arguments, **options):
        return of_seeds("variant", (0, 1), *arguments, **options)(tmp_path / "variant-0")

    assert read("nll").value == pytest.approx((1.5 + 2.7) / 2)
    value, (low, high) = read("nll", minus="base")
    half = 12.706 * statistics.stdev([0.5, 0.7]) / math.sqrt(2)
    assert [value, low, high] == pytest.approx([0.6, 0.6 - half, 0.6 + half])
    assert read("bound", mode=None, minus="base").value == pytest.approx(-0.6)
    assert read("nll", minus="base", share=share).value == pytest.approx(0.6 + 1.0)


def test_the_share_of_an_estimator_is_that_of_its_step(tmp_path):
    rows = [{"estimator": "uio, no factor", "seconds": 4.0}, {"estimator": "exact", "seconds": 5.0}]
    (tmp_path / "cost").mkdir()
    (tmp_path / "cost/results.json").write_text(json.dumps({"rows": rows}))
    assert step_share(tmp_path, "uio-no-factor") == 1.0
    assert step_share(tmp_path, "exact") == 0.8


def test_only_the_papers_tables_have_a_column_for_the_paper(tmp_path):
    cells = [Cell("a", "NLL", "a", lambda folder: Estimate(1.25, (1.0, 1.5)))]
    rows = read_cells(cells, tmp_path, with_paper=False)
    assert table_texts(rows) == [
        {"row": "a", "number": "NLL", "here (95 % interval)": "1.250 (1.000 .. 1.500)"}
    ]
    plot_cells(rows, tmp_path / "plot.png")
    assert table_texts(read_cells(cells, tmp_path))[0]["paper"] == "not stated here"
