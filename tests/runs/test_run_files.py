"""No command overwrites or moves a file that somebody else has put where the command writes."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_model
from processes import TRAIN, run_forked
from test_checks import faults_of, nothing_is_loaded  # noqa: F401  a fixture
from test_commands import call

from uiollms import ConfigError
from uiollms.cli.chat import main as compress
from uiollms.files.atomic import atomic_file
from uiollms.runs import checks
from uiollms.runs.checks import check_evaluation
from uiollms.runs.run_files import RUN_FILES, TEST_RESULTS
from uiollms.weights.adapters import load_weights, save_weights

QUICK = ("--set=train.tasks=[]", "--quiet")
TEST = ("test.py", "--env_conf", "env.json", "--use_env_conf_tasks", "--quiet")


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- the run folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RUN_FILES, "lock"])
def test_a_file_of_the_users_is_neither_moved_nor_replaced(workspace, capsys, name):
    Path("mine").mkdir()
    Path("mine", name).write_text("a year of work", encoding="utf-8")
    for command in (TRAIN, TEST) if name in TEST_RESULTS else (TRAIN,):
        assert call(*command, "--set=train.run_dir=mine") == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"env.json: train.run_dir: mine/{name}: ")
        assert line.endswith("would be lost; choose another train.run_dir, or move the file")
    assert files_in(Path("mine")) == {name: b"a year of work"}


def test_a_run_in_the_folder_of_its_configs(workspace, capsys):
    tasks = json.dumps(dict(tasks=json.loads(Path("env.json").read_text())["train"]["tasks"]))
    Path("test.json").write_text(tasks, encoding="utf-8")
    before = files_in(Path())
    for command in (TRAIN, ("test.py", "--env_conf", "env.json")):
        assert call(*command, "--set=train.run_dir=.") == 2
        printed = capsys.readouterr().err
        assert printed.startswith(
            "env.json: train.run_dir: test.json: was not written by a run and would be lost"
        )
    assert files_in(Path()) == before
    Path("test.json").rename("tasks.json")
    assert call(*TRAIN, *QUICK, "--set=train.run_dir=.") == 0
    Path("test.json").write_text(tasks, encoding="utf-8")  # in a run's folder, but not a run's
    assert call(*TRAIN, *QUICK, "--set=train.run_dir=.") == 2
    assert Path("test.json").read_text(encoding="utf-8") == tasks


def test_files_of_a_run_move_to_earlier(workspace):
    assert call(*TEST, "--set=train.run_dir=out") == 0
    assert call(*TEST, "--set=train.run_dir=out") == 0, "the results of test.py are a run's"
    assert not Path("out/lock").exists()
    assert call(*TRAIN, *QUICK) == 0
    assert {path.name for path in Path("out/earlier-1").iterdir()} == set(TEST_RESULTS)
    assert call(*TRAIN, *QUICK) == 0
    assert Path("out/earlier-2/metrics.jsonl").exists()
    Path(
        "out/versions.json"
    ).unlink()  # as if the process had been killed before it wrote this file
    assert call(*TRAIN, *QUICK) == 0
    shutil.copytree("out/checkpoints", "there/checkpoints")  # to resume it on another machine
    longer = ("--set=train.run_dir=there", "--set=train.train_iters=4")
    assert call(*TRAIN, *QUICK, "--resume", *longer) == 0
    assert not Path("there/earlier-1").exists()


# ---- the path of the weights ---------------------------------------------------------------------


INSIDE = {
    "out": "would replace the run folder (out)",
    ".": "would replace the run folder (out)",
    "out/checkpoints": "is inside the run folder's own checkpoints (out)",
    "out/checkpoints/best": "is inside the run folder's own checkpoints (out)",
    "out/tensorboard/ckp.pth": "is inside the run folder's own tensorboard (out)",
    "out/x/../plots/ckp": "is inside the run folder's own plots (out)",
    "out/earlier-1/ckp": "is inside the run folder's own earlier-1 (out)",
    "link/config.json": "is inside the run folder's own config.json (out)",
}


@pytest.mark.parametrize("path", INSIDE)
def test_weights_inside_a_runs_own_folders(workspace, nothing_is_loaded, path):  # noqa: F811
    Path("link").symlink_to("out")
    found = faults_of(f"model.save_ckp={path}", "train.max_lr=0.1")
    expected = f"model.save_ckp: {path}: {INSIDE[path]}; choose another, such as out/checkpoint"
    assert expected in found
    found = faults_of(f"model.save_ckp={path}", check=lambda *a: check_evaluation(*a, True))
    # Weights that do not exist yet are not evaluated. The working directory exists, without weights.
    assert [line.split(": ")[2] for line in found] == ["is no checkpoint"] * (path == ".")


@pytest.mark.parametrize("name", ["ckp", "ckp.pth"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_gets_the_weights(tmp_path, name, there):
    model = make_model("llama", torch.float32)
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    link, target = tmp_path / "run" / name, tmp_path / "disk" / name
    link.symlink_to(f"../disk/{name}")
    if there:
        save_weights(model, target)
    for _ in range(2):
        save_weights(model, link)
        assert link.is_symlink() and [path.name for path in link.parent.iterdir()] == [name]
        assert [path.name for path in target.parent.iterdir()] == [name]
    load_weights(model, target)


def test_a_link_that_leads_nowhere_and_a_file_that_is_no_weights(tmp_path):
    model = make_model("llama", torch.float32)
    (tmp_path / "ckp").symlink_to("unmounted/ckp")
    with pytest.raises(ConfigError, match="ckp: is a link to .*/unmounted/ckp, whose folder is"):
        save_weights(model, tmp_path / "ckp")
    (tmp_path / "other.pth").write_bytes(b"a year of work")
    with pytest.raises(ConfigError, match="other.pth: weights would replace it, but it is no list"):
        save_weights(model, tmp_path / "other.pth")
    torch.save({"weight": torch.ones(1)}, tmp_path / "model.pth")
    with pytest.raises(ConfigError, match="model.pth: weights would replace it, but it is no list"):
        save_weights(model, tmp_path / "model.pth")
    assert (tmp_path / "other.pth").read_bytes() == b"a year of work"


def test_two_runs_with_one_path_for_weights(workspace, monkeypatch, capsys):
    monkeypatch.setattr(checks, "ENDING", 0.1)
    Path("shared").mkdir()
    Path("link").symlink_to("shared")
    program = "import filelock; lock = filelock.FileLock('shared/.ckp-lock'); "
    program += "lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for path in ("shared/ckp", "link/ckp"):
            assert call(*TRAIN, *QUICK, f"--set=model.save_ckp={path}") == 2
            printed = capsys.readouterr().err.strip()
            expected = "another run saves its weights here; choose another model.save_ckp"
            assert printed == f"{path}: {expected}"
        assert not Path("out/metrics.jsonl").exists()
        monkeypatch.setattr(checks, "ENDING", 60.0)  # a run that is stopping is waited for
        threading.Timer(1.0, lambda: other.stdin.close()).start()
        assert call(*TRAIN, *QUICK, "--set=model.save_ckp=shared/ckp") == 0


# ---- what test.py and compress write -------------------------------------------------------------


def test_scoring_waits_for_a_folder(workspace, nothing_is_loaded, capsys):  # noqa: F811
    assert call(*TEST, "--set=train.run_dir=book0.txt/x") == 2
    assert capsys.readouterr().err.startswith(
        "env.json: train.run_dir: book0.txt/x: cannot be written (Not a directory"
    )


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path, link = tmp_path / "disk" / "a.json", tmp_path / "a.json"
    path.parent.mkdir()
    path.write_text("before", encoding="utf-8")
    link.symlink_to(path)
    with pytest.raises(OSError, match="full"), atomic_file(link) as work:
        work.write_text("half", encoding="utf-8")
        raise OSError("full")
    assert path.read_text(encoding="utf-8") == "before" and os.listdir(path.parent) == ["a.json"]
    with atomic_file(link) as work:
        work.write_text("after", encoding="utf-8")
    assert link.is_symlink() and path.read_text(encoding="utf-8") == "after"
    assert os.listdir(path.parent) == ["a.json"]


def test_results_that_cannot_be_written_leave_those_before(workspace, capsys):
    assert call(*TEST) == 0
    before = files_in(Path("out"))

    def on_a_full_disk() -> int:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return call(*TEST[:-1], "--json")

    assert run_forked(on_a_full_disk, output="/dev/null") == 2
    assert files_in(Path("out")) == before


def test_compress_replaces_memories_only(workspace, nothing_is_loaded):  # noqa: F811
    Path("notes.mem").write_text("a year of work", encoding="utf-8")
    command = ["compress", "book0.txt", "--env_conf", "env.json", "-o"]
    with pytest.raises(ConfigError, match="--output notes.mem: the existing file is not a"):
        compress([*command, "notes.mem"])
    assert Path("notes.mem").read_text(encoding="utf-8") == "a year of work"
    with pytest.raises(ConfigError, match="book1.txt: cannot be written .Not a directory"):
        compress([*command, "book1.txt/x.mem"])
