"""Full disks, damaged files, numbers that are not finite and too little memory: each ends a run with
one line, and nothing is lost."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHAPE
from processes import TRAIN, run_forked, train_with_action
from safetensors.torch import load_file, save_file
from test_commands import ROOT, call
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from uiollms.config.load import load_env_config
from uiollms.files.atomic import write_checksums
from uiollms.files.errors import ConfigError
from uiollms.kernels import allocator
from uiollms.training.failures import reporting_step_errors
from uiollms.weights.base_models import load_causal_lm


@pytest.fixture
def two_checkpoints(workspace) -> Path:
    """Returns the checkpoints of a run, those of the iterations 2 and 4."""
    assert call(*TRAIN, "--set=train.tasks=[]", "--set=train.train_iters=4") == 0
    return workspace / "out" / "checkpoints"


RESUME = ("--resume", "--set=train.tasks=[]", "--set=train.train_iters=6")


def one_line(capsys) -> str:
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- the disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5_000, 20_000])
def test_a_full_disk_while_saving(two_checkpoints, size):
    """Files larger than `size` cannot be written. These are the adapters, or the random generators'
    states as well."""
    before = contents(two_checkpoints)

    def train_with_room_for_small_files() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return call(*TRAIN, *RESUME, "--set=model.save_ckp=null")

    Path("out/log.txt").unlink()
    assert run_forked(train_with_room_for_small_files, output="printed") == 2
    printed = Path("printed").read_text()
    assert "Traceback" not in printed
    last = printed.splitlines()[-1]
    # safetensors raises the error as its own.
    assert "step-00000006: cannot be written (" in last and "File too large" in last
    assert "); step-00000004 is whole: free space, then continue with --resume" in last
    assert contents(two_checkpoints) == before
    assert call(*TRAIN, *RESUME) == 0


@pytest.mark.parametrize("field", ["train.run_dir", "model.save_ckp"])
@pytest.mark.parametrize(
    "path, reason",
    [("book0.txt/run/a", "Not a directory"), ("/proc/run/a", "No such file"), ("a\\0b", "null")],
)
def test_a_folder_that_cannot_be_written(workspace, capsys, field, path, reason):
    assert call(*TRAIN, f'--set={field}="{path}"'.replace("\\0", "\\u0000")) == 2
    message = one_line(capsys)
    assert "cannot be written" in message and reason in message
    assert not Path("out/checkpoints").exists()


def test_save_ckp_replaces_nothing_else(workspace, capsys):
    assert call(*TRAIN, "--set=model.save_ckp=.") == 2
    assert ".: weights would replace it, but it contains other files" in one_line(capsys)
    assert Path("book0.txt").exists()


# ---- damaged checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["optimizer.safetensors", "encoder/adapter_model.safetensors", "rank-0.json", "state.json"],
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(
    two_checkpoints, capsys, name, damage
):
    path = two_checkpoints / "step-00000004" / name
    whole = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(
            whole[:-7]
            if damage == "truncated"
            else whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
        )
    before = contents(two_checkpoints)
    assert call(*TRAIN, *RESUME) == 2
    message = one_line(capsys)
    assert "step-00000004" in message and name in message
    offered = "; the one before it is whole: --resume "
    assert message.endswith(offered + "out/checkpoints/step-00000002")
    assert contents(two_checkpoints) == before
    if name == "state.json":
        assert (
            call(
                "train.py",
                "--env_conf",
                "env.json",
                "--resume",
                message.split(offered)[1],
                *RESUME[1:],
            )
            == 0
        )
        assert Path("out/earlier-1/step-00000004").is_dir()  # it is kept
        lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_no_whole_checkpoint_at_all(two_checkpoints, capsys):
    for folder in two_checkpoints.iterdir():
        (folder / "tokens.safetensors").write_bytes(b"")
    assert call(*TRAIN, *RESUME) == 2
    assert one_line(capsys).endswith("no other whole checkpoint is there")


HOSTILE = {
    "a moment of another shape": ("optimizer.safetensors", "encoder.retrieval_token: shapes"),
    "a moment of no parameter": ("optimizer.safetensors", "nobody.exp_avg belongs to no parameter"),
    "not the state of a generator": ("rank-0.json", "its state does not fit this run"),
    "an index past the generator's end": (
        "rank-0.json",
        "rank-0.json: numpy[2]: Input should be less than or equal to 624",
    ),
    "a position in other data": (
        "rank-0.json",
        "the run began with [9] documents, now there are [4]",
    ),
    "an unknown field": ("state.json", "state.json: execute: unknown key"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_checkpoint_with_right_checksums_and_wrong_contents(two_checkpoints, capsys, kind):
    name, message = HOSTILE[kind]
    path = two_checkpoints / "step-00000004" / name
    if name.endswith("json"):
        value = json.loads(path.read_text())
        if kind == "not the state of a generator":
            value["torch"] = "00ff"
        elif kind == "an index past the generator's end":
            value["numpy"][2] = 10**6
        elif kind == "a position in other data":
            value["samples"]["mixture"]["sizes"] = [9]
        else:
            value["execute"] = "rm -rf /"
        path.write_text(json.dumps(value))
    else:
        tensors = load_file(path)
        if "shape" in kind:
            tensors["encoder.retrieval_token.exp_avg"] = torch.zeros(3)
        else:
            tensors["nobody.exp_avg"] = torch.zeros(3)
        save_file(tensors, path)
    (path.parent / "checksums.json").unlink()
    write_checksums(path.parent)
    assert call(*TRAIN, *RESUME) == 2
    assert message in one_line(capsys)


def test_checksums_of_files_outside_of_the_checkpoint_are_refused(two_checkpoints, capsys):
    path = two_checkpoints / "step-00000004" / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"../../../env.json": "0"}))
    assert call(*TRAIN, *RESUME) == 2
    assert (
        "checksums.json: '../../../env.json' is outside of the checkpoint; the one before it is "
        "whole" in one_line(capsys)
    )


def test_weights_without_a_state_cannot_be_resumed(two_checkpoints, capsys):
    assert call("train.py", "--env_conf", "env.json", "--resume", "out/ckp") == 2
    assert (
        "out/ckp: contains no training state (state.json); to start a new run from weights alone, "
        "set its model.load_ckp" in one_line(capsys)
    )


def test_a_tokenizer_that_has_changed(two_checkpoints, capsys):
    """The model's name and size are the same, so that only this check can notice it."""
    name = load_env_config("env.json").model.model_name
    AutoModelForCausalLM.from_pretrained(name).save_pretrained("model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.save_pretrained("model")
    changes = (
        "--set=model.model_name=model",
        "--set=train.tasks=[]",
        "--set=train.train_iters=2",
        "--set=train.run_dir=other",
    )
    assert call(*TRAIN, *changes) == 0
    rules = json.loads(Path("model/tokenizer.json").read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    Path("model/tokenizer.json").write_text(json.dumps(rules))
    assert call(*TRAIN, "--resume", *changes) == 2
    assert "the tokenizer of model has changed since the run saved this checkpoint" in one_line(
        capsys
    )


# ---- numbers and memory --------------------------------------------------------------------------


def test_steps_that_are_not_finite_are_skipped_and_counted(workspace, capsys, monkeypatch):
    """The base's embedding of "~" is infinite, so that the step of the document with this character
    is skipped. The embedding is changed after loading, because such files are refused."""
    tilde = AutoTokenizer.from_pretrained(load_env_config("env.json").model.model_name)(
        "~"
    ).input_ids

    def poisoned(*arguments, **settings):
        base = load_causal_lm(*arguments, **settings)
        base.get_input_embeddings().weight.data[tilde] = float("inf")
        return base

    monkeypatch.setattr("uiollms.build.load_causal_lm", poisoned)
    Path("book2.txt").write_text("~" * 100)
    changes = ("--set=train.tasks=[]", "--set=train.train_iters=8")
    assert call(*TRAIN, *changes) == 0
    assert "2 steps were skipped: their loss or gradient was not finite" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 9))
    assert [line["skipped"] for line in lines if "nll" not in line] == [["book2.txt"]] * 2
    weights = load_file("out/ckp/tokens.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_run_that_stays_bad_stops_with_its_weights_saved(workspace, capsys):
    changes = (
        "--set=train.max_lr=1e30",
        "--set=train.tasks=[]",
        "--set=train.train_iters=50",
        "--set=train.max_bad_steps=3",
    )
    assert call(*TRAIN, *changes) == 2
    message = one_line(capsys)
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert ["nll" in line for line in lines[-4:]] == [True, False, False, False]
    last = lines[-1]["iteration"]
    assert (
        f"steps in a row was not finite, the last at iteration {last} on {lines[-1]['skipped'][0]}"
        in message
    )
    record = json.loads(Path(f"out/checkpoints/step-{last:08d}/state.json").read_text())
    assert (record["skipped_steps"], record["bad_in_a_row"]) == (3, 3)


def test_too_little_memory_names_the_fields_to_change(workspace):
    train_section = load_env_config("env.json").train
    for failing in (lambda: torch.empty(2**55), lambda: bytearray(2**60)):
        with pytest.raises(
            ConfigError,
            match=r"book: out of memory .* train.chunk_batch \(4\).*checkpointing \(now false\).*truncation \(80\)",
        ):
            with reporting_step_errors("book", train_section):
                failing()
    with pytest.raises(RuntimeError, match="a bug"), reporting_step_errors("book", train_section):
        raise RuntimeError("a bug")


def test_too_little_memory_in_a_run(workspace):
    """When the run folder is being written, the address space is limited to 10 MB more. One
    activation takes 29 MB."""
    shape = LlamaConfig(
        **SHAPE | dict(vocab_size=259, max_position_embeddings=128, intermediate_size=8000)
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained("model")
    AutoTokenizer.from_pretrained(load_env_config("env.json").model.model_name).save_pretrained(
        "model"
    )

    def no_more_memory() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 10 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    Path("book0.txt").write_text("It was a bright cold day. " * 40)
    fields = (
        "train.chunk_batch=64",
        "train.corpus.0.truncation=900",
        "train.corpus.0.name=files:book0.txt",
        "train.tasks=[]",
    )
    changes = [f"--set={field}" for field in (*fields, "model.model_name=model")]
    assert run_forked(train_with_action(12, no_more_memory, *changes), output="printed") == 2, Path(
        "printed"
    ).read_text()
    assert (
        "book0.txt: out of memory in the training step; lower train.chunk_batch (64)"
        in Path("printed").read_text()
    )


@pytest.mark.parametrize("words", allocator.NO_MEMORY)
def test_what_counts_as_too_little_memory(words):
    assert allocator.is_out_of_memory(
        RuntimeError(f"[enforce fail at x.cpp:1] {words}: tried 9 bytes")
    )
    assert not allocator.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_document_past_the_capacity_is_named(workspace, capsys):
    Path("qa.jsonl").write_text(json.dumps({"input": "Why? " * 20, "output": "x" * 1000}))
    assert call(*TRAIN, "--set=train.corpus.0.name=files:qa.jsonl", "--set=train.tasks=[]") == 2
    assert one_line(capsys).startswith(
        "qa.jsonl: line 1: the response has 1000 tokens, truncation 80 leaves no tokens for a prompt"
    )


# ---- two at once ---------------------------------------------------------------------------------


def test_two_processes_on_one_run_folder(workspace, capsys):
    program = (
        "import filelock, time; lock = filelock.FileLock('out/lock'); lock.acquire(); "
        "print('held', flush=True); time.sleep(60)"
    )
    Path("out").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        assert call(*TRAIN) == 2
        assert (
            "out: another process is training in this folder; choose another train.run_dir"
            in one_line(capsys)
        )
        other.kill()
    assert call(*TRAIN, "--set=train.tasks=[]") == 0  # a killed process holds no lock


# ---- programs in data ----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "unheard of"])
def test_the_code_of_a_model_folder_is_not_executed(workspace, capsys, model_type):
    shutil.copytree(load_env_config("env.json").model.model_name, "model")
    config = json.loads(Path("model/config.json").read_text())
    names = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Words", None],
    }
    Path("model/config.json").write_text(
        json.dumps(config | {"model_type": model_type, "auto_map": names})
    )
    Path("model/evil.py").write_text("open('executed', 'w')")
    code = call(*TRAIN, "--set=model.model_name=model", "--set=train.tasks=[]")
    assert code == (0 if model_type == "llama" else 2), capsys.readouterr().err
    assert not Path("executed").exists()


def test_no_remote_code_no_pickle():
    """A search of the source finds no call that could execute code from files."""
    for path in [*(ROOT / "src").rglob("*.py"), ROOT / "train.py", ROOT / "test.py"]:
        text = path.read_text().replace('    "trust_remote_code",\n', "")  # a name that is dropped
        assert text.count("trust_remote_code") == text.count("trust_remote_code=False"), path
        assert not re.search(
            r"\bimport pickle|(?<![.\w])(eval|exec)\(|shell=True|os\.system|hf_[A-Za-z]{10}", text
        ), path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
