"""Tests `python -m uiollms report` on complete and incomplete run folders, and `by_length`."""

import base64
import io
import json
import math
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from test_commands import ROOT, call

import uiollms
from uiollms.build import load_memory_lm
from uiollms.cli.common import reporting_errors
from uiollms.cli.report import add_attention, main
from uiollms.config.load import load_env_config, parse
from uiollms.evaluation.attention_mass import AttentionMass
from uiollms.evaluation.evaluator import Evaluation, TaskEntry
from uiollms.evaluation.results import ScoredTask, TaskSummary
from uiollms.evaluation.saved_results import load_token_nlls, save_token_nlls
from uiollms.evaluation.statistics import by_length
from uiollms.reports.page import duration
from uiollms.reports.run_folder import read_folder

TRAIN = ("train.py", "--env_conf", "env.json")
ALL = {"training", "steps", "position", "length", "attention"}


def report(*arguments: str) -> int:
    return reporting_errors(lambda: main(list(arguments)))


class Page(HTMLParser):
    """Parses a page. pictures: heading -> bytes; words: the page's text; elsewhere: what it would
    load from other files."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pictures: dict[str, bytes] = {}
        self.words, self.tags, self.elsewhere = "", [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        source = found.get("src", "")
        if source.startswith("data:image/png;base64,"):
            self.pictures[found["alt"]] = base64.b64decode(source.split(",")[1])
        self.elsewhere += [
            v for k, v in attributes if k in ("src", "href", "action") and not v.startswith("data:")
        ]

    def handle_data(self, data) -> None:
        self.words += data


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("plots/*.png")}


def test_a_whole_run_on_one_page(workspace, capsys):
    assert call(*TRAIN) == 0
    assert report("out", "--no_attention") == 0
    said = capsys.readouterr().out
    assert (
        "not in the report: attention to memory: --no_attention; this command makes it: python -m "
        "uiollms report out" in said
    )
    (line,) = [line for line in said.splitlines() if "by test.py" in line]
    command = line.split("this command makes it: ")[1]
    assert (
        "not in the report: perplexity by length: out/test-nll.safetensors does not exist" in said
    )
    assert pngs(Path("out")).keys() == ALL - {"length", "attention"}

    tasks = [
        dict(
            task_type="perplexity",
            task_name="files:book*.txt",
            num_instance=2,
            truncation=100,
            compare=["window", "raw"],
        )
    ]
    tasks.append(
        dict(
            task_type="passkey",
            task_name="files:book*.txt",
            num_instance=1,
            truncation=230,
            depths=[0.5],
        )
    )
    Path("test.json").write_text(json.dumps(tasks))
    assert (
        call(*shlex.split(command)[1:]) == 0
    )  # the command that the report names evaluates the newest checkpoint
    assert "weights: out/checkpoints/step-00000003" in capsys.readouterr().out
    assert report("out") == 0
    said = capsys.readouterr().out
    assert (
        "not in the report" not in said
        and "measuring attention; weights: checkpoints/step-00000003" in said
    )
    page, shown = Page(Path("out/report.html")), pngs(Path("out"))
    assert shown.keys() == ALL | {"tasks"} and sorted(shown.values()) == sorted(
        page.pictures.values()
    )
    for name, data in shown.items():
        assert imread(io.BytesIO(data))[..., :3].std() > 0.05, name  # not blank
    assert not page.elsewhere and not {"script", "link", "iframe"} & set(page.tags)
    for words in (
        "3 of 3 in",
        "240",
        "uio, S = 2",
        "16 tokens into 2 slots",
        "passkey of files:book*.txt",
        "torch 2.",
    ):
        assert words in page.words, words
    numbers = json.loads(Path("out/test.json").read_text())["results"][0]
    assert all(
        f"perplexity {numbers[mode]['perplexity']:.2f}" in page.words
        for mode in ("memory", "window", "raw")
    )
    mass = AttentionMass.load(Path("out/attention.safetensors"))
    assert mass.fractions.shape == (3, 6, 7) and torch.allclose(
        mass.fractions.sum(2), torch.ones(3, 6), atol=1e-5
    )
    assert (
        mass.about["tokens"] == "100"
        and "in one document of 100 tokens from files:book*.txt" in page.words
    )

    # A moved folder gives the same pictures without the model. Attention is measured again for new
    # weights and if a number of tokens is given.
    Path("moved").mkdir()
    Path("out").rename("moved/out")
    first = Path("moved/out/report.html").read_text()
    for path in (*Path("moved/out/plots").iterdir(), Path("moved/out/report.html")):
        path.unlink()
    assert report("moved/out") == 0 and "measuring" not in capsys.readouterr().out
    assert pngs(Path("moved/out")) == shown and Path("moved/out/report.html").read_text() == first
    add_attention(read_folder(Path("moved/out")), False, 50)
    assert AttentionMass.load(Path("moved/out/attention.safetensors")).fractions.shape == (3, 3, 4)
    assert report("moved/out", "--attention_tokens", "16") == 2
    assert "16 tokens fit one chunk of 16" in capsys.readouterr().err
    Path("moved/out/checkpoints/step-00000003").rename("moved/out/checkpoints/step-00000004")
    add_attention(read_folder(Path("moved/out")), False, None)
    assert "weights: checkpoints/step-00000004" in capsys.readouterr().out


def test_a_new_run_takes_no_report_from_the_old_one(workspace):
    """The new run's checkpoint has the same name as the old one's."""
    for _ in range(2):
        assert call(*TRAIN, "--set=train.train_iters=1") == 0
        Path("out/attention.safetensors").touch()
    assert Path("out/earlier-1/attention.safetensors").exists()


def test_only_an_evaluation(workspace, capsys):
    assert call("test.py", "--env_conf", "env.json") == 0
    assert report("out") == 0
    said = capsys.readouterr().out
    assert (
        "not in the report: the training curve: out/metrics.jsonl does not exist; this command "
        "makes it: python train.py --env_conf FILE" in said
    )
    assert said.count("not in the report") == 1 and "weights: untrained" in said
    assert pngs(Path("out")).keys() == {"position", "length", "attention"}


def test_files_of_other_versions_are_named(workspace, capsys):
    """The evaluation and the metrics that this repository's README shows are of an early version,
    whose results do not name their task."""
    Path("out").mkdir()
    Path("out/test.json").write_text((ROOT / "docs/results/smollm2-8x-test.json").read_text())
    Path("out/metrics.jsonl").write_text(
        (ROOT / "docs/results/smollm2-8x-metrics.jsonl").read_text()
    )
    Path("out/test-nll.safetensors").write_bytes(b"no tensors")
    assert report("out") == 0
    said = capsys.readouterr().out
    assert (
        "the evaluation in test.json: out/test.json has no 'task_type': another version wrote it; "
        "this command makes it: python" in said
    )
    assert "perplexity by length: out/test-nll.safetensors cannot be read" in said
    assert "the evaluation in metrics.jsonl: out/metrics.jsonl has no 'task_type'" in said
    assert "attention to memory: out has no config, which names the model" in said
    assert pngs(Path("out")).keys() == {"training", "steps"}


def test_no_run_folder(workspace, capsys):
    assert (
        report("nowhere") == 2
        and "nowhere: is not a folder; expected a run folder" in capsys.readouterr().err
    )
    Path("empty").mkdir()
    assert (
        report("empty") == 2
        and "empty: has neither metrics.jsonl nor test.json" in capsys.readouterr().err
    )
    assert not list(Path("empty").iterdir())


@torch.no_grad()
def test_by_length_is_what_shorter_documents_have(workspace):
    model, tokenizer = load_memory_lm(load_env_config("env.json"), "env.json")
    task = dict(task_type="perplexity", task_name="files:book*.txt", num_instance=3, truncation=100)
    entry = parse(
        TaskEntry, task | dict(compare=["window"], protocols=["paper", "document"]), "here"
    )
    results = Evaluation(model, tokenizer, [entry]).run()
    save_token_nlls(results, Path("nll.safetensors"))
    ids = [
        torch.tensor(tokenizer(Path(f"book{i}.txt").read_text()).input_ids[:100]) for i in range(3)
    ]
    for result, protocol in zip(
        load_token_nlls(Path("nll.safetensors")), ("paper", "document"), strict=True
    ):
        assert result.task == ScoredTask("files:book*.txt", "perplexity", 100, 16, protocol, 2)
        for mode, scores in result.scores.items():
            points = by_length(list(scores.values()))
            assert [p["length"] for p in points] == [2, 4, 8, 16, 32, 64, 100] and all(
                p["documents"] == 3 for p in points
            )
            for point in points:
                cut = [
                    uiollms.evaluation.scoring.score(
                        model, document[: point["length"]], protocol, mode
                    ).nll
                    for document in ids
                ]
                assert point["tokens"] == len(torch.cat(cut))
                assert point["perplexity"] == pytest.approx(
                    torch.cat(cut).double().mean().exp().item(), rel=1e-5
                )
    documents = list(scores.values())
    documents[0] = replace(
        documents[0], nll=documents[0].nll[:40], positions=documents[0].positions[:40]
    )
    assert [p["documents"] for p in by_length(documents)] == [
        3,
        3,
        3,
        3,
        3,
        2,
        2,
    ]  # one has 41 tokens


def test_a_summary_read_again():
    numbers = dict(
        documents=1,
        perplexity=math.e,
        interval_95=[1.0, 3.0],
        document_mean=2.0,
        document_mean_interval_95=[1, 3],
    )
    summary = dict(
        task="x",
        task_type="perplexity",
        truncation=None,
        chunk_size=8,
        protocol="paper",
        memory=numbers,
        mean=2.0,
    )
    result = TaskSummary.from_json(summary)
    assert result.modes == {"memory": numbers} and result.task.title == "perplexity (paper) of x"


def test_durations():
    assert [duration(s) for s in (3.21, 75, 4105)] == ["3.2 s", "1 min 15 s", "1 h 8 min"]
