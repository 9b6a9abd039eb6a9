"""The table of an evaluation, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from uiollms.evaluation.results import TaskResult

NAMES = {
    "window": "no memory (window only)",
    "shuffled": "memory of another document",
    "recent": "recent raw tokens, as many as slots",
    "memory": "with memory",
    "raw": "raw context",
}

COLUMNS = ("task", "documents", "tokens", "chunk", "mode", "result (95 % interval)", "also")


def print_results(results: Sequence[TaskResult], console: Console | None = None) -> None:
    """One table of all tasks, a row a mode."""
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
    """A held-out chunk beside what the model tells of it. title: of the task; said: what it is told
    from, and how much is right."""

    title: str
    said: str
    original: str
    pieces: Sequence[tuple[str, bool]]


def written_chunks(results: Sequence[TaskResult]) -> list[Chunk]:
    """Of every task of copies the first chunk, from its own memory and, where that was compared,
    from another document's."""
    found = []
    for result in results:
        for mode in ("memory", "shuffled"):
            if written := result.modes.get(mode, {}).get("written"):
                whose = "its own memory" if mode == "memory" else "another document's memory"
                how = {
                    "guided": f"each token guessed from {whose} and the true ones before it",
                    "alone": f"written down from {whose} alone",
                }
                for key, said in how.items():
                    copy = written[key]
                    said += f", {copy['right']} of {written['tokens']} tokens right"
                    found.append(Chunk(result.title, said, written["original"], copy["pieces"]))
    return found


def print_written(results: Sequence[TaskResult], console: Console) -> None:
    """The chunk and its copies, in which what is right stands between brackets."""
    chunks = written_chunks(results)
    for i, chunk in enumerate(chunks):
        if i == 0 or chunk.original != chunks[i - 1].original:
            console.print(
                f"\n{chunk.title}: the first chunk; below, \u27e6 \u27e7 hold what is right",
                style="bold",
                markup=False,
            )
            console.print(chunk.original, markup=False, highlight=False, soft_wrap=True)
        console.print(f"\n{chunk.said}", style="bold")
        text = Text()
        for piece, right in chunk.pieces:
            text.append(
                f"\u27e6{piece}\u27e7" if right else piece, style="green" if right else "dim"
            )
        console.print(text, soft_wrap=True)


def rows_of(result: TaskResult) -> list[tuple[str, ...]]:
    """A task's cells under `COLUMNS`, a row a mode: its main number with its 95 % interval, and
    what else says something."""
    key, interval, name = result.main
    rows: list[tuple[str, ...]] = []
    for i, mode in enumerate(mode for mode in NAMES if mode in result.modes):
        numbers = result.modes[mode]
        main = (
            f"{name} {perplexity_words(numbers)}"
            if key == "perplexity"
            else f"{name} {short(numbers[key])}"
        )
        main += between(numbers.get(interval))
        tokens = str(result.truncation or "all")
        title = result.title if i == 0 else ""
        sizes = tokens, result.size
        documents = str(numbers["documents"])
        rows.append((title, documents, *sizes, NAMES[mode], main, also(result, mode)))
    return rows


def perplexity_words(numbers: dict[str, Any]) -> str:
    """Past what a float holds, as the exp of the NLL."""
    value = numbers["perplexity"]
    return f"exp({short(numbers['nll'])})" if value is None or value == math.inf else short(value)


def short(value: float | None) -> str:
    """Two decimals, three for what is below 10; "-" for what is no number, or was none when it
    was written."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def between(interval: Sequence[float | None] | None) -> str:
    return f" ({short(interval[0])} .. {short(interval[1])})" if interval else ""


def also(result: TaskResult, mode: str) -> str:
    """The second column of numbers, in words."""
    numbers = result.modes[mode]
    parts = []
    if result.task_type == "perplexity":
        parts.append(
            "document mean "
            f"{short(numbers['document_mean'])}{between(numbers['document_mean_interval_95'])}"
        )
    if result.kind == "retrieval":
        parts.append(
            "by depth "
            + ", ".join(f"{d['depth']:g}: {d['accuracy']:.0%}" for d in numbers["by_depth"])
        )
    if "rouge_l" in numbers:
        parts.append(f"ROUGE-L {numbers['rouge_l']:.3f}")
    if result.kind == "copy":
        parts.append(f"tokens right {numbers['token_accuracy']:.1%}")
    if result.task_type == "language modeling":
        parts.append(f"perplexity {perplexity_words(numbers)}")
    if result.kind != "text":
        parts.append("NLL " + ("-" if numbers["nll"] is None else f"{numbers['nll']:.3f}"))
    if mode == "memory":
        parts += worth(result)
    return ", ".join(parts)


def worth(result: TaskResult) -> list[str]:
    """What memory is worth against its controls, in words: see controls.py."""
    found = []
    if result.bound:
        value, interval = result.bound
        found.append(f"bound {value:.3f}{between(interval)} nats")
        if interval[0] <= 0:
            found.append("another document's memory may serve as well")
    for name, found_by in (("window", result.below_window), ("recent", result.below_recent)):
        if found_by:
            value, interval = found_by
            found.append(f"{value:.3f}{between(interval)} below {name}")
    if result.recovered:
        value, (low, high) = result.recovered
        found.append(f"{value:.0%} ({low:.0%} .. {high:.0%}) recovered")
    return found
