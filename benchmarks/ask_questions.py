"""Asks questions about documents as `uiollms ask` does, and the base with and without the text.

    python -m benchmarks.ask_questions --facts 20 --out asked
    python -m benchmarks.ask_questions --facts 20 --books novels --out asked

A question is the first of a chat, so `uiollms chat` gives the same answer. It is asked after the
memory of its document and after that of another document, and of the base: after as many of the
document's last tokens as memory has slots, after the whole document, and without any text. The
document of a fact is 1,024 tokens of held-out Python sources that contain four held-out facts
(`src/uiollms/data/corpora/facts.py`); the passages of books are those of
`benchmarks.book_questions`. Answers are greedy. An answer is right if it contains the reference.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.book_questions import QUESTIONS, passage_of
from benchmarks.measure import machine
from uiollms.cli.chat import first_turn, model_options, open_model
from uiollms.cli.common import Output, errors_as_lines, output_arguments
from uiollms.cli.options import whole_number
from uiollms.data.corpora.facts import FORMS, VALUES, fact_pairs, filler_text, make_fact
from uiollms.data.corpora.local import stdlib
from uiollms.data.tokens import tokenize
from uiollms.evaluation.answer_metrics import contains, token_f1
from uiollms.evaluation.statistics import bootstrap, mean
from uiollms.files.atomic import make_folder, replace_text
from uiollms.files.json_files import as_json
from uiollms.model.memory_lm import MemoryLM
from uiollms.training.teacher_answers import Teacher

FACT_TOKENS, FACTS = 1024, 4  # of a document
Bar = Callable[[Iterable[Any]], Iterable[Any]]


class Asked(NamedTuple):
    """kind: "facts" or "books" """

    kind: str
    text: str
    question: str
    answer: str


def fact_questions(tokenizer: Any, count: int) -> list[Asked]:
    """Documents with facts that the corpora for training leave out, and a question for one of
    them."""
    sources = stdlib("test", None)
    pairs = fact_pairs(held_out=True)
    asked = []
    for number in range(count):
        rng = random.Random(f"ask {number}")
        drawn = [(thing, person, rng.choice(VALUES)) for thing, person in rng.sample(pairs, FACTS)]
        facts = [
            make_fact(rng.choice(FORMS), value, thing=thing, person=person).statement
            for thing, person, value in drawn
        ]
        size = FACT_TOKENS - sum(len(tokenize(tokenizer, fact)) for fact in facts)
        filler = tokenize(tokenizer, filler_text(sources, rng))[:size]
        lines = tokenizer.decode(filler, skip_special_tokens=True).splitlines()
        for fact in facts:
            lines.insert(rng.randint(0, len(lines)), fact.strip())
        thing, person, value = drawn[0]
        question = f"What is {person}'s {thing}?"
        asked.append(Asked("facts", "\n".join(lines), question, value))
    return asked


def book_questions(books: Path) -> list[Asked]:
    return [Asked("books", passage_of(books, q), q.question, q.answer) for q in QUESTIONS]


def last_tokens(model: MemoryLM, tokenizer: Any, text: str) -> str:
    """The end of a text: as many tokens as its memory has slots and raw tokens."""
    ids = tokenize(tokenizer, text)
    memory = model.compress(ids)
    kept = ids[len(ids) - memory.num_slots - len(memory.open_ids) :]
    return tokenizer.decode(kept, skip_special_tokens=True)


@torch.no_grad()
def answer_all(
    model: MemoryLM, tokenizer: Any, asked: Sequence[Asked], max_new_tokens: int, bar: Bar = iter
) -> list[dict[str, Any]]:
    """Returns every question with the answers of all modes. Each kind of question needs two
    documents. bar: shows the progress"""
    base = Teacher(model.base, tokenizer, max_new_tokens)

    def ask_memory(text: str, question: str) -> str:
        state = model.compress(tokenize(tokenizer, text)).state(model)
        ids = first_turn(tokenizer, question, state)
        options = dict(max_new_tokens=max_new_tokens, do_sample=False)
        new = model.generate(ids, state=state, **options)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True).strip()

    def ask_base(text: str, question: str) -> str:
        content = f"{text}\n\n{question}".strip()
        return base.reply([{"role": "user", "content": content}], question)

    rows = []
    for number, (kind, text, question, answer) in enumerate(bar(asked)):
        others = [other.text for other in asked if other.kind == kind and other.text != text]
        answers = {
            "memory": ask_memory(text, question),
            "another's memory": ask_memory(others[number % len(others)], question),
            "recent": ask_base(last_tokens(model, tokenizer, text), question),
            "raw": ask_base(text, question),
            "none": ask_base("", question),
        }
        rows.append(dict(kind=kind, question=question, answer=answer, answers=answers, text=text))
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fraction of right answers, and the token F1, for each kind and mode."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        for mode in of_kind[0]["answers"]:
            numbers: dict[str, Any] = {"kind": kind, "mode": mode, "questions": len(of_kind)}
            for name, metric in (("right", contains), ("token_f1", token_f1)):
                scores = [metric(row["answers"][mode], [row["answer"]]) for row in of_kind]
                numbers |= {name: mean(scores), f"{name}_interval_95": bootstrap(scores, mean)}
            found.append(numbers)
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ask_questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    model_options(parser)
    add("--facts", type=whole_number(2), default=20, metavar="N", help="questions for facts (20)")
    add("--books", type=Path, metavar="FOLDER", help="folder of the three novels, for 20 more")
    add("--max_new_tokens", type=whole_number(), default=32, metavar="N", help="of an answer (32)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where results.json is written")
    output_arguments(parser, "the summary", "print no text and no progress bar")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    passages = book_questions(args.books) if args.books else []
    make_folder(args.out)
    model, tokenizer = open_model(args, output)
    asked = fact_questions(tokenizer, args.facts) + passages
    rows = answer_all(model, tokenizer, asked, args.max_new_tokens, output.bar)
    summary = summarize(rows)
    settings = dict(model=args.model, env_conf=args.env_conf, max_new_tokens=args.max_new_tokens)
    result = dict(settings=settings, machine=machine(), summary=summary, rows=rows)
    replace_text(args.out / "results.json", as_json(result, indent=1) + "\n")
    for numbers in summary:
        low, high = numbers["right_interval_95"]
        output.print_text(
            f"{numbers['kind']}, {numbers['mode']}: {numbers['right']:.2f} right "
            f"({low:.2f} .. {high:.2f}), F1 {numbers['token_f1']:.2f}"
        )
    output.print_json(summary=summary)


if __name__ == "__main__":
    raise SystemExit(errors_as_lines(main))
