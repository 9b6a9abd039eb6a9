"""The trackers of train.log_with, in their offline modes. A package that is not installed skips its
test: pip install wandb trackio mlflow-skinny runs them all."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import accelerate.utils
import pytest
from processes import TRAIN
from test_commands import call

from uiollms.runs import trackers
from uiollms.runs.metrics import read_metrics
from uiollms.runs.trackers import Tracker, tracker_fault


def train_and_resume(tracker: str) -> tuple[list[int], list[float]]:
    """Trains two steps and, resumed, two more. Returns the iterations and losses in
    metrics.jsonl."""
    flags = (f'--set=train.log_with=["{tracker}"]', "--set=train.save=1", "--set=train.seed=7")
    assert call(*TRAIN, *flags, "--set=train.train_iters=2") == 0
    assert call(*TRAIN, *flags, "--set=train.train_iters=4", "--resume") == 0
    steps = [line for line in read_metrics(Path("out")) if "nll" in line]
    assert "cannot be used" not in Path("out/log.txt").read_text()
    return [line["iteration"] for line in steps], [line["nll"] for line in steps]


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yields the records of an offline run of wandb: 7 bytes of file header, then LevelDB's log
    format, blocks of 32 KiB of fragments with a checksum, a length and a type (1 whole, 2 first,
    3 middle, 4 last)."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 2**15 - position % 2**15) < 7:  # no header fits the end of a block
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline(workspace, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    iterations, losses = train_and_resume("wandb")
    found, constants = [], {}
    files = sorted(Path("out/wandb").glob("offline-run-*/run-*.wandb"))
    name = json.loads(Path("out/trackers.json").read_text())["wandb"]
    assert len(files) == 2 and {path.name for path in files} == {f"run-{name}.wandb"}
    for path in files:
        for data in wandb_records(path):
            record = Record.FromString(data)
            for item in record.config.update:
                constants[item.key or item.nested_key[0]] = json.loads(item.value_json)
            values = {
                (item.key or item.nested_key[0]): json.loads(item.value_json)
                for item in record.history.item
            }
            if "train/nll/paper" in values:
                found.append((values["_step"], values["train/nll/paper"]))
    assert found == list(zip(iterations, losses, strict=True))
    assert constants["train.seed"] == 7 and constants["compressor.num_memory"] == 2


def test_mlflow_in_files(workspace, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{workspace}/mlruns")
    iterations, losses = train_and_resume("mlflow")
    name = json.loads(Path("out/trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("uiollms").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (name, "out", "FINISHED")
    history = client.get_metric_history(name, "train/nll/paper")
    assert [(metric.step, metric.value) for metric in history] == list(
        zip(iterations, losses, strict=True)
    )
    assert run.data.params["train.seed"] == "7" and run.data.params["compressor.num_memory"] == "2"


def test_trackio_on_disk(workspace, monkeypatch, capfd):
    """stdout stays JSON, although trackio prints to it."""
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):  # read from TRACKIO_DIR when trackio was imported
        monkeypatch.setattr(module, "TRACKIO_DIR", workspace / "trackio")
    flags = ('--set=train.log_with=["trackio"]', "--set=train.save=1", "--quiet", "--json")
    assert call(*TRAIN, *flags, "--set=train.train_iters=2") == 0
    assert call(*TRAIN, *flags, "--set=train.train_iters=4", "--resume") == 0
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    steps = [line for line in read_metrics(Path("out")) if "nll" in line]
    assert [line for line in printed if "nll" in line] == steps
    name = json.loads(Path("out/trackers.json").read_text())["trackio"]
    assert name.startswith("out-")
    with sqlite3.connect(workspace / "trackio" / "uiollms.db") as database:
        query = "select run_name, step, metrics from metrics order by id"
        rows = [(run, step, json.loads(text)) for run, step, text in database.execute(query)]
        configs = [json.loads(text) for (text,) in database.execute("select config from configs")]
    assert [row for row in rows if "train/nll/paper" in row[2]] and {row[0] for row in rows} == {
        name
    }
    assert [
        (step, values["train/nll/paper"]) for _, step, values in rows if "train/nll/paper" in values
    ] == [(line["iteration"], line["nll"]) for line in steps]
    assert configs[0]["train.seed"] == 0 and configs[0]["compressor.num_memory"] == 2


# ---- without the packages ------------------------------------------------------------------------


class Recorder:
    """An accelerate tracker with the signatures of accelerate.tracking.WandBTracker."""

    made: list = []

    def __init__(self, project, **settings):
        self.settings, self.logged, self.constants = settings, [], None
        self.started = self.finished = False
        self.made.append(self)

    def start(self):
        self.started = True

    def store_init_configuration(self, values):
        self.constants = values

    def log(self, values, step=None, **settings):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def recorders(monkeypatch) -> list[Recorder]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(accelerate.utils, "is_wandb_available", lambda: True)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


def test_a_run_and_its_resumption_are_one_run_of_the_tracker(workspace, recorders):
    iterations, losses = train_and_resume("wandb")
    first, second = recorders
    assert first.settings == second.settings and first.settings["resume"] == "allow"
    logged = [entry for entry in first.logged + second.logged if "train/nll/paper" in entry[1]]
    assert [(step, values["train/nll/paper"]) for step, values in logged] == list(
        zip(iterations, losses, strict=True)
    )
    assert first.started and first.finished and second.finished
    assert first.constants["train.seed"] == 7 and first.constants["environment.torch"]
    assert isinstance(first.constants["train.corpus"], str)  # lists are JSON
    assert second.constants["train.train_iters"] == 4  # what the resumed run changed
    curves = {name for _, values in first.logged for name in values}
    assert not [
        name for name in curves if name.endswith(("/documents", "/truncation", "/scored_tokens"))
    ]


def test_a_new_run_of_a_folder_is_a_new_run_of_the_tracker(workspace, recorders):
    train_and_resume("wandb")
    assert call(*TRAIN, '--set=train.log_with=["wandb"]', "--restart") == 0
    assert recorders[2].settings["id"] != recorders[0].settings["id"]
    assert Path("out/earlier-1/trackers.json").exists()


def test_an_error_of_a_tracker_is_one_warning(workspace, recorders, monkeypatch):
    def fail(*_, **settings):
        raise RuntimeError("no\nspace")

    monkeypatch.setattr(Recorder, "log", fail)
    assert call(*TRAIN, '--set=train.log_with=["wandb"]') == 0
    (line,) = [x for x in Path("out/log.txt").read_text().splitlines() if "wandb" in x]
    assert line.endswith(
        "wandb: cannot be used (no space); the run continues without wandb, metrics.jsonl has all "
        "numbers"
    )


def test_names_that_mlflow_refuses(tmp_path, monkeypatch):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    class Run(Recorder):
        class tracker:
            class info:
                run_id = "r"

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", Run)
    monkeypatch.setattr(Recorder, "made", [])
    tracker = Tracker("mlflow", tmp_path, {})
    tracker.add(3, [("eval/0.perplexity.files:b[01]*.txt/memory/perplexity", 2.0)])
    name = "eval/0.perplexity.files:b_01__.txt/memory/perplexity"
    assert tracker.works and Recorder.made[0].logged == [(3, {name: 2.0})]


def test_a_missing_package_is_reported_before_the_model_loads(workspace, monkeypatch, capsys):
    monkeypatch.setattr(accelerate.utils, "is_wandb_available", lambda: False)
    assert call(*TRAIN, '--set=train.log_with=["tensorboard", "wandb"]') == 2
    said = capsys.readouterr().err
    assert (
        'env.json: train.log_with: "wandb": the package wandb is not installed; run pip install '
        "wandb, or leave it out"
    ) in said
    assert not Path("out").exists()


def test_an_accelerate_that_is_too_old_for_a_tracker(monkeypatch):
    monkeypatch.delattr(trackers.accelerate.utils, "is_trackio_available")
    assert 'has no tracker "trackio"; run pip install -U accelerate' in tracker_fault("trackio")


def test_hyperparameters_in_tensorboard(workspace):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    assert call(*TRAIN, "--set=train.seed=7") == 0
    board = EventAccumulator("out/tensorboard").Reload()
    content = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["train.seed"].number_value == 7
    assert found["compressor.num_memory"].number_value == 2


def test_no_tracker_at_all(workspace):
    assert call(*TRAIN, "--set=train.log_with=[]") == 0
    assert not Path("out/tensorboard").exists() and read_metrics(Path("out"))
