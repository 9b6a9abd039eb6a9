"""Runs train.py and test.py as a user does, with a tiny model and text files."""

import argparse
import importlib
import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import uiollms
from uiollms import __main__ as program
from uiollms.__main__ import COMMANDS as PACKAGE_COMMANDS
from uiollms.build import load_memory_lm
from uiollms.cli import completion
from uiollms.cli.common import reporting_errors
from uiollms.config.load import load_env_config
from uiollms.data import Document, NewsDocument, TokenDocument
from uiollms.data.builder import SampleBuilder
from uiollms.data.stream import SampleStream
from uiollms.files.errors import ConfigError
from uiollms.files.folders import run_folder

ROOT = Path(__file__).parents[2]


def run(command: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a program in a new process, as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / command), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )


def call(command: str, *arguments: str) -> int:
    """Runs a program in this process, which saves importing torch again. Returns its exit code."""
    return reporting_errors(lambda: import_file(command).main(list(arguments)))


def import_file(command: str) -> ModuleType:
    """Imports a file that is not a module of the package."""
    spec = importlib.util.spec_from_file_location(f"command_{Path(command).stem}", ROOT / command)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "run_dir, save_ckp, folder",
    [
        ("out", "runs/8x/checkpoint", "out"),
        (None, "runs/8x/checkpoint", "runs/8x"),
        (None, "/scratch/mine/checkpoint", "/scratch/mine"),
        (None, "ckp/32x.pth", "runs/32x"),
        (None, "checkpoint", "runs/checkpoint"),
        (None, None, "runs/env"),
    ],
)
def test_save_ckp_decides_the_run_folder(run_dir, save_ckp, folder):
    assert run_folder(run_dir, save_ckp, "configs/env.json") == Path(folder)


def test_test_py_evaluates_the_trained_weights(workspace, capsys):
    trained = run("train.py", "--env_conf", "env.json")
    assert trained.returncode == 0, trained.stderr
    assert "with memory" in trained.stdout and "raw context" in trained.stdout
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "nll" in line] == [1, 2, 3]
    evaluation = lines[-1]["eval"][0]
    assert evaluation["documents"] == 2 and {"memory", "window", "raw"} <= evaluation.keys()
    assert Path("out/curve.png").stat().st_size > 1000
    # The config in the run folder contains all defaults.
    assert json.loads(Path("out/config.json").read_text())["train"]["estimator"] == "uio"

    tested = run("test.py", "--env_conf", "env.json")
    assert tested.returncode == 0, tested.stderr
    assert "weights: out/ckp" in tested.stdout
    result = json.loads(Path("out/test.json").read_text())["results"][0]
    # The saved weights are those that training evaluated last.
    assert result["memory"] == evaluation["memory"]
    flags = ("--use_env_conf_tasks", "--set=train.chunk_batch=auto")
    assert call("test.py", "--env_conf", "env.json", *flags) == 0
    assert "raw context" in capsys.readouterr().out


def test_the_same_seed_trains_the_same_weights(workspace):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        changes = (f"model.save_ckp={name}.pth", f"train.seed={seed}", "train.tasks=[]")
        flags = [f"--set={change}" for change in changes]
        assert call("train.py", "--env_conf", "env.json", *flags) == 0
    a, b, c = (torch.load(f"{n}.pth", weights_only=True) for n in "abc")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize("estimator", ["exact", "tbptt", "importance"])
def test_every_estimator_trains(workspace, estimator):
    flags = (f"--set=train.estimator={estimator}", "--set=train.tasks=[]")
    assert call("train.py", "--env_conf", "env.json", *flags) == 0
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ("train.max_lrr=1", "env.json: train.max_lrr: unknown key; did you mean 'max_lr'?"),
        ("model.config=nowhere.json", "nowhere.json: cannot be read"),
        ("model.model_name=./no/model", "model.model_name: cannot get './no/model'"),
        ("model.model_name=package:nothing", "package 'nothing' is not known to contain a model"),
        ("model.load_ckp=nowhere", "nowhere"),
        (
            "model.device_map=7",
            "env.json: model.device_map: GPU 7 does not exist, this machine has",
        ),
        ('model.device_map={"model":"cpu"}', "env.json: model.device_map: no key covers 'lm_head'"),
        (
            'model.device_map={"model.layers.9":"cpu"}',
            "['model.layers.9']: the base has no such layer; its 3 layers are",
        ),
        (
            "train.corpus.0.name=pg20",
            "env.json: train.corpus[0].name: corpus 'pg20' is unknown; did you mean pg19",
        ),
        ("train.corpus.0.name=files:*.md", "corpus files:*.md: no file matches"),
        (
            "train.corpus.0.truncation=10000",
            "env.json: train.corpus[0].truncation: 10000 tokens is past the capacity 926",
        ),
    ],
)
def test_wrong_configs_are_refused_in_one_line(workspace, capsys, change, message):
    assert call("train.py", "--env_conf", "env.json", f"--set={change}") == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.strip().splitlines()) == 1, printed


def test_32x_on_a_bare_machine_reports_everything_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("UIOLLMS_RAW_DATA", str(tmp_path))
    failed = run("train.py", "--env_conf", "32x.json")
    assert failed.returncode == 2
    lines = failed.stderr.strip().splitlines()
    expected = [
        ("train.corpus[0].name: ", "redpajama_book_sample.jsonl is missing"),
        ("train.corpus[1].name: ", "redpajama-sample.json is missing"),
        ("train.corpus[1].name: ", "longalpaca.json is missing"),
        ("train.tasks[0].task_name: ", "emozilla/pg19, split test, is not on this machine"),
        ("model.model_name: ", "cannot get 'meta-llama/Llama-2-7b-chat-hf'"),
        ("model.device_map['model.embed_tokens']: ", "GPU 0 does not exist"),
    ]
    if not torch.cuda.is_available():
        assert len(lines) == 6
    for line, (field, message) in zip(lines, expected, strict=False):
        assert field in line and message in line


def test_a_test_file_past_the_capacity_is_refused(workspace, capsys):
    task = dict(
        task_type="perplexity", task_name="files:book*.txt", num_instance=1, truncation=5000
    )
    Path("test.json").write_text(json.dumps([task]))
    assert call("test.py", "--env_conf", "env.json") == 2
    message = "test.json: tasks[0].truncation: 5000 tokens is past the capacity 926"
    assert message in capsys.readouterr().err


def test_documents_that_fit_one_chunk_are_skipped_and_counted(workspace):
    Path("short.txt").write_text("too short")
    Path("blank.txt").write_text(" \n")
    changes = ["train.corpus.0.name=files:*.txt", "train.corpus.0.crop=random"]
    config = load_env_config("env.json", changes)
    model, tokenizer = load_memory_lm(config, "env.json")
    samples = SampleStream(config, tokenizer, model)
    lengths = {sum(len(row.input_ids) for row in drawn.sample.rows) for drawn in samples.take(12)}
    assert lengths == {80}
    # Two of the six documents of an epoch are skipped, and 12 documents are more than two epochs.
    assert samples.skipped == samples.streams[0].mixture.drawn - 12 >= 4
    config = load_env_config("env.json", ["train.corpus.0.name=files:short.txt"])
    message = "10000 documents in a row are blank or fit one chunk of 16 .* the last is short.txt"
    with pytest.raises(ConfigError, match=message):
        SampleStream(config, tokenizer, model).take(1)
    assert Document("question", "", response=" ").is_empty


def test_question_answering_trains_from_json_lines(workspace):
    lines = [
        json.dumps({"input": f"{i}: What time is it? " * 4, "output": "The clocks were striking."})
        for i in range(3)
    ]
    Path("qa.jsonl").write_text("\n".join(lines))
    changes = ("train.corpus.0.name=files:qa.jsonl", "train.tasks=[]", "train.chunk_batch=auto")
    flags = [f"--set={change}" for change in changes]
    assert call("train.py", "--env_conf", "env.json", *flags) == 0
    # "auto" becomes 4, because a document has 4 chunks in memory.
    assert json.loads(Path("out/config.json").read_text())["train"]["chunk_batch"] == 4


def test_documents_become_samples_by_their_task(workspace):
    config = load_env_config("env.json")
    model, tokenizer = load_memory_lm(config, "env.json")
    builder, rng = SampleBuilder(model, tokenizer), random.Random(0)
    text = "It was a bright cold day in April. " * 4

    def sample(**fields):
        return builder.make(Document(text, "here:1", **fields), 80, rng)

    assert [len(row.input_ids) for row in sample().rows] == [16] * 5
    answer = sample(response="the answer", task="question answering")
    assert sum(len(row.input_ids) for row in answer.rows) == 80 and answer.num_scored == 10
    copy = sample(task="longdata copy")
    assert len(copy.chunks) == 5 and copy.num_scored == 80 and copy.rows[0].repeat
    tokens = TokenDocument(
        text, "here:1", input_ids=tuple(range(3, 103)), labels=(-100,) * 50 + tuple(range(53, 103))
    )
    beacon = builder.make(tokens, 80, rng)
    # The tokens 50 .. 79 are scored, and the truncation cuts the rest.
    assert beacon.num_scored == 30
    message = "here:1: the response has .* tokens, truncation 80 leaves no tokens"
    with pytest.raises(ConfigError, match=message):
        sample(response="x" * 90, task="question answering")
    long = TokenDocument(text, "here:1", kl_weight=1.0, input_ids=(5,) * 200, labels=(5,) * 200)
    message = "here:1: the teacher reads its context raw: 200 tokens, the base has 128 positions"
    with pytest.raises(ConfigError, match=message):
        builder.make(long, None, rng)
    utilization = sample(task="memory utilization", kl_weight=1.0)
    assert utilization.kl_weight == 1
    assert len(utilization.chunks) == 5 and utilization.num_scored == 15
    story = NewsDocument(
        "The story: Ada met Bob.",
        "here:1",
        task="news qa summation",
        kl_weight=0.9,
        questions=(("Who?", "Ada"), ("Whom?", "Bob")),
        summary="They met.",
        distractor=text,
    )
    news = builder.make(story, 80, rng)
    context = "".join(tokenizer.decode(chunk) for chunk in news.chunks)
    assert len(news.rows) == 3 and len(news.teachers) == 3
    assert story.text in context and len(news.chunks) == 5
    answers = [tokenizer.decode(row.targets[row.scored]) for row in news.rows]
    assert answers == [" Ada", " Bob", " They met."]
    for found in (utilization, news, beacon.distilled()):
        assert torch.isfinite(uiollms.gradient_step(model, found).losses).all()


# All files that can be started, so that a new command is tested without being named here. Only the
# benchmarks start worker.py.
FOLDERS = [
    path
    for path in ROOT.iterdir()
    if path.is_dir() and path.name not in ("tests", "runs", "raw_data") and path.name[0] != "."
]
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in folder.rglob("*.py"))]
STARTED = {str(p.relative_to(ROOT)) for p in FILES if '__name__ == "__main__"' in p.read_text()}
MODULES = {
    f"src/uiollms/cli/{command.module}.py"
    for command in PACKAGE_COMMANDS.values()
    if not command.module.endswith(".py")
}
WORKERS = {"benchmarks/worker.py", "src/uiollms/alternatives/press_worker.py"}  # of other programs
COMMANDS = sorted(STARTED - {"src/uiollms/__main__.py"} - WORKERS | MODULES)
MODULES_OF_BENCHMARKS = {
    name
    for name in COMMANDS
    if name.startswith("benchmarks/") and "python -m benchmarks." in (ROOT / name).read_text()
}
# This command has lm-eval's options.
HARNESS = "src/uiollms/cli/lm_eval.py"


def shown_command(command: str) -> str:
    """src/uiollms/cli/report.py -> uiollms report"""
    path = Path(command)
    if path.parts[0] == "src":
        return {"chat": "uiollms", "lm_eval": "uiollms eval"}.get(path.stem, f"uiollms {path.stem}")
    if path.name != "__main__.py" and command not in MODULES_OF_BENCHMARKS:
        return f"python {command}"
    parts = [part for part in path.with_suffix("").parts if part != "__main__"]
    return "python -m " + ".".join(parts)


def help_of(command: str, monkeypatch, capsys, *sub: str) -> tuple[str, list[str]]:
    """The help text of a command or subcommand, and the names of its subcommands."""
    groups, add = [], argparse.ArgumentParser.add_subparsers
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(
            argparse.ArgumentParser,
            "add_subparsers",
            lambda *a, **k: groups.append(add(*a, **k)) or groups[-1],
        )
        patch.setattr(sys, "argv", [command, *sub, "--help"])
        if command.startswith("src/"):
            importlib.import_module(".".join(Path(command).with_suffix("").parts[1:])).main()
        elif command in MODULES_OF_BENCHMARKS:
            importlib.import_module(".".join(Path(command).with_suffix("").parts)).main()
        else:
            import_file(command).main()
    assert end.value.code == 0
    return capsys.readouterr().out, [name for group in groups for name in group.choices]


def test_every_argument_of_uiollms_has_a_help_text():
    def undescribed(parser: argparse.ArgumentParser) -> list[str]:
        found = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [name for sub in action.choices.values() for name in undescribed(sub)]
            elif not action.help:
                found.append(f"{parser.prog} {action.dest}")
        return found

    commands = {name: (found.module, found.help) for name, found in PACKAGE_COMMANDS.items()}
    assert not undescribed(completion.make_parser(commands))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    program = shown_command(command)
    text, subcommands = help_of(command, monkeypatch, capsys)
    assert re.search(rf"^(example: |  +)?{re.escape(program)}( |$)", text, re.MULTILINE), text
    for sub in subcommands if command != HARNESS else ():
        text, _ = help_of(command, monkeypatch, capsys, sub)
        assert f"example: {program} {sub} " in text
    assert not list(tmp_path.iterdir())


def test_schema_writes_the_committed_files(tmp_path, capsys):
    importlib.import_module("uiollms.cli.schema").main(["--out", str(tmp_path)])
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 4 and capsys.readouterr().out.split() == [str(p) for p in written]
    for path in written:
        assert path.read_text() == (ROOT / path.relative_to(tmp_path)).read_text()


def test_the_progress_bar_shows_loss_rate_and_speed(workspace, capsys):
    assert call("train.py", "--env_conf", "env.json") == 0
    output = capsys.readouterr()
    last = output.err.split("train: ")[-1]
    bar = r"3/3 \[00:\d\d<00:00, .*nll \d+\.\d{3}, lr \d\.\de-\d\d, [\d,]+ tokens/s\]"
    assert re.search(bar, last), last
    assert "with memory" in output.out and "trained parameters" in output.out


@pytest.mark.parametrize("flags", [["--json"], ["--quiet", "--json"], ["--quiet"]], ids=" ".join)
def test_output_for_scripts(workspace, capsys, flags):
    assert call("train.py", "--env_conf", "env.json", *flags) == 0
    trained = capsys.readouterr()
    assert trained.out == (Path("out/metrics.jsonl").read_text() if "--json" in flags else "")
    assert ("train: 100%" in trained.err) == ("--quiet" not in flags)

    assert call("test.py", "--env_conf", "env.json", *flags) == 0
    tested = capsys.readouterr()
    assert ("evaluate:" in tested.err) == ("--quiet" not in flags)
    if "--json" in flags:
        assert json.loads(tested.out) == json.loads(Path("out/test.json").read_text())
    else:
        assert tested.out == ""


def test_bash_completes_commands_options_choices_and_paths(tmp_path, monkeypatch, capsys):
    assert program.main(["--print_completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)

    def completed(*words: str) -> set[str]:
        """What bash proposes for the last word."""
        script = f"""source {tmp_path}/completion; COMP_WORDS=({" ".join(map(repr, ["uiollms", *words]))})
COMP_CWORD={len(words)}; COMP_LINE=; _shtab_uiollms; printf '%s\\n' "${{COMPREPLY[@]}}\""""
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("") >= PACKAGE_COMMANDS.keys()
    for command in PACKAGE_COMMANDS.keys() - {"eval", "study"}:  # lm-eval's options; subcommands
        assert "--json" in completed(command, "--js") or "--out" in completed(command, "--o")
    assert completed("re") == {"report", "refine"}
    assert completed("refine", "--pass") == {"--passage_size", "--passages"}
    assert completed("train", "--re") == {"--resume", "--restart"}
    assert completed("study", "gr") == {"gradients"}
    assert "--top_p" in completed("ask", "--t")
    assert completed("convert", "--dtype", "bf") == {"bf16"}
    (tmp_path / "books").mkdir()
    for name in ("book.txt", "book.mem"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    both = {"book.txt", "book.mem"}
    assert completed("compress", "bo") >= both and completed("ask", "bo") >= both
    assert completed("compress", "book.txt", "-o", "bo") >= both
    assert completed("train", "--env_conf", "bo") >= both
    assert completed("study", "gradients", "--env_conf", "bo") >= both
    assert completed("convert", "bo") >= both
    assert completed("report", "bo") == {"books"} == completed("study", "cost", "--out", "bo")
    assert program.main(["--print_completion", "fish"]) == 2
    assert "expected one of bash, zsh, tcsh" in capsys.readouterr().err


def test_uiollms_lists_its_commands_and_refuses_others(capsys):
    assert program.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in PACKAGE_COMMANDS.items():
        line = f"  {name:<10}{command.help}\n            uiollms {name} {command.example}\n"
        assert line in text
    assert program.main(["repport"]) == 2
    assert "no command 'repport'; did you mean 'report'?" in capsys.readouterr().err
