"""Tests that train_iters, save, eval and warmup count documents, as in the released program, and
that runs of older versions continue in steps."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_commands import call

from uiollms.config.load import load_env_config
from uiollms.config.sections import TrainSection
from uiollms.data import Mixture
from uiollms.data.documents import Document
from uiollms.files.atomic import write_checksums
from uiollms.files.errors import ConfigError
from uiollms.training.schedule import Course, Schedule, rate_of_step

ROOT = Path(__file__).parents[2]
TRAIN = ["train.py", "--env_conf", "env.json"]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "counted-in-steps"


def section(**changes) -> TrainSection:
    fields = dict(tbptt=2, train_iters=10_000, max_lr=1e-4, warmup=0.01, save=1000, eval=1000)
    corpus = [dict(name="sotu.train", partition=1.0)]
    return TrainSection.model_validate_json(json.dumps(fields | dict(corpus=corpus) | changes))


def lines_of(folder: str = "out") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def released_loop(train: TrainSection) -> list[tuple[int, float]]:
    """The released program's loop over documents. Returns the documents read and the learning rate
    of every optimizer step."""
    T, w = train.train_iters, int(train.train_iters * train.warmup)
    steps = []
    for i in range(T):
        if i / T < train.warmup:
            lr = train.max_lr * i / w
        else:
            lr = train.max_lr / 2 * (1 + math.cos(math.pi * (i - w) / (T - w)))
        if (i + 1) % train.accum_grad == 0:
            steps.append((i + 1, lr))
    return steps


@pytest.mark.parametrize(
    "changes",
    [{}, dict(accum_grad=8), dict(train_iters=30, accum_grad=4, warmup=0.35), dict(warmup=0.0)],
)
def test_steps_and_rates_are_those_of_the_released_loop(changes):
    train = section(**changes)
    schedule = Schedule(train, train.accum_grad)
    found = [(done, schedule.learning_rate(done)) for done in schedule.steps()]
    assert found == released_loop(train)


def test_the_schedule_of_the_papers_run():
    """It has 10,000 documents, a warm-up of 1 % and a peak of 1e-4."""
    schedule = Schedule(section(), 1)
    assert len(schedule.steps()) == 10_000 and schedule.learning_rate(1) == 0
    assert schedule.learning_rate(51) == pytest.approx(0.5e-4)
    assert schedule.learning_rate(101) == 1e-4
    assert 0 < schedule.learning_rate(10_000) < 1e-11
    # accum_grad 8 reads as many documents, in an eighth of the steps.
    accumulated = Schedule(section(accum_grad=8), 8)
    assert len(accumulated.steps()) == 1250
    # The rate of the first step is that of its last document, which has the index 7.
    assert accumulated.learning_rate(8) == pytest.approx(7e-6)


def test_a_warm_up_shorter_than_one_document_is_left_out():
    """The released program divides by zero here."""
    schedule = Schedule(section(train_iters=50, warmup=0.01), 1)
    assert schedule.learning_rate(1) == 1e-4 > schedule.learning_rate(2) > 0


def test_the_first_step_that_passes_a_multiple_reaches_it():
    schedule = Schedule(section(train_iters=30), 4)
    assert [done for done in schedule.steps() if schedule.reaches(done, 10)] == [12, 20]
    assert all(schedule.reaches(done, 3) for done in schedule.steps())
    assert (schedule.steps()[-1], schedule.left_over(28), schedule.left_over(32)) == (28, 2, 0)


def test_fewer_documents_than_one_step_are_refused():
    message = "train.train_iters: 7 documents are less than one step of 8 .* use at least 8"
    with pytest.raises(ConfigError, match=message):
        Schedule(section(train_iters=7, accum_grad=4), 8)


def test_iterations_of_a_run_count_documents(workspace, capsys):
    changes = dict(train_iters=11, save=4, eval=7, accum_grad=3, warmup=0.5, keep_last=9)
    assert call(*TRAIN, *(f"--set=train.{name}={value}" for name, value in changes.items())) == 0
    steps = [line for line in lines_of() if "nll" in line]
    assert [line["iteration"] for line in steps] == [3, 6, 9]
    assert [line["tokens"] for line in steps] == [3 * 80] * 3
    rates = [rate for _, rate in released_loop(section(**changes, max_lr=1e-2))]
    assert [line["lr"] for line in steps] == rates
    # The step at 9 documents passes 7 and is the last.
    assert [line["iteration"] for line in lines_of() if "eval" in line] == [9]
    # The steps at 6 and 9 documents pass 4 and 8.
    saved = sorted(path.name for path in Path("out/checkpoints").iterdir())
    assert saved == ["step-00000006", "step-00000009"]
    output = capsys.readouterr()
    assert "the last 2 of 11 documents do not fill a step and were left out" in output.out
    assert "9/11" in output.err.split("train: ")[-1] and "documents/s" in output.err
    assert json.loads(Path("out/versions.json").read_text())["iterations"] == "documents"
    assert call(*TRAIN) == 0, "documents that are left out must not make a run unfinished"


def test_a_run_that_is_too_short_is_refused_before_the_model_loads(workspace, capsys):
    assert call(*TRAIN, "--set=train.accum_grad=4") == 2
    assert "3 documents are less than one step of 4" in capsys.readouterr().err


def test_a_resumed_run_with_smaller_steps_makes_the_evaluation_that_was_due(workspace):
    """The run stops after 4 documents, between the checkpoint and the evaluation. A step of 2
    documents has passed eval = 3 there, and a step of 1 document would not."""
    changes = dict(train_iters=8, eval=3, save=2, keep_last=9)
    flags = [f"--set=train.{name}={value}" for name, value in changes.items()]
    assert call(*TRAIN, *flags, "--set=train.accum_grad=2") == 0
    for path in Path("out/checkpoints").iterdir():
        if path.name > "step-00000004":
            shutil.rmtree(path)
    lines = [
        line
        for line in lines_of()
        if line["iteration"] < 4 or "nll" in line and line["iteration"] == 4
    ]
    Path("out/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call(*TRAIN, "--resume", *flags, "--set=train.accum_grad=1") == 0
    assert [line["iteration"] for line in lines_of() if "eval" in line] == [4, 6, 8]
    assert [line["iteration"] for line in lines_of() if "nll" in line] == [2, 4, 5, 6, 7, 8]


def test_a_run_of_an_older_version_continues_in_steps(workspace, tiny_folder, capsys):
    """After its 3 steps of 2 documents it takes 3 more, with the rates and losses that the older
    version would have had."""
    last = Path("out/checkpoints/step-00000003")
    shutil.copytree(FIXTURE / last.name, last)
    state = (last / "state.json").read_text().replace("MODEL", str(tiny_folder))
    (last / "state.json").write_text(state)
    write_checksums(last)
    shutil.copy(FIXTURE / "metrics.jsonl", "out/metrics.jsonl")
    expected = lines_of()
    changes = dict(train_iters=6, save=3, eval=6, accum_grad=2, warmup=0.5, keep_last=9, tasks="[]")
    flags = [f"--set=train.{name}={value}" for name, value in changes.items()]

    assert call(*TRAIN, *flags) == 2
    message = "out: contains an unfinished run, 3 of 6 steps done; continue it with --resume"
    assert message in capsys.readouterr().err
    assert call(*TRAIN, *flags, "--resume") == 0
    found = lines_of()
    for name in ("iteration", "lr", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    train = section(**changes | dict(tasks=[]))
    course = Course(train.train_iters, 1e-2, train.warmup)
    assert [line["lr"] for line in found] == [rate_of_step(i, course) for i in range(6)]
    # Another processor or torch rounds float32 products differently. Another document or rate
    # would change the losses far more.
    losses = [line["nll"] for line in expected]
    assert [line["nll"] for line in found] == pytest.approx(losses, rel=1e-5)
    assert json.loads(Path("out/versions.json").read_text())["iterations"] == "steps"
    new_state = json.loads(Path("out/checkpoints/step-00000006/state.json").read_text())
    assert new_state["counts"] == "steps"
    assert "after 3 of 6 steps" in Path("out/log.txt").read_text()
    # The run continues once more, now from a checkpoint of this version.
    assert call(*TRAIN, *flags, "--resume", "--set=train.train_iters=8") == 0
    assert [line["iteration"] for line in lines_of()] == list(range(1, 9))


def test_clip_grad_null_does_not_clip(workspace):
    for folder, clip in (("a", "null"), ("b", "1e30"), ("c", "1e-3")):
        changes = (
            f"train.clip_grad={clip}",
            f"model.save_ckp={folder}.pth",
            "train.tasks=[]",
            f"train.run_dir={folder}",
        )
        assert call(*TRAIN, *(f"--set={change}" for change in changes)) == 0
    a, b, c = (torch.load(f"{name}.pth", weights_only=True) for name in "abc")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    assert load_env_config("env.json", ["train.clip_grad=null"]).train.clip_grad is None


def test_shares_that_sum_to_nearly_one_are_normalised(workspace):
    def corpus_of(*partitions: float) -> list[dict]:
        return [dict(name="sotu.train", partition=partition) for partition in partitions]

    assert section(corpus=corpus_of(0.333, 0.333, 0.333)).corpus[0].partition == 0.333
    for wrong in ((0.333, 0.333, 0.332), (0.5, 0.502)):
        with pytest.raises(ValueError, match="they must sum to 1"):
            section(corpus=corpus_of(*wrong))
    corpora = [[Document(f"{i}", "here")] for i in range(3)]
    near, exact = (Mixture(corpora, [share] * 3, seed=0) for share in (0.333, 1 / 3))
    assert [next(near).corpus for _ in range(3000)] == [next(exact).corpus for _ in range(3000)]
