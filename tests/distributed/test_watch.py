"""A signal to any process of a run at any moment ends all of them soon, with the last whole step
saved; a process that is lost is found; and one that only takes its time is not taken for lost."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import TRAIN, send_signal
from test_commands import call
from test_distributed import launched, run_folder  # noqa: F401  a fixture

import uiollms.build
import uiollms.distributed.groups
import uiollms.distributed.watch
import uiollms.evaluation.evaluator
import uiollms.runs.checks
import uiollms.runs.run
import uiollms.runs.state
import uiollms.training.step
from uiollms.distributed.groups import number_of_processes
from uiollms.files.errors import ConfigError

FLAGS = ("--set=train.train_iters=400", "--set=train.save=100", "--set=train.eval=100")
LONG = 60.0  # more than a process may take to end


def quick() -> None:
    """Seconds of a test in the place of a run's; what is logged is said."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    watch = uiollms.distributed.watch
    watch.FINISH, watch.END, watch.TELLING, watch.POLL = 1.0, 12.0, 0.5, 0.1


def at_call(module: object, name: str, number: int, action: Callable[[], object]) -> None:
    """Have the `number`-th call of a function begin with something else."""
    real, calls = getattr(module, name), 0

    def function(*arguments, **settings):
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return real(*arguments, **settings)

    setattr(module, name, function)


def soon(action: Callable[[], None]) -> None:
    threading.Timer(0.5, action).start()


# A moment of a run: what of it takes long in which process, and the call at which the signal comes.
MOMENTS = {
    "before they have met": (uiollms.runs.checks, "check_training", 1, None),
    "while the base is loaded": (uiollms.build, "load_memory_lm", 1, "both"),
    "in the first step": (uiollms.training.step, "gradient_step", 1, "both"),
    "in a step": (uiollms.training.step, "gradient_step", 5, "both"),
    "in a step of the other": (uiollms.training.step, "gradient_step", 5, "other"),
    "in an evaluation": (uiollms.evaluation.evaluator.Evaluation, "run", 1, "first"),
    "while a checkpoint is written": (uiollms.runs.run, "save_state", 1, "short"),
    "between steps": (uiollms.runs.run.Run, "stop_if_necessary", 5, None),
}


EARLY = ("before they have met", "while the base is loaded")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment(run_folder, moment, victim):  # noqa: F811
    module, name, number, slow = MOMENTS[moment]
    started = time.monotonic()

    def child(rank: int) -> int:
        quick()
        send = send_signal(signal.SIGTERM)

        def here() -> None:
            if rank == victim:
                soon(send) if slow else send()
            if slow == "both" or slow == "other" and rank != victim or slow == "first" and not rank:
                time.sleep(LONG)
            if slow == "short":
                time.sleep(3.0)

        if slow in ("first", "short") and rank:  # the others do not come there
            if rank == victim:
                at_call(uiollms.runs.run.Run, "save", 1, lambda: soon(send))
        else:
            at_call(module, name, number, here)
        return call(*TRAIN, *FLAGS)

    codes = launched(2, child, said="said")
    said = Path("said-0").read_text() + Path("said-1").read_text()
    assert codes == [143, 143] and "Traceback" not in said, said[-3000:]
    assert time.monotonic() - started < LONG / 2
    assert "did not come to an end by itself" not in said
    checkpoints = sorted(Path("out").glob("checkpoints/step-*"))
    if not checkpoints:
        assert moment == "in the first step" or moment in EARLY and "nothing was trained" in said
        return
    assert moment not in ("in the first step", "while the base is loaded")
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    last = max(line["iteration"] for line in lines)
    assert checkpoints[-1].name == f"step-{last:08d}" and 0 < last < 400
    assert said.count("stopped by SIGTERM; --resume continues the run") == 1
    end = f"--set=train.train_iters={last + 4}"
    assert call(*TRAIN, "--resume", end, "--set=train.tasks=[]") == 0


def test_a_step_given_up_is_taken_again(run_folder):  # noqa: F811
    """The run goes on with the documents that it would have had: the same numbers as
    uninterrupted."""
    flags = ("--set=train.tasks=[]", "--set=train.train_iters=16", "--set=train.save=100")
    assert launched(2, lambda rank: call(*TRAIN, *flags, "--set=train.run_dir=whole")) == [0, 0]

    def child(rank: int) -> int:
        quick()
        at_call(
            uiollms.training.step,
            "gradient_step",
            6,
            lambda: (soon(send_signal(signal.SIGTERM)), time.sleep(LONG)),
        )
        return call(*TRAIN, *flags)

    assert launched(2, child) == [143, 143]
    assert launched(2, lambda rank: call(*TRAIN, "--resume", *flags)) == [0, 0]

    def numbers(folder: str) -> list[tuple]:
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
        return [
            tuple(json.loads(line)[k] for k in ("iteration", "nll", "lr", "grad_norm"))
            for line in lines
        ]

    assert numbers("out") == numbers("whole") and len(numbers("out")) == 4


def test_a_process_that_does_not_end_is_ended(run_folder):  # noqa: F811
    """It sits in native code, which no signal of Python's interrupts."""

    def child(rank: int) -> int:
        quick()
        uiollms.distributed.watch.END = 4.0
        if not rank:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            at_call(
                uiollms.build,
                "load_memory_lm",
                1,
                lambda: (soon(send_signal(signal.SIGINT)), store.wait(["no"])),
            )
        return call(*TRAIN, *FLAGS)

    assert launched(2, child, said="said") == [130, 130]
    said = Path("said-0").read_text()
    assert "stopped by SIGINT: ended after 4 s in which it did not come to an end by itself" in said


def lost(run: Callable[[int], None], seconds: float = 2.0) -> tuple[list[int], str]:
    """Codes and words of a run in which a process counts as lost after some seconds."""

    def child(rank: int) -> int:
        quick()
        uiollms.distributed.watch.SILENCE = seconds
        run(rank)
        return call(*TRAIN, *FLAGS)

    codes = launched(2, child, said="said")
    return codes, Path("said-0").read_text() + Path("said-1").read_text()


LOST = "another process of this run has ended or cannot be reached"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_is_found_while_the_other_is_busy(run_folder, victim, number):  # noqa: F811
    """No message is under way that would fail."""

    def run(rank: int) -> None:
        if rank == victim:
            if number == signal.SIGSTOP:  # whoever waits for this process must not wait for ever
                threading.Timer(8.0, lambda: None).start()
                child = os.getpid()
                if not os.fork():
                    time.sleep(8)
                    os.kill(child, signal.SIGKILL)
                    os._exit(0)
            at_call(uiollms.training.step, "gradient_step", 5, send_signal(number))
        else:
            at_call(uiollms.training.step, "gradient_step", 5, lambda: time.sleep(LONG))

    started = time.monotonic()
    codes, said = lost(run)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 2
    assert time.monotonic() - started < LONG / 2
    assert LOST in said and "Traceback" not in said
    if victim == 1:  # the first process has the last whole step
        lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
        newest = max(Path("out/checkpoints").glob("step-*"))
        assert newest.name == f"step-{lines[-1]['iteration']:08d}"


def test_a_process_that_takes_its_time_is_not_lost(run_folder):  # noqa: F811
    """Longer than silence lasts: a base that is loaded, an evaluation, while the other waits."""

    def run(rank: int) -> None:
        if not rank:
            at_call(uiollms.build, "load_memory_lm", 1, lambda: time.sleep(4))
            at_call(uiollms.evaluation.evaluator.Evaluation, "run", 1, lambda: time.sleep(4))

    global FLAGS
    before, FLAGS = FLAGS, ("--set=train.train_iters=8",)
    try:
        assert lost(run, seconds=1.0)[0] == [0, 0]
    finally:
        FLAGS = before


def test_a_process_that_never_comes(workspace, monkeypatch):
    def child(rank: int) -> int:
        if rank:
            return 0
        from datetime import timedelta

        uiollms.distributed.groups.JOINING = timedelta(seconds=2)
        return call(*TRAIN, *FLAGS)

    assert launched(2, child, said="said")[0] == 2
    said = Path("said-0").read_text()
    assert LOST in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_NTASKS"])
@pytest.mark.parametrize("value", ["abc", "-7", "1e3", "9" * 5000, "²"])
def test_launchers_numbers_that_are_none(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"environment variable {name}: expected a whole number"):
        number_of_processes()


def test_launchers_numbers(monkeypatch):
    assert number_of_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "-1")
    assert number_of_processes() == 4


def test_train_refuses_them_before_all_else(workspace, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert call(*TRAIN) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .startswith("environment variable WORLD_SIZE: expected a whole number")
    )
