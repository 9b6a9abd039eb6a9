"""Tests `uiollms report` on complete and incomplete run folders, and `by_length`."""

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

from uiollms.build import load_memory_lm
from uiollms.cli.common import reporting_errors
from uiollms.cli.report import add_attention, main
from uiollms.config.load import load_env_config, parse
from uiollms.evaluation.attention_mass import AttentionMass
from uiollms.evaluation.evaluator import Evaluation, TaskEntry
from uiollms.evaluation.results import ScoredTask, TaskSummary
from uiollms.evaluation.saved_results import load_token_nlls, save_token_nlls
from uiollms.evaluation.scoring import score
from uiollms.evaluation.statistics import by_length
from uiollms.reports.page import duration
from uiollms.reports.run_folder import read_folder

TRAIN = ("train.py", "--env_conf", "env.json")
ALL = {"training", "steps", "position", "length", "attention"}


def report(*arguments: str) -> int:
    return reporting_errors(lambda: main(list(arguments)))


class Page(HTMLParser):
    """Parses a page. pictures: heading -> bytes. words: the page's text. external: the addresses of
    what it would load from other files."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pictures: dict[str, bytes] = {}
        self.words, self.tags, self.external = "", [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        source = found.get("src", "")
        if source.startswith("data:image/png;base64,"):
            self.pictures[found["alt"]] = base64.b64decode(source.split(",")[1])
        for name, value in attributes:
            if name in ("src", "href", "action") and not value.startswith("data:"):
                self.external.append(value)

    def handle_data(self, data) -> None:
        self.words += data


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("plots/*.png")}


def test_a_report_shows_a_whole_run_on_one_page(workspace, capsys):
    assert call(*TRAIN) == 0
    assert report("out", "--no_attention") == 0
    output = capsys.readouterr().out
    assert (
        "not in the report: attention to memory: --no_attention; this command makes it: uiollms "
        "report out" in output
    )
    (line,) = [line for line in output.splitlines() if "by test.py" in line]
    command = line.split("this command makes it: ")[1]
    missing = "not in the report: perplexity by length: out/test-nll.safetensors does not exist"
    assert missing in output
    assert pngs(Path("out")).keys() == ALL - {"length", "attention"}

    perplexity = dict(task_type="perplexity", num_instance=2, truncation=100)
    passkey = dict(task_type="passkey", num_instance=1, truncation=230, depths=[0.0, 1.0])
    tasks = [perplexity | dict(compare=["window", "raw"]), passkey]
    files = dict(task_name="files:book*.txt")
    Path("test.json").write_text(json.dumps([task | files for task in tasks]))
    # The command that the report names evaluates the newest checkpoint.
    assert call(*shlex.split(command)[1:]) == 0
    assert "weights: out/checkpoints/step-00000003" in capsys.readouterr().out
    assert report("out") == 0
    output = capsys.readouterr().out
    assert "not in the report" not in output
    assert "measuring attention; weights: checkpoints/step-00000003" in output
    page, pictures = Page(Path("out/report.html")), pngs(Path("out"))
    assert pictures.keys() == ALL | {"tasks"}
    assert sorted(pictures.values()) == sorted(page.pictures.values())
    for name, data in pictures.items():
        assert imread(io.BytesIO(data))[..., :3].std() > 0.05, f"{name} is blank"
    assert not page.external and not {"script", "link", "iframe"} & set(page.tags)
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
    for mode in ("memory", "window", "raw"):
        assert f"{numbers[mode]['perplexity']:.2f}" in page.words
    mass = AttentionMass.load(Path("out/attention.safetensors"))
    assert mass.fractions.shape == (3, 6, 7)
    assert torch.allclose(mass.fractions.sum(2), torch.ones(3, 6), atol=1e-5)
    assert mass.about["tokens"] == "100"
    assert "in one document of 100 tokens from files:book*.txt" in page.words

    # A moved folder gives the same pictures without the model. Attention is measured again for new
    # weights and if a number of tokens is given.
    Path("moved").mkdir()
    Path("out").rename("moved/out")
    first = Path("moved/out/report.html").read_text()
    for path in (*Path("moved/out/plots").iterdir(), Path("moved/out/report.html")):
        path.unlink()
    assert report("moved/out") == 0 and "measuring" not in capsys.readouterr().out
    assert pngs(Path("moved/out")) == pictures
    assert Path("moved/out/report.html").read_text() == first
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


def test_a_report_of_an_evaluation_without_training(workspace, capsys):
    assert call("test.py", "--env_conf", "env.json") == 0
    assert report("out") == 0
    output = capsys.readouterr().out
    assert (
        "not in the report: the training curve: out/metrics.jsonl does not exist; this command "
        "makes it: python train.py --env_conf FILE" in output
    )
    assert output.count("not in the report") == 1 and "weights: untrained" in output
    assert pngs(Path("out")).keys() == {"position", "length", "attention"}


def test_files_of_other_versions_are_named(workspace, capsys):
    """The files in docs/results are of an early version, whose results do not name their task."""
    Path("out").mkdir()
    old = ROOT / "docs/results"
    Path("out/test.json").write_text((old / "smollm2-8x-test.json").read_text())
    Path("out/metrics.jsonl").write_text((old / "smollm2-8x-metrics.jsonl").read_text())
    Path("out/test-nll.safetensors").write_bytes(b"no tensors")
    assert report("out") == 0
    output = capsys.readouterr().out
    assert (
        "the evaluation in test.json: out/test.json has no 'task_type': another version wrote it; "
        "this command makes it: python" in output
    )
    assert "perplexity by length: out/test-nll.safetensors cannot be read" in output
    assert "the evaluation in metrics.jsonl: out/metrics.jsonl has no 'task_type'" in output
    assert "attention to memory: out has no config, which names the model" in output
    assert pngs(Path("out")).keys() == {"training", "steps"}


def test_a_report_without_a_run_folder_is_refused(workspace, capsys):
    assert report("nowhere") == 2
    assert "nowhere: is not a folder; expected a run folder" in capsys.readouterr().err
    Path("empty").mkdir()
    assert report("empty") == 2
    assert "empty: has neither metrics.jsonl nor test.json" in capsys.readouterr().err
    assert not list(Path("empty").iterdir())


@torch.no_grad()
def test_by_length_equals_the_scores_of_shorter_documents(workspace):
    model, tokenizer = load_memory_lm(load_env_config("env.json"), "env.json")
    task = dict(task_type="perplexity", task_name="files:book*.txt", num_instance=3, truncation=100)
    task |= dict(compare=["window"], protocols=["paper", "document"])
    results = Evaluation(model, tokenizer, [parse(TaskEntry, task, "here")]).run()
    save_token_nlls(results, Path("nll.safetensors"))
    texts = [Path(f"book{i}.txt").read_text() for i in range(3)]
    ids = [torch.tensor(tokenizer(text).input_ids[:100]) for text in texts]
    saved = load_token_nlls(Path("nll.safetensors"))
    for result, protocol in zip(saved, ("paper", "document"), strict=True):
        assert result.task == ScoredTask("files:book*.txt", "perplexity", 100, 16, protocol, 2)
        for mode, scores in result.scores.items():
            points = by_length(list(scores.values()))
            assert [point["length"] for point in points] == [2, 4, 8, 16, 32, 64, 100]
            assert all(point["documents"] == 3 for point in points)
            for point in points:
                shorter = [document[: point["length"]] for document in ids]
                nll = torch.cat([score(model, text, protocol, mode).nll for text in shorter])
                assert point["tokens"] == len(nll)
                perplexity = nll.double().mean().exp().item()
                assert point["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    # The first document is cut to 41 tokens.
    first, *others = scores.values()
    first = replace(first, nll=first.nll[:40], positions=first.positions[:40])
    counts = [point["documents"] for point in by_length([first, *others])]
    assert counts == [3, 3, 3, 3, 3, 2, 2]


def test_a_summary_is_read_back():
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


def test_durations_have_readable_units():
    assert [duration(s) for s in (3.21, 75, 4105)] == ["3.2 s", "1 min 15 s", "1 h 8 min"]
