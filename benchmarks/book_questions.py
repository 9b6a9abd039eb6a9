"""Writes twenty questions about three novels, each after the passage that answers it, for a task of
type `question answering`.

    python -m benchmarks.book_questions --books novels --out questions.jsonl

`--books` is a folder with treasure-island.txt, the-time-machine.txt and great-expectations.txt,
plain texts of Project Gutenberg. The shipped adapter was not trained on these novels.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from uiollms.cli.common import errors_as_lines
from uiollms.files.atomic import replace_text
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import as_json

BEFORE, LENGTH = 1000, 4000  # characters of a passage before its anchor, and of all of it


class Question(NamedTuple):
    """anchor: words of the book, in which or next to which the answer stands; the first place that
    has them is meant"""

    book: str
    anchor: str
    question: str
    answer: str


def questions_of(book: str, *rows: tuple[str, str, str]) -> list[Question]:
    return [Question(book, *row) for row in rows]


QUESTIONS = (
    *questions_of(
        "treasure-island",
        ("my father kept the", "What is the name of the inn?", "Admiral Benbow"),
        ("executed on the forearm", "Whose name is tattooed on the captain's arm?", "Billy Bones"),
        ("fingers of the left hand", "How many fingers does the left hand want?", "two"),
        ("hundred tons; name", "What is the name of the schooner?", "HISPANIOLA"),
        ("a hill in the centre part", "What is the hill on the map called?", "The Spy-glass"),
        ("a piece of cheese", "Which food did Ben Gunn dream of?", "cheese"),
        ("was the squire's name", "What is the name of the squire?", "Trelawney"),
    ),
    *questions_of(
        "the-time-machine",
        ("found that her name was", "What is the little woman's name?", "Weena"),
        ("was the name by which these", "What are the creatures below called?", "Morlocks"),
        ("odd would be incredibly", "Which year is it?", "Eight Hundred and Two Thousand"),
        ("curiosity regarding the", "Which palace is he curious about?", "Green Porcelain"),
        ("in a sealed jar", "Which substance is in the sealed jar?", "camphor"),
    ),
    *questions_of(
        "great-expectations",
        ("My father's family name being", "What is Pip's family name?", "Pirrip"),
        ("Its other name was", "What is the other name of the house?", "Satis"),
        ("and I am a lawyer", "What is the lawyer's name?", "Jaggers"),
        ("Have you paid", "Whom did the men pay?", "Wemmick"),
        ("for a familiar name", "Which name does Herbert give his friend?", "Handel"),
        ("informed me what arrangements", "To which inn is Pip to go?", "Barnard's Inn"),
        ("you'll say he's a", "What is the name of the gun?", "Stinger"),
        ("a journeyman at weekly wages", "What is the journeyman's name?", "Orlick"),
    ),
)


def passage_of(books: Path, question: Question) -> str:
    """The passage of a book that answers a question. Raises ConfigError if the book or the anchor
    is missing."""
    path = books / f"{question.book}.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--books: {path} cannot be read ({error.strerror})") from None
    place = text.find(question.anchor)
    if place < 0:
        raise ConfigError(
            f"--books: {path} does not contain {question.anchor!r}; use the text of Project "
            "Gutenberg"
        )
    start = max(0, place - BEFORE)
    passage = text[start : start + LENGTH]
    assert question.answer in passage, question
    return passage


def write_questions(books: Path, out: Path) -> None:
    """Writes one line per question, with the fields `input` and `output`. Raises ConfigError if a
    book or an anchor is missing."""
    lines = []
    for question in QUESTIONS:
        prompt = f"{passage_of(books, question)}\n\nQuestion: {question.question}\nAnswer:"
        lines.append(as_json({"input": prompt, "output": f" {question.answer}"}) + "\n")
    replace_text(out, "".join(lines))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.book_questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--books", type=Path, required=True, help="folder of the three novels")
    parser.add_argument("--out", type=Path, required=True, help="a JSON lines file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    write_questions(options.books, options.out)


if __name__ == "__main__":
    raise SystemExit(errors_as_lines(main))
