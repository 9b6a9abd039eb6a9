"""Evaluates benchmark questions with the tiny model, from a local copy of each dataset to the
score of an answer."""

import json
from pathlib import Path

import pytest
import torch
from test_benchmark_files import CHOICE, FACTS, PASSAGES, write_lines, write_zip
from test_commands import call
from test_evaluator import entry, tiny  # noqa: F401

from uiollms.data import open_corpus
from uiollms.evaluation.answer_metrics import score_answer
from uiollms.evaluation.evaluator import Evaluation

# name of a corpus -> an answer of the model, and its score
ANSWERS = {
    "longbench.hotpotqa": ("The number 2.", 1 / 2),  # one of two words in both directions
    "longbench.trec": ("\nCity or Date\nCity", 1 / 2),  # the first line names two classes
    "longbench.lcc": ("# code\nParagraph 2", 1.0),
    "longbench.passage_count": ("2 or 3 or 2", 2 / 3),
    "longbench-v2.short": ("**The correct answer is (B)**", 1.0),
    "babilong.qa1.4k": ("In the garden. Not in the office.", 1.0),
    "helmet.nq.8k": ("It is ada brook, I think", 1.0),
}


@pytest.fixture
def hub(workspace, monkeypatch) -> Path:
    """A local copy of every dataset."""
    folder = workspace / "hub"
    monkeypatch.setenv("UIOLLMS_HUB_DIR", str(folder))
    monkeypatch.setenv("UIOLLMS_CACHE", str(workspace / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workspace / "arrow")
    write_zip(folder)
    for path, rows in {
        "THUDM/LongBench-v2/data.json": [CHOICE],
        "RMT-team/babilong/data/qa1/4k.json": FACTS[:2],
    }.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(json.dumps(rows))
    kilt = "princeton-nlp/HELMET/data/kilt/nq-dev-multikilt_1000_k50_dep3.jsonl"
    write_lines(folder / kilt, dict(question="Who?", answers=["Ada", "Ada Brook"], ctxs=PASSAGES))
    return folder


def question_task(name: str, **fields):
    return entry("question answering", task_name=name, truncation=200, **fields)


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_scored_by_the_benchmarks_metric(hub, tiny, monkeypatch, name):  # noqa: F811
    answer, score = ANSWERS[name]
    monkeypatch.setattr(Evaluation, "_answer", lambda *arguments: ("reference", answer))
    task = question_task(name, generate=True, num_instance=1)
    (result,) = Evaluation(*tiny, [task]).run()
    numbers = result.summarize().modes["memory"]
    assert numbers["answer_score"] == pytest.approx(score)
    assert numbers["answer_metric"] == open_corpus(name)[0].metric


def test_an_answer_has_the_benchmarks_length_and_fits(hub, tiny):  # noqa: F811
    model, tokenizer = tiny
    task = question_task("longbench.hotpotqa", generate=True, compare=["raw"], num_instance=1)
    evaluation = Evaluation(model, tokenizer, [task.model_copy(update=dict(truncation=120))])
    (result,) = evaluation.run()
    (instance,) = evaluation.measurements[0].instances
    ids = instance.prompt[None]
    for mode, answering, most in (("memory", model, 32), ("raw", model.base, 128 - ids.shape[1])):
        mask = torch.ones_like(ids)
        output = answering.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=min(32, most)
        )
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        expected = instance.question.metric, score_answer(text, instance.question)
        assert result.scores[mode][0].answer == expected
        assert result.scores[mode][0].texts == ((" Paragraph 2", text),)


def test_the_command_prints_the_score(hub, capsys):
    tasks = [
        dict(
            task_type="question answering",
            task_name=name,
            num_instance=1,
            truncation=200,
            generate=True,
        )
        for name in ("longbench.trec", "babilong.qa1.4k")
    ]
    Path("test.json").write_text(json.dumps(dict(tasks=tasks)))
    assert call("test.py", "--env_conf", "env.json") == 0, capsys.readouterr().err
    table = " ".join(capsys.readouterr().out.split())
    assert "class_match 0.000" in table and "only_label_match 0.000" in table
    results = json.loads(Path("out/test.json").read_text())["results"]
    assert [result["memory"]["answer_metric"] for result in results] == [
        "class_match",
        "only_label_match",
    ]
