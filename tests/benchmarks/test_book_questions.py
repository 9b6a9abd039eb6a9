"""The twenty questions about novels, on short texts that contain the same words."""

import json
from pathlib import Path

import pytest
from benchmarks import book_questions
from benchmarks.book_questions import BEFORE, LENGTH, QUESTIONS

from uiollms.data import open_corpus
from uiollms.files.errors import ConfigError


def write_books(folder: Path) -> None:
    folder.mkdir()
    for book in {question.book for question in QUESTIONS}:
        parts = [
            f"{'x' * 2 * LENGTH}{question.anchor} ({question.answer})"
            for question in QUESTIONS
            if question.book == book
        ]
        (folder / f"{book}.txt").write_text("".join(parts) + "y" * LENGTH)


def test_every_question_follows_its_passage(tmp_path):
    write_books(tmp_path / "novels")
    out = tmp_path / "questions.jsonl"
    book_questions.main(["--books", str(tmp_path / "novels"), "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(QUESTIONS) == 20
    for row, question in zip(rows, QUESTIONS, strict=True):
        passage, asked = row["input"].split("\n\nQuestion: ")
        assert len(passage) == LENGTH
        assert passage.find(f"{question.anchor} ({question.answer})") == BEFORE
        assert (asked, row["output"]) == (f"{question.question}\nAnswer:", f" {question.answer}")
    (first, *_) = open_corpus(f"files:{out}", None)
    assert first.response == " Admiral Benbow"


def test_another_edition_is_refused(tmp_path):
    write_books(tmp_path / "novels")
    book = tmp_path / "novels/the-time-machine.txt"
    book.write_text(book.read_text().replace("sealed jar", "jar"))
    with pytest.raises(
        ConfigError, match="the-time-machine.txt does not contain 'in a sealed jar'"
    ):
        book_questions.write_questions(tmp_path / "novels", tmp_path / "questions.jsonl")
    book.unlink()
    with pytest.raises(ConfigError, match="the-time-machine.txt cannot be read"):
        book_questions.write_questions(tmp_path / "novels", tmp_path / "questions.jsonl")
