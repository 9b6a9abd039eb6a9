"""Runs every command as scripts do: --json prints nothing but JSON to stdout, --quiet prints
nothing, and an interrupt ends a command without a traceback."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_base
from test_commands import call

from uiollms.build import load_memory_lm
from uiollms.cli.common import reporting_errors
from uiollms.config.load import load_env_config
from uiollms.study.recall import VOCABULARY
from uiollms.weights.adapters import save_weights

ENV = ["--env_conf", "env.json"]
FEW = ["--preset", "quick", "--corpus", "files:book*.txt", "--documents", "1", "--draws", "20"]
FEW += ["--out", "study"]

# command -> (module or file, arguments, fields of every line)
COMMANDS = {
    "compress": (
        "uiollms",
        ["compress", "book0.txt", "-o", "new.mem", *ENV],
        "memory sources held seconds",
    ),
    "refine": (
        "uiollms",
        ["refine", "book.mem", "-o", "new.mem", "--steps=2", "--passage_size=8", *ENV],
        "memory control steps best_step seconds passages nll bound",
    ),
    "answers": (
        "uiollms",
        ["answers", "files:asked.jsonl", "-o", "new.jsonl", *ENV, "--max_new_tokens=4"],
        "output documents answered",
    ),
    "ask": (
        "uiollms",
        ["ask", "book.mem", "Why?", *ENV, "--max_new_tokens=5"],
        "question answer new_tokens held seconds",
    ),
    "chat": (
        "uiollms",
        ["chat", *ENV, "--max_new_tokens=5"],
        "question answer new_tokens held seconds",
    ),
    "data": ("uiollms.data", [], "corpus documents_for ready missing"),
    "data --sample": (
        "uiollms.data",
        ["--sample", "files:book*.txt"],
        "corpus documents source task kl_weight train_prompt text",
    ),
    "data --check": (
        "uiollms.data",
        ["--check", "files:book*.txt"],
        "corpus documents empty characters unreadable",
    ),
    "convert": ("uiollms.cli.convert", [*ENV, "out/ckp", "ckp.pth"], "source target dtype"),
    "report": ("uiollms.cli.report", ["out"], "page plots missing"),
    "study gradients": ("uiollms.study", ["gradients", *ENV, *FEW], "setting rows"),
    "study cost": (
        "uiollms.study",
        ["cost", *ENV, *FEW, "--estimators", "exact", "uio"],
        "setting rows",
    ),
    "study learning": (
        "uiollms.study",
        ["learning", *ENV, "--seeds=1", "--set=train.eval=3", "--out=study"],
        "setting rows",
    ),
    "study recall": (
        "uiollms.study",
        ["recall", "--seeds=1", "--iterations=1", "--distances=1", "--out=study"],
        "setting rows",
    ),
    "study paper-table6 --dry_run": (
        "uiollms.study",
        ["paper-table6", "--dry_run", "--out=study"],
        "setting rows",
    ),
    "train.py --dry_run": (
        "train.py",
        [*ENV, "--dry_run"],
        "fits devices tokens chunk_batch documents flops pipeline speedup longest capacity "
        "most_chunks steps",
    ),
}


@pytest.fixture
def ready(workspace, monkeypatch, capsys):
    """Adds weights, an evaluation and a memory to the workspace, and a small base for `recall`,
    which otherwise trains a base for minutes."""
    save_weights(load_memory_lm(load_env_config("env.json"), "env.json")[0], "out/ckp")
    assert call("test.py", *ENV, "--quiet") == 0
    assert run_command("uiollms", ["compress", "book0.txt", "-o", "book.mem", *ENV]) == 0
    Path("asked.jsonl").write_text('{"input": "Why? ", "output": ""}')
    base = make_base(vocab_size=VOCABULARY, max_position_embeddings=128)
    monkeypatch.setattr("uiollms.cli.study.train_base", lambda folder, bar: base)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    capsys.readouterr()


def run_command(name: str, arguments: list[str]) -> int:
    """Runs a module or file in this process. Returns its exit code."""
    if name.endswith(".py"):
        return call(name, *arguments)
    names = {
        "uiollms": "uiollms.__main__",
        "uiollms.data": "uiollms.cli.data",
        "uiollms.study": "uiollms.cli.study",
    }
    module = importlib.import_module(names.get(name, name))
    return reporting_errors(lambda: module.main(arguments))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("json_too", [True, False])
def test_output_for_scripts(ready, capsys, command, json_too):
    name, arguments, fields = COMMANDS[command]
    assert run_command(name, [*arguments, "--quiet", *["--json"] * json_too]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    if json_too:
        lines = [json.loads(line) for line in output.out.splitlines()]
        assert lines and all(list(line) == fields.split() for line in lines)
    elif command in ("ask", "chat"):
        assert output.out.strip() and "[memory" not in output.out and "Why?" not in output.out
    else:
        assert output.out == ""


def test_json_output_contains_the_results(ready, capsys):
    def json_of(command: str) -> dict:
        name, arguments, _ = COMMANDS[command]
        assert run_command(name, [*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    plan, report = json_of("train.py --dry_run"), json_of("report")
    converted = json_of("convert")
    (device,) = plan["devices"]
    assert device["device"] == "cpu"
    assert sum(device["parts"].values()) == pytest.approx(device["need"], abs=6)
    assert plan["fits"] is device["fits"] is (device["need"] <= device["have"])
    for path in (report["page"], *report["plots"], converted["target"]):
        assert Path(path).exists()
    assert [part["what"] for part in report["missing"]] == ["the training curve"]
    assert len(report["plots"]) == 3
    assert len(json_of("data --check")["unreadable"]) == 0


@pytest.mark.parametrize("command, bar", [("compress", "book0.txt: "), ("report", "attention: ")])
def test_the_progress_bar_goes_to_stderr(ready, capsys, command, bar):
    name, arguments, _ = COMMANDS[command]
    assert run_command(name, [*arguments, "--json"]) == 0
    output = capsys.readouterr()
    assert bar in output.err and "chunk" in output.err and json.loads(output.out)


class Interrupted(io.StringIO):
    """An input at which the user presses Ctrl-C."""

    def readline(self, *_) -> str:
        raise KeyboardInterrupt


def test_an_interrupt_ends_a_command_with_one_line(ready, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Interrupted())
    assert run_command(*COMMANDS["chat"][:2]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_ctrl_c_ends_a_chat_with_one_line(ready):
    command = [sys.executable, "-m", "uiollms", "chat", *ENV, "--max_new_tokens=5"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A shell that put this test into the background lets its children ignore the signal.
    with subprocess.Popen(
        command, **pipes, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    ) as chat:
        chat.stdin.write("Hi\n")
        chat.stdin.flush()
        while not chat.stdout.readline().startswith("[memory: "):
            assert chat.poll() is None
        # The chat now waits for the next line.
        os.kill(chat.pid, signal.SIGINT)
        _, error = chat.communicate(timeout=60)
    assert (chat.returncode, error) == (130, "\ninterrupted\n")
