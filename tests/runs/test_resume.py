"""A run that was stopped in any way is resumed bit for bit, and only with the same settings."""

import json
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from peft import PeftModel
from processes import TRAIN, run_forked, send_signal, train, train_with_action
from test_commands import call
from transformers import AutoModelForCausalLM

from uiollms.build import load_memory_lm
from uiollms.config.load import load_env_config
from uiollms.data.stream import SampleStream
from uiollms.runs.signals import StopSignals


@pytest.fixture
def run_folder(workspace) -> Path:
    """Configures a run of 10 documents in 5 steps that draws everything at random that can be drawn:
    corpora, crops, reservoirs and LoRA dropout. Returns its folder."""
    Path("memory.json").write_text(
        json.dumps(dict(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4, lora_dropout=0.2))
    )
    env = json.loads(Path("env.json").read_text())
    corpus = dict(name="files:book[01].txt", partition=0.3, truncation=70, crop="random")
    env["train"] |= dict(train_iters=10, save=2, eval=7, accum_grad=2)
    env["train"]["corpus"] = [corpus, corpus | dict(name="files:book[23].txt", partition=0.7)]
    env["train"]["tasks"] = [
        dict(task_type="perplexity", task_name="files:book*.txt", num_instance=1, truncation=60)
    ]
    Path("env.json").write_text(json.dumps(env))
    return workspace / "out"


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "machine")} for line in lines]


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of the last checkpoint's tensors and random generators, and of the weights
    in save_ckp."""
    last = folder / "checkpoints" / "step-00000010"
    files = [
        *last.rglob("*.safetensors"),
        last / "rank-0.json",
        *(folder / "ckp").rglob("*.safetensors"),
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_killed_fifty_times(run_folder):
    """A run is killed at random moments and at random file operations, some of them while it writes
    a checkpoint."""
    started = time.time()
    assert run_forked(train()) == 0
    whole_run = time.time() - started
    metrics, tensors = metrics_of(run_folder), tensors_of(run_folder)
    assert [line["iteration"] for line in metrics if "nll" in line] == [2, 4, 6, 8, 10]
    # three files of weights, AdamW's and the generators', and three files of weights in save_ckp
    assert len(tensors) == 8

    chance = random.Random(0)
    kills = within_a_save = 0
    while kills < 50:
        code, flags = None, ("--restart",)
        while code != 0:
            if chance.random() < 0.2:
                code = run_forked(train(*flags), kill_after=chance.uniform(0, whole_run))
            else:
                code = run_forked(
                    train_with_action(chance.randint(1, 170), send_signal(signal.SIGKILL), *flags)
                )
            assert code in (0, -signal.SIGKILL), code
            kills += code != 0
            within_a_save += any(run_folder.glob("checkpoints/.uiollms-*"))
            flags = ("--resume",)
        assert metrics_of(run_folder) == metrics
        assert [
            name for name, data in tensors_of(run_folder).items() if data != tensors[name]
        ] == []
    assert within_a_save >= 5  # twice as many on an idle machine


def test_a_signal_lets_the_step_finish_and_saves(run_folder):
    assert run_forked(train()) == 0
    metrics, tensors = metrics_of(run_folder), tensors_of(run_folder)
    for number, event in ((signal.SIGTERM, 60), (signal.SIGINT, 150)):
        assert (
            run_forked(train_with_action(event, send_signal(number), "--restart")) == 128 + number
        )
        stopped = steps_in(run_folder)[-1]
        assert 0 < stopped < 10 and metrics_of(run_folder)[-1]["iteration"] == stopped
        assert run_forked(train("--resume")) == 0
        assert metrics_of(run_folder) == metrics and tensors_of(run_folder) == tensors


def test_a_signal_ends_an_evaluation_which_is_repeated(run_folder):
    evaluating = [
        f"--set=train.{change}" for change in ("eval=2", "train_iters=2", "tasks.0.num_instance=4")
    ]
    assert run_forked(train(*evaluating)) == 0
    metrics = metrics_of(run_folder)

    def at_the_second_document() -> int:
        until_signal = StopSignals.until_signal

        def signalling(self: StopSignals, items: Iterable) -> Iterator:
            for number, item in enumerate(until_signal(self, items)):
                if number == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield item

        StopSignals.until_signal = signalling
        return call(*TRAIN, *evaluating)

    assert run_forked(at_the_second_document) == 143
    assert steps_in(run_folder) == [2] and not any(
        "eval" in line for line in metrics_of(run_folder)
    )
    assert run_forked(train("--resume", *evaluating)) == 0
    assert metrics_of(run_folder) == metrics


def test_a_second_signal_ends_at_once(run_folder):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_forked(train_with_action(60, twice)) == -signal.SIGTERM


def test_evaluation_does_not_disturb_training(run_folder):
    for folder, change in (("a", "train.tasks=[]"), ("b", "train.eval=4")):
        assert (
            call(
                *TRAIN,
                f"--set=train.run_dir={folder}",
                f"--set=model.save_ckp={folder}/ckp",
                f"--set={change}",
            )
            == 0
        )
    assert tensors_of(Path("a")) == tensors_of(Path("b"))


def test_an_unfinished_run_is_not_lost_by_accident(run_folder, capsys):
    assert run_forked(train_with_action(140, send_signal(signal.SIGKILL))) == -signal.SIGKILL
    steps = steps_in(run_folder)
    assert steps and steps[-1] < 10
    assert call(*TRAIN) == 2
    message = capsys.readouterr().err
    assert (
        f"out: contains an unfinished run, {steps[-1]} of 10 documents done; continue it with "
        "--resume, or begin a new run with --restart (the files of the unfinished one then move to "
        "earlier-1/)" in message
    )
    assert len(message.splitlines()) == 1 and steps_in(run_folder) == steps
    assert call(*TRAIN, "--restart", "--set=train.train_iters=2") == 0
    assert (
        steps_in(run_folder / "earlier-1") == steps
        and (run_folder / "earlier-1" / "metrics.jsonl").exists()
    )
    # That run was finished. A new one needs no option, and continues nothing.
    assert call(*TRAIN) == 0
    assert steps_in(run_folder / "earlier-2") == [2] and steps_in(run_folder) == [8, 10]
    assert call(*TRAIN, "--resume") == 0  # nothing to do
    assert steps_in(run_folder) == [8, 10]


def test_resume_without_a_checkpoint_begins_a_run(run_folder):
    assert call(*TRAIN, "--resume", "--set=train.train_iters=2") == 0
    assert steps_in(run_folder) == [2]
    path = run_folder / "checkpoints" / "step-00000002" / "state.json"
    assert "config_hash" not in json.loads(path.read_text()), "only earlier versions wrote it"


def test_fields_that_a_resumed_run_cannot_change(run_folder, capsys):
    assert call(*TRAIN, "--set=train.train_iters=2") == 0
    Path("memory.json").write_text(
        json.dumps(dict(num_memory=4, chunk_size=32, lora_rank=3, lora_alpha=4, lora_dropout=0.2))
    )
    capsys.readouterr()
    assert (
        call(*TRAIN, "--resume", "--set=train.max_lr=0.5", "--set=train.corpus.0.truncation=50")
        == 2
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "compressor.num_memory", "compressor.lora_rank", "compressor.chunk_size", "train.max_lr", "train.corpus"
    ]  # fmt: skip
    assert (
        "compressor.chunk_size: 16 -> 32: a resumed run cannot change this; restore it, or start a "
        "new run" in lines[2]
    )
    assert steps_in(run_folder) == [2]


def test_fields_that_may_change_are_logged(run_folder):
    assert call(*TRAIN, "--set=train.train_iters=4") == 0
    changes = (
        "train.train_iters=6",
        "train.save=3",
        "train.eval=5",
        "train.chunk_batch=1",
        'model.device_map={"model":"cpu","lm_head":"cpu"}',
    )
    assert call(*TRAIN, "--resume", *(f"--set={change}" for change in changes)) == 0
    printed = (run_folder / "log.txt").read_text()
    for change in (
        "train_iters: 4 -> 6",
        "save: 2 -> 3",
        "eval: 7 -> 5",
        "chunk_batch: 4 -> 1",
        'device_map: "cpu" -> {"model"',
    ):
        assert (
            f"changed since the checkpoint: {'model' if 'map' in change else 'train'}.{change}"
            in printed
        )
    assert [line["iteration"] for line in metrics_of(run_folder) if "nll" in line] == [2, 4, 6]


def test_the_checkpoints_kept(run_folder, capsys):
    """The perplexities in the metrics are replaced, so that the best checkpoint is neither the first
    nor the last."""
    flags = ("--set=train.keep_last=1", "--set=train.keep_best=true", "--set=train.eval=2")
    for stop in (2, 4, 6, 8):
        assert call(*TRAIN, "--resume", *flags, f"--set=train.train_iters={stop}") == 0
        lines = [
            json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()
        ]
        for line in lines:
            if "eval" in line:
                line["eval"][0]["memory"]["perplexity"] = abs(line["iteration"] - 4.5)
        (run_folder / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    assert steps_in(run_folder) == [4, 8]
    assert call(*TRAIN, "--set=train.keep_best=true", "--set=train.tasks=[]") == 2
    assert (
        "env.json: train: keep_best compares checkpoints by an evaluation"
        in capsys.readouterr().err
    )


def test_a_checkpoint_serves_as_weights(run_folder):
    assert call(*TRAIN, "--set=train.train_iters=2") == 0
    last = run_folder / "checkpoints" / "step-00000002"
    assert (
        call(
            *TRAIN,
            "--set=train.train_iters=2",
            f"--set=model.load_ckp={last}",
            "--set=train.run_dir=other",
        )
        == 0
    )
    base = AutoModelForCausalLM.from_pretrained(load_env_config("env.json").model.model_name)
    assert PeftModel.from_pretrained(base, last / "decoder").peft_config["default"].r == 2


def test_resume_from_a_checkpoint_elsewhere(run_folder):
    assert call(*TRAIN, "--set=train.save=4", "--set=train.eval=10") == 0
    metrics, tensors = metrics_of(run_folder), tensors_of(run_folder)
    (run_folder / "checkpoints" / "step-00000008").rename("brought")
    assert call(*TRAIN, "--resume", "brought", "--set=train.eval=10") == 0
    assert steps_in(run_folder) == [10] and steps_in(run_folder / "earlier-1") == [10]
    assert metrics_of(run_folder) == [line for line in metrics if line["iteration"] == 10]
    assert tensors_of(run_folder) == tensors


def test_the_run_folder(run_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert call(*TRAIN, "--set=train.train_iters=2") == 0
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {
        "config.json",
        "versions.json",
        "log.txt",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "curve.png",
        "ckp",
    }
    versions = json.loads((run_folder / "versions.json").read_text())
    assert versions["torch"] and versions["transformers"] and versions["dtype"] == "torch.float32"
    assert not versions["git"] or len(versions["git"].rstrip("+")) == 40
    assert not [
        path
        for path in run_folder.rglob("*")
        if path.is_file() and b"hf_secret" in path.read_bytes()
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    expected = [line["nll"] for line in metrics_of(run_folder) if "nll" in line]
    # stored in float32
    assert [event.value for event in board.Scalars("train/nll/paper")] == pytest.approx(
        expected, rel=1e-6
    )
    parts = {
        f"train/grad_norm/{part}"
        for part in ("all", "encoder_lora", "decoder_lora", "token_embeddings")
    }
    measured = {"train/lr", "train/tokens_per_second", "train/resident_gib", *parts}
    assert measured <= set(board.Tags()["scalars"])
    assert "eval/0.perplexity.paper.files:book*.txt.60/memory/perplexity" in board.Tags()["scalars"]


CORPORA = [
    "files:book*.txt",
    "files:lines.jsonl",
    "files:lines.jsonl.gz",
    "files:rows.parquet",
    "sotu.train",
    "minipile.train",
]


@pytest.mark.parametrize("name", CORPORA)
def test_every_kind_of_corpus_continues_where_it_stopped(workspace, monkeypatch, name):
    """The state is written as JSON and loaded into newly opened corpora."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    texts = [f"{i}: " + "It was a bright cold day in April. " * 4 for i in range(7)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    Path("lines.jsonl").write_text(lines)
    Path("lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows = pyarrow.table({"text": texts})
    Path("hub/JeanKaddour/minipile/data").mkdir(parents=True)
    for path in ("rows.parquet", "hub/JeanKaddour/minipile/data/train-00000-of-00001.parquet"):
        pyarrow.parquet.write_table(rows, path)
    monkeypatch.setenv("UIOLLMS_HUB_DIR", "hub")
    monkeypatch.setenv("UIOLLMS_CACHE", "cache")
    config = load_env_config(
        "env.json", [f"train.corpus.0.name={name}", "train.corpus.0.crop=random"]
    )
    model, tokenizer = load_memory_lm(config, "env.json")

    def taken(samples: SampleStream, count: int) -> list[tuple]:
        return [
            (drawn.source, drawn.sample.rows[0].input_ids.tolist(), drawn.rng.random())
            for drawn in samples.take(count)
        ]

    samples = SampleStream(config, tokenizer, model)
    taken(samples, 5)
    state = json.dumps(samples.state_dict())
    expected = taken(samples, 9)  # into the second epoch
    restored = SampleStream(config, tokenizer, model)
    restored.load_state_dict(json.loads(state))
    assert taken(restored, 9) == expected
