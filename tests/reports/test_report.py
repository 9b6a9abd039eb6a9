"""`python -m uiollms report`: one page of whatever a run folder holds, and what by_length
counts."""

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
from uiollms.evaluation.results import TaskResult, by_length
from uiollms.evaluation.saved_results import load_token_nlls, save_token_nlls
from uiollms.reports.page import duration
from uiollms.reports.run_folder import read_folder

TRAIN = ("train.py", "--env_conf", "env.json")
ALL = {"training", "steps", "position", "length", "attention"}


def report(*arguments: str) -> int:
    return reporting_errors(lambda: main(list(arguments)))


class Page(HTMLParser):
    """The pictures of a page as bytes by their headings, its text, and whatever it would load
    from elsewhere."""

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
        "not in it: attention to memory: --no_attention; made by: python -m uiollms report out"
        in said
    )
    command = next(line for line in said.splitlines() if "by test.py" in line).split("made by: ")[1]
    assert "not in it: perplexity by length: out/test-nll.safetensors does not exist" in said
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
        "not in it" not in said and "measures attention, weights: checkpoints/step-00000003" in said
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
    assert mass.shares.shape == (3, 6, 7) and torch.allclose(
        mass.shares.sum(2), torch.ones(3, 6), atol=1e-5
    )
    assert (
        mass.about["tokens"] == "100"
        and "in one document of 100 tokens from files:book*.txt" in page.words
    )

    # From the folder alone, wherever it lies: no model, the same pictures. New weights are measured
    # anew, and so is a wish.
    Path("moved").mkdir()
    Path("out").rename("moved/out")
    first = Path("moved/out/report.html").read_text()
    for path in (*Path("moved/out/plots").iterdir(), Path("moved/out/report.html")):
        path.unlink()
    assert report("moved/out") == 0 and "measures" not in capsys.readouterr().out
    assert pngs(Path("moved/out")) == shown and Path("moved/out/report.html").read_text() == first
    add_attention(read_folder(Path("moved/out")), False, 50)
    assert AttentionMass.load(Path("moved/out/attention.safetensors")).shares.shape == (3, 3, 4)
    assert report("moved/out", "--attention_tokens", "16") == 2
    assert "16 tokens fit one chunk of 16" in capsys.readouterr().err
    Path("moved/out/checkpoints/step-00000003").rename("moved/out/checkpoints/step-00000004")
    add_attention(read_folder(Path("moved/out")), False, None)
    assert "weights: checkpoints/step-00000004" in capsys.readouterr().out


def test_a_new_run_takes_no_report_from_the_old_one(workspace):
    """Its checkpoint would have the same name."""
    for _ in range(2):
        assert call(*TRAIN, "--set=train.train_iters=1") == 0
        Path("out/attention.safetensors").touch()
    assert Path("out/earlier-1/attention.safetensors").exists()


def test_only_an_evaluation(workspace, capsys):
    assert call("test.py", "--env_conf", "env.json") == 0
    assert report("out") == 0
    said = capsys.readouterr().out
    assert (
        "not in it: the training curve: out/metrics.jsonl does not exist; made by: python train.py "
        "--env_conf FILE" in said
    )
    assert said.count("not in it") == 1 and "weights: untrained" in said
    assert pngs(Path("out")).keys() == {"position", "length", "attention"}


def test_files_of_other_versions_are_named(workspace, capsys):
    """The evaluation and the metrics that this repository's README shows were written before
    results said what they are of."""
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
        "made by: python" in said
    )
    assert "perplexity by length: out/test-nll.safetensors cannot be read" in said
    assert "the evaluation in metrics.jsonl: out/metrics.jsonl has no 'task_type'" in said
    assert "attention to memory: out has no config that would name the model" in said
    assert pngs(Path("out")).keys() == {"training", "steps"}


def test_no_run_folder(workspace, capsys):
    assert (
        report("nowhere") == 2
        and "nowhere: is not a folder; a run folder is what" in capsys.readouterr().err
    )
    Path("empty").mkdir()
    assert (
        report("empty") == 2
        and "empty: holds neither metrics.jsonl nor test.json" in capsys.readouterr().err
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
        assert result.about == ("files:book*.txt", "perplexity", 100, 16, protocol, 2, None)
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
    result = TaskResult.from_summary(summary)
    assert result.modes == {"memory": numbers} and result.title == "perplexity (paper) of x"


def test_durations():
    assert [duration(s) for s in (3.21, 75, 4105)] == ["3.2 s", "1 min 15 s", "1 h 8 min"]
