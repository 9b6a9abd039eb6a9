"""Tests the tables of results and of studies, and progress bars, on terminals of several widths."""

import io
import json

import pytest
from rich.console import Console
from test_commands import ROOT

from uiollms.cli.common import step_text
from uiollms.cli.progress import ProgressBar
from uiollms.evaluation.results import Comparison, ScoredTask, TaskSummary
from uiollms.evaluation.statistics import Estimate
from uiollms.reports.tables import HEADINGS, MOST_STACKED, NAMES, print_results, rows_of
from uiollms.study.tables import print_rows

WIDTHS = (80, 120, 200)


def text_task(documents: int = 24, recovered: float = 0.62, raw_nll: float = 2.0) -> TaskSummary:
    """A perplexity task of all modes, with the widest numbers that tables usually have."""
    nlls = dict(window=2.9, shuffled=2.85, recent=2.6, memory=2.4, raw=raw_nll)
    modes = {
        mode: dict(
            documents=documents,
            nll=nll,
            perplexity=10 * nll,
            interval_95=[9 * nll, 11 * nll],
            document_mean=11 * nll,
            document_mean_interval_95=[10 * nll, 12 * nll],
        )
        for mode, nll in nlls.items()
    }
    task = ScoredTask("stdlib.test", "perplexity", 1536, 256, "later", 32, "Python 3.11.2")
    comparison = Comparison(
        Estimate(0.45, (0.4, 0.5)),
        Estimate(0.5, (0.45, 0.55)),
        Estimate(-0.2, (-0.25, -0.15)),
        Estimate(recovered, (recovered - 0.1, recovered + 0.1)),
    )
    return TaskSummary(task, {}, modes, comparison)


def copy_task() -> TaskSummary:
    numbers = dict(documents=4, bleu4=31.4, nll=0.5, rouge_l=0.81, rouge_l_interval_95=[0.7, 0.9])
    modes = dict(shuffled=numbers | dict(token_accuracy=0.05), memory=numbers)
    modes["memory"] = numbers | dict(token_accuracy=0.938)
    return TaskSummary(ScoredTask("stdlib.test", "auto encoding", 64, 64, None, 16), {}, modes)


def retrieval_task() -> TaskSummary:
    depths = [dict(depth=depth / 10, accuracy=0.5) for depth in range(11)]
    numbers = dict(
        documents=22, accuracy=0.5, accuracy_interval_95=[0.3, 0.7], nll=1.2, by_depth=depths
    )
    task = ScoredTask("sotu.test", "passkey", 4096, 256, None, 32)
    return TaskSummary(task, {}, dict(window=numbers, memory=numbers, raw=numbers))


def printed(results: list[TaskSummary], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    print_results(results, console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_fit_the_terminal(width):
    lines = printed([text_task(), copy_task(), retrieval_task()], width)
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).replace("\u2502", " ").split())
    for number in ("29.00", "26.10 .. 31.90", "93.8%", "0.500", "0.810", "0.450", "0.200"):
        assert number in words, number
    assert "\u2026" not in words  # rich's sign for text that was cut off


@pytest.mark.parametrize("width", WIDTHS)
def test_narrow_terminals_have_a_table_for_every_task(width):
    lines = printed([text_task(), copy_task()], width)
    title = "perplexity (later) of stdlib.test (Python 3.11.2)"
    stacked = title in lines and "auto encoding of stdlib.test" in lines
    assert stacked == (width <= MOST_STACKED)
    assert sum("95 % interval" in line for line in lines) == 1  # BLEU-4 has no interval
    if stacked:
        start = lines.index(title)
        assert (
            "up to 1,536 tokens of a document, chunks of 256 tokens in 32 slots" in lines[start + 1]
        )
        first_words = [line.split()[:1] for line in lines[start + 3 : start + 14]]
        assert [name.split()[0] for name in NAMES.values() if [name.split()[0]] in first_words]


@pytest.mark.parametrize("width", WIDTHS)
def test_percentages_have_columns_of_their_own(width):
    for summary in (text_task(), copy_task(), retrieval_task()):
        for row in rows_of(summary):
            assert "%" not in row.result + row.interval + row.also
    (row,) = [row for row in rows_of(text_task()) if row.recovered]
    assert row.mode == NAMES["memory"] and row.recovered == "62% (52% .. 72%)"
    assert [row.tokens_right for row in rows_of(copy_task())] == ["5.0%", "93.8%"]
    assert rows_of(retrieval_task())[0].by_depth.startswith("0: 50%, 0.1: 50%")
    words = " ".join(" ".join(printed([retrieval_task()], width)).split())
    assert ("right by depth 0 0.1 0.2 0.3" in words) == (width <= MOST_STACKED)
    lines = printed([text_task()], width)
    (heading,) = [line for line in lines if "recovered" in line]
    (line,) = [line for line in lines if "62% (52%" in line]
    assert line.index("62%") == heading.index("recovered")


def test_one_document_has_no_interval():
    rows = rows_of(text_task(documents=1))
    cells = " ".join(cell for row in rows for cell in row)
    assert ".." not in cells and "document mean" not in cells
    assert " 24.00 " in cells and "bound 0.450 nats" in cells and "62%" in cells
    assert HEADINGS.interval not in " ".join(printed([text_task(documents=1)], 200))
    # Two documents of which only one has a partner for the shuffled memory.
    summary = text_task(documents=2)
    summary.modes["shuffled"]["documents"] = 1
    cells = " ".join(cell for row in rows_of(summary) for cell in row)
    assert "bound 0.450 nats, 0.500 (0.450 .. 0.550) below window" in cells


def test_a_recovered_part_below_zero_is_described():
    def recovered(**changed: float) -> str:
        (cell,) = [row.recovered for row in rows_of(text_task(**changed)) if row.recovered]
        return cell

    assert recovered(recovered=-0.35) == "nothing: worse than no memory"
    assert recovered(recovered=0.05) == "5% (below 0 .. 15%)"
    # A raw context that does not help makes the fraction of two losses positive.
    nothing = "nothing to recover: raw context does not help"
    assert recovered(recovered=0.62, raw_nll=3.5) == nothing


def test_a_distance_below_zero_is_described():
    (row,) = [row for row in rows_of(text_task()) if row.mode == NAMES["memory"]]
    assert "0.200 (0.150 .. 0.250) above recent" in row.also


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("study", ["study-table4", "study-cost", "study-recall-4"])
def test_tables_of_studies_fit_the_terminal(width, study):
    rows = json.loads((ROOT / "docs/results" / study / "results.json").read_text())["rows"]
    console = Console(width=width, file=io.StringIO())
    print_rows(rows, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "\u2026" not in console.file.getvalue()
    blocks = [line for line in lines if "estimator" in line]
    assert len(blocks) == 1 if width == 200 else len(blocks) >= 1
    # Every cell is on the line of its row, whole.
    exact = " ".join(line for line in lines if " exact " in f" {line} ")
    row = next(row for row in rows if row["estimator"] == "exact")
    for value in row.values():
        assert (
            f"{value:.3g}" if isinstance(value, float) else str(value)
        ) in exact or value == row["S"]


@pytest.mark.parametrize("width", WIDTHS)
def test_progress_bars_are_readable(width):
    words = step_text(3.123, 1e-5, 12345, 1.0)
    hours = dict(total=4000, elapsed=36610.0, prefix="train", unit=" documents", rate=0.11)
    for settings in (hours, hours | dict(elapsed=10.0), hours | dict(total=None)):
        text = ProgressBar.format_meter(120, ncols=width, postfix=words, **settings)
        assert len(text) <= width and words in text, text
        assert text.startswith("train: ") and (settings["total"] is None or "3%" in text)
    assert ("documents" in text) == (width > 80)


def test_a_progress_bar_follows_the_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 20))
    with ProgressBar(range(10), desc="evaluate", file=stream) as bar:
        bar.set_postfix_str(step_text(3.123, 1e-5, 12345, 1.0))
        assert bar.dynamic_ncols
    lines = stream.getvalue().strip().split("\r")
    assert len(lines) > 1 and all(len(line) <= 80 for line in lines)
    assert lines[-1].rstrip().endswith("12,345 tokens/s]")
