"""Tables of an evaluation, and the words that describe its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from uiollms.evaluation.results import Comparison, TaskSummary

NAMES = {
    "window": "no memory (window only)",
    "shuffled": "memory of another document",
    "recent": "recent raw tokens, as many as slots",
    "memory": "with memory",
    "raw": "raw context",
}

COLUMNS = ("task", "documents", "tokens", "chunk", "mode", "result (95 % interval)", "also")


def print_results(results: Sequence[TaskSummary], console: Console | None = None) -> None:
    """Prints one table of all tasks, with one row per mode, and the chunks of copy tasks."""
    table = Table(title="evaluation", title_justify="left")
    for column in COLUMNS:
        justify: JustifyMethod = "right" if column == "tokens" else "left"
        table.add_column(column, justify=justify, no_wrap=column not in ("task", "mode", "also"))
    for result in results:
        for row in rows_of(result):
            table.add_row(*row)
        table.add_section()
    console = console or Console(width=170)
    console.print(table)
    print_written(results, console)


class Chunk(NamedTuple):
    """A held-out chunk and what the model reproduces of it.

    title:   of the task
    caption: how the text was generated, and how many tokens are right
    pieces:  (text, whether its tokens are right) in order
    """

    title: str
    caption: str
    original: str
    pieces: Sequence[tuple[str, bool]]


def written_chunks(results: Sequence[TaskSummary]) -> list[Chunk]:
    """The first chunk of every copy task, reproduced from its memory and, if the task compares
    it, from the memory of another document."""
    found = []
    for result in results:
        for mode in ("memory", "shuffled"):
            if written := result.modes.get(mode, {}).get("written"):
                whose = "its own memory" if mode == "memory" else "another document's memory"
                captions = {
                    "guided": f"each token guessed from {whose} and the true ones before it",
                    "alone": f"written down from {whose} alone",
                }
                for key, caption in captions.items():
                    copy = written[key]
                    caption += f", {copy['right']} of {written['tokens']} tokens right"
                    found.append(
                        Chunk(result.task.title, caption, written["original"], copy["pieces"])
                    )
    return found


def print_written(results: Sequence[TaskSummary], console: Console) -> None:
    """Prints chunks and their copies, with the right tokens between double brackets."""
    chunks = written_chunks(results)
    for i, chunk in enumerate(chunks):
        if i == 0 or chunk.original != chunks[i - 1].original:
            console.print(
                f"\n{chunk.title}: the first chunk; below, right tokens are in \u27e6 \u27e7",
                style="bold",
                markup=False,
            )
            console.print(chunk.original, markup=False, highlight=False, soft_wrap=True)
        console.print(f"\n{chunk.caption}", style="bold")
        text = Text()
        for piece, right in chunk.pieces:
            text.append(
                f"\u27e6{piece}\u27e7" if right else piece, style="green" if right else "dim"
            )
        console.print(text, soft_wrap=True)


def rows_of(result: TaskSummary) -> list[tuple[str, ...]]:
    """The cells of a task under `COLUMNS`, one row per mode. The main number has its 95 %
    interval; the last cell contains further numbers."""
    key, interval, name = result.task.main_number
    rows: list[tuple[str, ...]] = []
    for i, mode in enumerate(mode for mode in NAMES if mode in result.modes):
        numbers = result.modes[mode]
        main = (
            f"{name} {perplexity_words(numbers)}"
            if key == "perplexity"
            else f"{name} {short(numbers[key])}"
        )
        main += between(numbers.get(interval))
        tokens = str(result.task.truncation or "all")
        title = result.task.title if i == 0 else ""
        sizes = tokens, result.task.size
        documents = str(numbers["documents"])
        rows.append((title, documents, *sizes, NAMES[mode], main, other_numbers(result, mode)))
    return rows


def perplexity_words(numbers: Mapping[str, Any]) -> str:
    """The perplexity, written as exp(NLL) past the end of float64."""
    value = numbers["perplexity"]
    return f"exp({short(numbers['nll'])})" if value is None or value == math.inf else short(value)


def short(value: float | None) -> str:
    """Three decimals below 10, else two. "-" stands for a missing or infinite number."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def between(interval: Sequence[float | None] | None) -> str:
    return f" ({short(interval[0])} .. {short(interval[1])})" if interval else ""


def other_numbers(result: TaskSummary, mode: str) -> str:
    """The last cell of a row: numbers of a mode but the main one, in words."""
    task, numbers = result.task, result.modes[mode]
    parts = []
    if task.task_type == "perplexity":
        parts.append(
            "document mean "
            f"{short(numbers['document_mean'])}{between(numbers['document_mean_interval_95'])}"
        )
    if task.kind == "retrieval":
        parts.append(
            "by depth "
            + ", ".join(f"{d['depth']:g}: {d['accuracy']:.0%}" for d in numbers["by_depth"])
        )
    if "rouge_l" in numbers:
        parts.append(f"ROUGE-L {numbers['rouge_l']:.3f}")
    if task.kind == "copy":
        parts.append(f"tokens right {numbers['token_accuracy']:.1%}")
    if task.task_type == "language modeling":
        parts.append(f"perplexity {perplexity_words(numbers)}")
    if task.kind != "text":
        parts.append("NLL " + ("-" if numbers["nll"] is None else f"{numbers['nll']:.3f}"))
    if mode == "memory":
        parts += comparison_words(result.comparison)
    return ", ".join(parts)


def comparison_words(comparison: Comparison) -> list[str]:
    """Memory compared with its controls, in words. evaluation/statistics.py defines the numbers."""
    words = []
    if comparison.bound:
        value, interval = comparison.bound
        words.append(f"bound {value:.3f}{between(interval)} nats")
        if interval[0] <= 0:
            words.append("another document's memory may serve as well")
    for name, below in (
        ("window", comparison.below_window),
        ("recent", comparison.below_recent),
    ):
        if below:
            value, interval = below
            words.append(f"{value:.3f}{between(interval)} below {name}")
    if comparison.recovered:
        value, (low, high) = comparison.recovered
        words.append(f"{value:.0%} ({low:.0%} .. {high:.0%}) recovered")
    return words
