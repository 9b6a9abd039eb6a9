"""Writes a corpus with answers of the base, which reads each document raw, for training memory.

uiollms answers "files:questions/*.jsonl" -o answered.jsonl
uiollms answers questions.train -o answered.jsonl --num_documents 60 --num_examples 1 --resume

The corpus "files:answered.jsonl" of a config reads the result: one conversation, or one pair of
input and output, in a line. Answers that the corpus contains are replaced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from uiollms.build import load_memory_lm
from uiollms.cli.chat import model_options, open_model
from uiollms.cli.common import Output, output_arguments
from uiollms.cli.options import file_path, whole_number
from uiollms.config.load import load_env_config
from uiollms.data import ChatDocument, Document, open_corpus
from uiollms.data.readers.json_lines import MOST_TEXT
from uiollms.files.atomic import replace_text
from uiollms.files.errors import ConfigError
from uiollms.files.reading import read_text
from uiollms.training.teacher_answers import Teacher

SAVE_EVERY = 10  # documents


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    if args.output.suffix != ".jsonl":
        raise ConfigError(f"--output {args.output}: the file name must end in .jsonl")
    if args.output.exists() and not args.resume:
        raise ConfigError(f"--output {args.output}: exists; remove it, or use --resume")
    lines = read_lines(args.output) if args.resume and args.output.exists() else []
    if args.model:
        model, tokenizer = open_model(args, output)
    else:  # the memory is not used, so the config needs no trained weights
        model, tokenizer = load_memory_lm(load_env_config(args.env_conf), args.env_conf)
    corpus = open_corpus(args.corpus, tokenizer)
    teacher = Teacher(model.base, tokenizer, args.max_new_tokens)
    first = json.loads(lines[-1])["document"] if lines else 0
    last = min(len(corpus), args.num_documents or len(corpus))
    for i in output.bar(range(first, last), unit="document"):
        document = teacher.answer_document(corpus[i], args.num_examples)
        if not document.is_empty:
            lines.append(as_line(i + 1, document))
        if (i + 1) % SAVE_EVERY == 0 or i + 1 == last:
            replace_text(args.output, "".join(lines))
    output.print_text(f"{args.output}: {len(lines)} of {last} documents have answers")
    output.print_json(output=str(args.output), documents=last, answered=len(lines))


def as_line(number: int, document: Document) -> str:
    """Returns the JSON line of an answered document. number: of the document in the corpus, from 1,
    which resuming needs."""
    fields: dict[str, Any] = {"document": number, "source": document.source}
    if isinstance(document, ChatDocument):
        fields["messages"] = list(document.messages)
    else:
        fields |= {"input": document.text, "output": document.response}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> list[str]:
    """Returns the lines that an earlier call wrote. Raises ConfigError for another file."""
    # Not splitlines, which also splits at line separators inside of a text.
    lines = [f"{line}\n" for line in read_text(path, MOST_TEXT).split("\n") if line]
    try:
        for line in lines:
            int(json.loads(line)["document"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: not written by `uiollms answers`; choose another --output"
        ) from None
    return lines


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uiollms answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("corpus", metavar="CORPUS", help="name of a corpus of questions, as in a config")
    add("-o", "--output", required=True, type=file_path, metavar="NAME.jsonl", help="the result")
    model_options(parser)
    add(
        "--num_documents",
        type=whole_number(),
        metavar="N",
        help="how many documents are read, from the first (all)",
    )
    add(
        "--num_examples",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="answers of a conversation that stay and show how to answer (0)",
    )
    add(
        "--max_new_tokens",
        type=whole_number(),
        default=64,
        metavar="N",
        help="most tokens of an answer (64)",
    )
    add("--resume", action="store_true", help="continue a result that is not complete")
    output_arguments(parser, "the numbers of documents", "print no text and no progress bar")
    return parser
