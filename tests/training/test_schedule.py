"""train_iters, save, eval and warmup count documents, as in the released program; older runs go
on in steps."""

import json
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
    """Page 2 as a loop over documents: (documents read, learning rate) of every optimizer step."""
    T, w = train.train_iters, int(train.train_iters * train.warmup)
    import math

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
    assert [(done, schedule.learning_rate(done)) for done in schedule.steps()] == released_loop(
        train
    )


def test_the_papers_run():
    schedule = Schedule(section(), 1)  # 10,000 documents, 1 % warm-up, peak 1e-4
    assert len(schedule.steps()) == 10_000 and schedule.learning_rate(1) == 0
    assert (
        schedule.learning_rate(51) == pytest.approx(0.5e-4) and schedule.learning_rate(101) == 1e-4
    )
    assert 0 < schedule.learning_rate(10_000) < 1e-11
    assert len(Schedule(section(accum_grad=8), 8).steps()) == 1250  # not eight times their work
    assert Schedule(section(accum_grad=8), 8).learning_rate(8) == pytest.approx(
        7e-6
    )  # document 7's


def test_a_warm_up_of_less_than_one_document_is_none():
    """The released program divides by zero here."""
    schedule = Schedule(section(train_iters=50, warmup=0.01), 1)
    assert schedule.learning_rate(1) == 1e-4 > schedule.learning_rate(2) > 0


def test_a_multiple_is_reached_by_the_first_step_that_passes_it():
    schedule = Schedule(section(train_iters=30), 4)
    assert [done for done in schedule.steps() if schedule.reaches(done, 10)] == [12, 20]
    assert [done for done in schedule.steps() if schedule.reaches(done, 3)] == list(
        schedule.steps()
    )
    assert (schedule.steps()[-1], schedule.left_over(28), schedule.left_over(32)) == (28, 2, 0)


def test_too_few_documents_for_one_step():
    with pytest.raises(
        ConfigError,
        match="train.train_iters: 7 documents are less than one step of 8 .* use at least 8",
    ):
        Schedule(section(train_iters=7, accum_grad=4), 8)


def test_a_run_counts_documents(workspace, capsys):
    changes = dict(train_iters=11, save=4, eval=7, accum_grad=3, warmup=0.5, keep_last=9)
    assert call(*TRAIN, *(f"--set=train.{name}={value}" for name, value in changes.items())) == 0
    steps = [line for line in lines_of() if "nll" in line]
    assert [line["iteration"] for line in steps] == [3, 6, 9]
    assert [line["tokens"] for line in steps] == [3 * 80] * 3
    assert [line["lr"] for line in steps] == [
        rate for _, rate in released_loop(section(**changes, max_lr=1e-2))
    ]
    assert [line["iteration"] for line in lines_of() if "eval" in line] == [
        9
    ]  # passes 7, and is the last
    saved = sorted(path.name for path in Path("out/checkpoints").iterdir())
    assert saved == ["step-00000006", "step-00000009"]  # 4 and 8 are passed
    shown = capsys.readouterr()
    assert "the last 2 of 11 documents fill no step and were left out" in shown.out
    assert "9/11" in shown.err.split("train: ")[-1] and "documents/s" in shown.err
    assert json.loads(Path("out/versions.json").read_text())["iterations"] == "documents"
    assert call(*TRAIN) == 0, "what is left over does not make a run unfinished"


def test_a_run_that_is_too_short_is_refused_before_the_model_loads(workspace, capsys):
    assert call(*TRAIN, "--set=train.accum_grad=4") == 2
    assert "3 documents are less than one step of 4" in capsys.readouterr().err


def test_an_evaluation_that_was_missed_is_made_though_a_step_is_smaller_now(workspace):
    """Stopped after 4 documents, behind the checkpoint: steps of 2 had passed eval = 3, steps of
    1 would not."""
    flags = (
        "--set=train.train_iters=8",
        "--set=train.eval=3",
        "--set=train.save=2",
        "--set=train.keep_last=9",
    )
    assert call(*TRAIN, *flags, "--set=train.accum_grad=2") == 0
    for path in Path("out/checkpoints").iterdir():
        if path.name > "step-00000004":
            shutil.rmtree(path)
    kept = [
        line
        for line in lines_of()
        if line["iteration"] < 4 or "nll" in line and line["iteration"] == 4
    ]
    Path("out/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert call(*TRAIN, "--resume", *flags, "--set=train.accum_grad=1") == 0
    assert [line["iteration"] for line in lines_of() if "eval" in line] == [4, 6, 8]
    assert [line["iteration"] for line in lines_of() if "nll" in line] == [2, 4, 5, 6, 7, 8]


def test_a_run_of_an_older_folder_keeps_counting_steps(workspace, tiny_folder, capsys):
    """Its 3 steps of 2 documents are followed by 3 more, at the rates and with the losses it
    would have had."""
    last = Path("out/checkpoints/step-00000003")
    shutil.copytree(FIXTURE / last.name, last)
    (last / "state.json").write_text(
        (last / "state.json").read_text().replace("MODEL", str(tiny_folder))
    )
    write_checksums(last)
    shutil.copy(FIXTURE / "metrics.jsonl", "out/metrics.jsonl")
    expected = lines_of()
    changes = dict(train_iters=6, save=3, eval=6, accum_grad=2, warmup=0.5, keep_last=9, tasks="[]")
    flags = [f"--set=train.{name}={value}" for name, value in changes.items()]

    assert call(*TRAIN, *flags) == 2
    assert (
        "out: contains an unfinished run, 3 of 6 steps done; continue it with --resume"
        in capsys.readouterr().err
    )
    assert call(*TRAIN, *flags, "--resume") == 0
    found = lines_of()
    for name in ("iteration", "lr", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    train = section(**changes | dict(tasks=[]))
    assert [line["lr"] for line in found] == [
        rate_of_step(i, Course(train.train_iters, 1e-2, train.warmup)) for i in range(6)
    ]
    # Float32 products of another processor or torch: far below what another document or rate
    # changes.
    assert [line["nll"] for line in found] == pytest.approx(
        [line["nll"] for line in expected], rel=1e-5
    )
    assert json.loads(Path("out/versions.json").read_text())["iterations"] == "steps"
    assert (
        json.loads(Path("out/checkpoints/step-00000006/state.json").read_text())["counts"]
        == "steps"
    )
    assert "after 3 of 6 steps" in Path("out/log.txt").read_text()
    assert (
        call(*TRAIN, *flags, "--resume", "--set=train.train_iters=8") == 0
    )  # once more, from a folder of today's
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
    def shares(*each: float) -> list[dict]:
        return [dict(name="sotu.train", partition=share) for share in each]

    assert section(corpus=shares(0.333, 0.333, 0.333)).corpus[0].partition == 0.333
    for wrong in ((0.333, 0.333, 0.332), (0.5, 0.502)):
        with pytest.raises(ValueError, match="they must sum to 1"):
            section(corpus=shares(*wrong))
    corpora = [[Document(f"{i}", "here")] for i in range(3)]
    near, exact = (Mixture(corpora, [share] * 3, seed=0) for share in (0.333, 1 / 3))
    assert [next(near).corpus for _ in range(3000)] == [next(exact).corpus for _ in range(3000)]
