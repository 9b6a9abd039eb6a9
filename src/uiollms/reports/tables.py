"""Tables of an evaluation, and the words that describe its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, JustifyMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from uiollms.evaluation.results import ScoredTask, TaskSummary

NAMES = {
    "window": "no memory (window only)",
    "shuffled": "memory of another document",
    "recent": "recent raw tokens, as many as slots",
    "streaming": "first and recent raw tokens, as many as slots",
    "bm25": "passages found by BM25, as many tokens as slots",
    "pooled": "averaged keys and values, as many as slots",
    "memory": "with memory",
    "raw": "raw context",
    "snapkv": "SnapKV, as many slots",
    "knorm": "key norms, as many slots",
    "expected_attention": "expected attention, as many slots",
    "kvzip": "KVzip, as many slots",
}


def names_of(modes: Iterable[str]) -> dict[str, str]:
    """The names of these modes, in the order of NAMES; presses that a config names come last."""
    found = set(modes)
    ordered = [*(m for m in NAMES if m in found), *sorted(found - NAMES.keys())]
    return {mode: NAMES.get(mode, mode) for mode in ordered}


MOST_STACKED = 120  # columns of a terminal, up to which every task has a table of its own


class Row(NamedTuple):
    """One mode of a task as table cells. A cell is "" where a task has no such number.

    documents:    how many were scored
    result:       the task's main number, whose name is in `ScoredTask.main_number`
    interval:     the 95 % interval of `result`; one document has none
    slots, memory, compressed, a_token: the fields of `Cost`, if the task measures them
    tokens_right: of copies, in percent
    by_depth:     right answers by the depth of the hidden sentence, in percent
    recovered:    `Comparison.recovered` in percent, and in words below zero
    also:         further numbers in words
    """

    mode: str
    documents: str
    result: str
    interval: str
    slots: str
    memory: str
    compressed: str
    a_token: str
    tokens_right: str
    by_depth: str
    recovered: str
    also: str


HEADINGS = Row(
    "mode",
    "documents",
    "result",
    "95 % interval",
    "slots",
    "peak memory",
    "compressed in",
    "a token",
    "tokens right",
    "right by depth",
    "recovered",
    "also",
)
WRAPPED = ("mode", "right by depth", "recovered", "also")
COSTS = ("slots", "peak memory", "compressed in", "a token")
RIGHT_ALIGNED = ("documents", "tokens", "result", "tokens right", *COSTS)


def print_results(results: Sequence[TaskSummary], console: Console | None = None) -> None:
    """Prints the numbers of all tasks, and the chunks of copy tasks. On a console of more than
    `MOST_STACKED` columns it prints one table with a row per mode; on a narrower one, a table of
    its modes under the title of every task."""
    console = console or Console()
    if console.width > MOST_STACKED:
        console.print(wide_table(results))
    else:
        for result in results:
            print_stacked(result, console)
    print_written(results, console)


def wide_table(results: Sequence[TaskSummary]) -> Table:
    """One table of all tasks. Columns without any cell are left out."""
    found = [(result, rows_of(result)) for result in results]
    filled = filled_columns([row for _, rows in found for row in rows])
    table = Table(title="evaluation", title_justify="left")
    for column in ("task", "tokens", "chunk", *(HEADINGS[i] for i in filled)):
        justify: JustifyMethod = "right" if column in RIGHT_ALIGNED else "left"
        table.add_column(column, justify=justify, no_wrap=column not in ("task", *WRAPPED))
    for result, rows in found:
        for i, row in enumerate(rows):
            title = result.task.title if i == 0 else ""
            tokens = str(result.task.truncation or "all")
            named = row._replace(result=f"{result.task.main_number[2]} {row.result}")
            table.add_row(title, tokens, result.task.size, *(named[c] for c in filled))
        table.add_section()
    return table


def print_stacked(result: TaskSummary, console: Console) -> None:
    """Prints a task's title and sizes, a table with a row per mode, and below it the costs and the
    words about every mode."""
    rows = rows_of(result)
    console.print(f"\n{result.task.title}", style="bold", markup=False, highlight=False)
    console.print(f"  {sizes_of(result.task)}", markup=False, highlight=False)
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    below = (HEADINGS.by_depth, HEADINGS.also, *COSTS)
    filled = [i for i in filled_columns(rows) if HEADINGS[i] not in below]
    headings = HEADINGS._replace(result=result.task.main_number[2])
    for i in filled:
        justify: JustifyMethod = "right" if HEADINGS[i] in RIGHT_ALIGNED else "left"
        table.add_column(headings[i], justify=justify, no_wrap=HEADINGS[i] not in WRAPPED)
    for row in rows:
        table.add_row(*(row[i] for i in filled))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    if any(row.by_depth for row in rows):
        console.print(Padding(depth_table(result), (1, 0, 0, 2), expand=False))
    if any(row.slots for row in rows):
        console.print(Padding(cost_table(rows), (1, 0, 0, 2), expand=False))
    for row in rows:
        if row.also:
            line = Text(f"{row.mode}: {row.also}")
            console.print(Padding(line, (0, 0, 0, 2), expand=False), highlight=False)


def cost_table(rows: Sequence[Row]) -> Table:
    """The costs of the modes that have them."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(HEADINGS.mode)
    for heading in COSTS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.slots:
            table.add_row(row.mode, row.slots, row.memory, row.compressed, row.a_token)
    return table


def depth_table(result: TaskSummary) -> Table:
    """The percentages of right answers, one row per mode and one column per depth."""
    found = {
        name: {d["depth"]: f"{d['accuracy']:.0%}" for d in result.modes[mode]["by_depth"]}
        for mode, name in names_of(result.modes).items()
    }
    depths = sorted({depth for mode in found.values() for depth in mode})
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(HEADINGS.by_depth)
    for depth in depths:
        table.add_column(f"{depth:g}", justify="right", no_wrap=True)
    for mode, answers in found.items():
        table.add_row(mode, *(answers.get(depth, "") for depth in depths))
    return table


def filled_columns(rows: Sequence[Row]) -> list[int]:
    """The indices of the columns that have a cell in any row."""
    return [i for i in range(len(HEADINGS)) if any(row[i] for row in rows)]


def sizes_of(task: ScoredTask) -> str:
    """Such as "up to 768 tokens of a document, chunks of 64 tokens in 16 slots"."""
    tokens = f"up to {task.truncation:,} tokens" if task.truncation else "all tokens"
    slots = f" in {task.num_memory} slots" if task.num_memory else ""
    return f"{tokens} of a document, chunks of {task.chunk_size:,} tokens{slots}"


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


def rows_of(result: TaskSummary) -> list[Row]:
    """The cells of a task, one row per mode."""
    key, interval, _ = result.task.main_number
    rows = []
    for mode, name in names_of(result.modes).items():
        numbers = result.modes[mode]
        value = perplexity_words(numbers) if key == "perplexity" else short(numbers[key])
        rows.append(
            Row(
                mode=name,
                documents=str(numbers["documents"]),
                result=value,
                interval=ends(interval_of(numbers, interval)),
                **cost_cells(numbers.get("cost")),
                tokens_right=(
                    f"{numbers['token_accuracy']:.1%}" if result.task.kind == "copy" else ""
                ),
                by_depth=", ".join(
                    f"{d['depth']:g}: {d['accuracy']:.0%}" for d in numbers.get("by_depth", [])
                ),
                recovered=recovered_words(result) if mode == "memory" else "",
                also=other_numbers(result, mode),
            )
        )
    for mode, name in names_of(result.failures).items():
        empty = Row(*[""] * len(HEADINGS))
        why = f"not scored: {result.failures[mode]}"
        rows.append(empty._replace(mode=name, result="-", also=why))
    return rows


def cost_cells(cost: Mapping[str, Any] | None) -> dict[str, str]:
    """The cells of a mode's cost, which are empty where it was not measured. Of a press that only
    masks the memory is "-"."""
    if cost is None:
        return dict.fromkeys(("slots", "memory", "compressed", "a_token"), "")
    peak = cost["peak_bytes"]
    return dict(
        slots=f"{cost['slots']:,.0f}",
        memory="-" if peak is None else f"{peak / 2**20:,.0f} MiB",
        compressed=f"{cost['compress_seconds']:.2f} s",
        a_token=f"{1000 * cost['token_seconds']:.1f} ms",
    )


def perplexity_words(numbers: Mapping[str, Any]) -> str:
    """The perplexity, written as exp(NLL) past the end of float64. "-" stands for a missing
    NLL."""
    value = numbers["perplexity"]
    if value is None and numbers.get("nll") is None:
        return "-"
    return f"exp({short(numbers['nll'])})" if value is None or value == math.inf else short(value)


def short(value: float | None) -> str:
    """Three decimals below 10, else two. "-" stands for a missing or infinite number."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def interval_of(numbers: Mapping[str, Any], name: str) -> Sequence[float | None] | None:
    """The interval `name` of a mode. Intervals come from resampled documents, so one document has
    none."""
    return numbers.get(name) if numbers["documents"] > 1 else None


def ends(interval: Sequence[float | None] | None) -> str:
    return f"{short(interval[0])} .. {short(interval[1])}" if interval else ""


def between(interval: Sequence[float | None] | None) -> str:
    return f" ({ends(interval)})" if interval else ""


def other_numbers(result: TaskSummary, mode: str) -> str:
    """The last cell of a row: numbers of a mode that have no column, in words."""
    task, numbers = result.task, result.modes[mode]
    parts = []
    if task.task_type == "perplexity" and numbers["documents"] > 1:
        parts.append(
            "document mean "
            f"{short(numbers['document_mean'])}{between(numbers['document_mean_interval_95'])}"
        )
    if "rouge_l" in numbers:
        parts.append(f"ROUGE-L {numbers['rouge_l']:.3f}")
    if numbers.get("answer_score") is not None:
        interval = numbers["answer_score_interval_95"]
        parts.append(f"{numbers['answer_metric']} {numbers['answer_score']:.3f}{between(interval)}")
    for name, shown in (("exact_match", "exact match"), ("token_f1", "F1")):
        if numbers.get(name) is not None:
            parts.append(f"{shown} {numbers[name]:.3f}{between(numbers[f'{name}_interval_95'])}")
    if task.task_type == "language modeling":
        parts.append(f"perplexity {perplexity_words(numbers)}")
    if task.kind != "text":
        parts.append("NLL " + ("-" if numbers["nll"] is None else f"{numbers['nll']:.3f}"))
    if mode == "memory":
        parts += comparison_words(result)
    return ", ".join(parts)


def comparison_words(result: TaskSummary) -> list[str]:
    """Memory compared with its controls, in words. evaluation/statistics.py defines the numbers."""
    comparison, words = result.comparison, []
    if comparison.bound:
        value, interval = comparison.bound
        shown = interval if shares_several(result, "shuffled") else None
        words.append(f"bound {value:.3f}{between(shown)} nats")
        if interval[0] <= 0:
            words.append("another document's memory may serve as well")
    for name, below in (
        ("window", comparison.below_window),
        ("recent", comparison.below_recent),
    ):
        if below:
            value, (low, high) = below
            side, distances = ("below", (low, high)) if value >= 0 else ("above", (-high, -low))
            shown = distances if shares_several(result, name) else None
            words.append(f"{abs(value):.3f}{between(shown)} {side} {name}")
    return words


def shares_several(result: TaskSummary, *modes: str) -> bool:
    """Whether a comparison of memory with these modes uses more than one document. Only then does
    it have an interval."""
    return min(result.modes[mode]["documents"] for mode in ("memory", *modes)) > 1


def recovered_words(result: TaskSummary) -> str:
    """The part of the raw context's gain that memory gains too, in percent. A negative part is
    described, because a percentage below zero reads like a small loss, and so is a raw context
    that gains nothing."""
    if not result.comparison.recovered:
        return ""
    value, interval = result.comparison.recovered
    if not raw_helps(result):
        return "nothing to recover: raw context does not help"
    if value < 0:
        return "nothing: worse than no memory"
    low, high = (f"{end:.0%}" if end >= 0 else "below 0" for end in interval)
    several = shares_several(result, "window", "raw")
    return f"{value:.0%}" + (f" ({low} .. {high})" if several else "")


def raw_helps(result: TaskSummary) -> bool:
    """Whether the NLL with raw context is below that without memory. True if either is missing."""
    window, raw = (result.modes[mode]["nll"] for mode in ("window", "raw"))
    return window is None or raw is None or raw < window
