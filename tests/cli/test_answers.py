"""uiollms answers."""

import json
from pathlib import Path

import pytest
from test_scripts import ENV, run_command

from uiollms.data import open_corpus

ARGUMENTS = ["answers", "files:asked.jsonl", "-o", "new.jsonl", *ENV, "--max_new_tokens=4"]


@pytest.fixture
def asked(workspace):
    lines = [dict(input=f"Text {i}.\u2028 Why? ", output="") for i in range(3)]
    lines[1]["input"] = " "  # a blank document
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    Path("asked.jsonl").write_text(text, encoding="utf-8")


def test_the_result_is_a_corpus(asked, capsys):
    assert run_command("uiollms", ARGUMENTS) == 0
    assert "new.jsonl: 2 of 3 documents have answers" in capsys.readouterr().out
    corpus = open_corpus("files:new.jsonl")
    assert [d.text for d in corpus] == ["Text 0.\u2028 Why? ", "Text 2.\u2028 Why? "]
    assert all(d.response for d in corpus)


def test_a_result_is_continued_but_not_overwritten(asked, capsys):
    assert run_command("uiollms", [*ARGUMENTS, "--num_documents=1"]) == 0
    first = Path("new.jsonl").read_text()
    assert run_command("uiollms", ARGUMENTS) == 2
    assert "--output new.jsonl: exists; remove it, or use --resume" in capsys.readouterr().err
    assert run_command("uiollms", [*ARGUMENTS, "--resume"]) == 0
    resumed = Path("new.jsonl").read_text()
    Path("new.jsonl").unlink()
    assert run_command("uiollms", ARGUMENTS) == 0
    assert (
        resumed == Path("new.jsonl").read_text() and resumed.startswith(first) and resumed != first
    )
    Path("new.jsonl").write_text('{"input": "x"}\n')
    assert run_command("uiollms", [*ARGUMENTS, "--resume"]) == 2
    assert "new.jsonl: not written by `uiollms answers`" in capsys.readouterr().err
