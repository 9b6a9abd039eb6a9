"""Tests that a config's inputs are found in the working directory first and then beside the config,
and that outputs are written to the working directory."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_commands import ROOT, call

from uiollms.config.inputs import find_config
from uiollms.config.load import load_env_config, load_tasks
from uiollms.files import folders
from uiollms.files.folders import raw_dir


@pytest.fixture
def elsewhere(workspace, tmp_path, monkeypatch) -> Path:
    """Makes an empty folder the working directory. Returns the folder of the config."""
    project = Path.cwd()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(folders, "_config_folder", Path())
    folders.report_raw_dir.cache_clear()
    return project


def change(path: Path, **fields: object) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | fields))


def test_train_and_test_run_in_another_folder(elsewhere, caplog):
    before = {path for path in elsewhere.rglob("*") if Path.cwd() not in (path, *path.parents)}
    env = os.path.relpath(elsewhere / "env.json")
    caplog.set_level("INFO")
    assert call("train.py", "--env_conf", env) == 0
    shown = caplog.messages
    config = json.loads((elsewhere / "env.json").read_text())
    assert f"model.config is read from {elsewhere / config['model']['config']}" in shown
    corpus = config["train"]["corpus"][0]["name"]
    pattern = corpus.removeprefix("files:")
    assert f"{corpus} is read from {elsewhere / pattern}" in shown
    caplog.clear()
    assert call("test.py", "--env_conf", env, "--quiet") == 0
    assert caplog.messages == []
    # The run folder's config has the absolute paths, so that it works from any folder.
    saved = json.loads(Path("out/config.json").read_text())
    assert saved["model"]["config"] == str(elsewhere / config["model"]["config"])
    assert saved["model"]["save_ckp"] == "out/ckp" and Path("out/ckp/encoder").is_dir()
    assert {"metrics.jsonl", "test.json"} <= {path.name for path in Path("out").iterdir()}
    after = {path for path in elsewhere.rglob("*") if Path.cwd() not in (path, *path.parents)}
    assert after == before


def test_the_working_directory_comes_first(elsewhere):
    env = elsewhere / "env.json"
    compressor = json.loads(env.read_text())["model"]["config"]
    for folder in (elsewhere, Path.cwd()):
        (folder / "weights").mkdir()
        (folder / "books").mkdir()
    (elsewhere / "books" / "one.txt").write_text("A book.")
    changes = [
        "model.load_ckp=weights",
        "model.released_ckp=nowhere",
        "train.corpus.0.name=Files: books/*.txt",
        "model.save_ckp=weights/new",
    ]
    found = load_env_config(env, changes)
    assert found.model.config == str(elsewhere / compressor)
    assert (found.model.load_ckp, found.model.released_ckp) == ("weights", "nowhere")
    assert found.model.save_ckp == "weights/new"
    # A pattern that matches nothing in the working directory is looked up, too.
    assert found.train.corpus[0].name == f"files:{elsewhere}/books/*.txt"
    (Path("books") / "two.txt").write_text("Another book.")
    shutil.copy(elsewhere / compressor, compressor)
    found = load_env_config(env, changes)
    assert found.model.config == compressor
    assert found.train.corpus[0].name == "Files: books/*.txt"


def test_files_of_tasks_are_found_beside_the_config(elsewhere):
    (elsewhere / "novel.txt").write_text("A novel.")
    task = dict(task_type="perplexity", task_name="files:novel.txt", num_instance=1)
    (elsewhere / "more").mkdir()
    (elsewhere / "more" / "tasks.json").write_text(json.dumps([task | {"truncation": 64}]))
    change(elsewhere / "env.json", test="more/tasks.json")
    config = load_env_config(elsewhere / "env.json")
    assert config.test == str(elsewhere / "more" / "tasks.json")
    (found,) = load_tasks(config.test, elsewhere / "env.json")
    assert found.task_name == f"files:{elsewhere / 'novel.txt'}"
    assert load_tasks(config.test)[0].task_name == "files:novel.txt"


def test_faults_of_a_config_in_another_folder_are_reported_together(elsewhere, capsys):
    env = str(elsewhere / "env.json")
    flags = ["--set=train.max_lrr=1", "--set=model.load_ckp=nowhere"]
    assert call("train.py", "--env_conf", env, *flags) == 2
    (unknown, weights) = [
        line for line in capsys.readouterr().err.splitlines() if "is read from" not in line
    ]
    assert "train.max_lrr: unknown key" in unknown and "model.load_ckp: nowhere" in weights


def test_raw_data_beside_the_config(elsewhere, caplog, monkeypatch):
    monkeypatch.delenv("UIOLLMS_RAW_DATA", raising=False)
    (elsewhere / "raw_data").mkdir()
    assert raw_dir() == Path("raw_data")
    load_env_config(elsewhere / "env.json")
    with caplog.at_level("INFO"):
        assert raw_dir() == raw_dir() == elsewhere / "raw_data"
    assert caplog.messages.count(f"raw_data is read from {elsewhere / 'raw_data'}") == 1
    Path("raw_data").mkdir()
    assert raw_dir() == Path("raw_data")
    monkeypatch.setenv("UIOLLMS_RAW_DATA", "/data")
    assert raw_dir() == Path("/data")


def test_configs_of_the_package_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "smollm2-8x.json",
        "smollm2-16x.json",
        "demo.json",
        "config/experiments/learning.json",
    ):
        assert find_config(name) == ROOT / name
        config = load_env_config(name)
        assert Path(config.model.config).is_absolute() and Path(config.model.config).is_file()
        assert not Path(config.model.save_ckp or "none").is_absolute()
    assert load_env_config("smollm2-8x.json").model.released_ckp == str(
        ROOT / "adapters/smollm2-8x"
    )
    # Other files of a checkout are no configs of the package.
    for name in ("nowhere.json", "tests/fixtures", "../demo.json", "", "a\0b", "x" * 5000):
        assert find_config(name) == Path(name)
    Path("demo.json").write_text("{}")
    assert find_config("demo.json") == Path("demo.json")
