"""Tests what plots show: points inside the axes, units, titles, and panels that fit a page."""

import dataclasses
import json
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure
from test_commands import ROOT
from test_tables import copy_task, retrieval_task, text_task

from uiollms.evaluation.results import ScoredTask, TaskSummary
from uiollms.reports.curves import plot_training
from uiollms.reports.plots import drawable, plot_results


@contextmanager
def drawn(monkeypatch):
    """The figures that are saved within the context."""
    figures: list[Figure] = []
    save = Figure.savefig
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k))
        yield figures


def panels_of(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.axison]


def most_columns(figure: Figure) -> int:
    return max(axes.get_gridspec().ncols for axes in figure.axes)


def evaluation(iteration: int, **changed) -> dict:
    summary = text_task().as_json() | changed
    return dict(iteration=iteration, eval=[summary])


@pytest.mark.parametrize("evaluated", [[120], [40, 80, 120], [0, 120]])
@pytest.mark.parametrize("loss", ["later", "document"])
def test_all_held_out_points_are_inside_the_axes(tmp_path, monkeypatch, evaluated, loss):
    steps = [dict(iteration=i, nll=1 + 8 / i) for i in range(4, 121, 4)]
    lines = [*steps, *map(evaluation, evaluated)]
    with drawn(monkeypatch) as figures:
        plot_training(lines, tmp_path / "curve.png", loss=loss)
    (figure,) = figures
    assert len(panels_of(figure)) == 2 + (loss == "document")
    points = 0
    for axes in panels_of(figure):
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for line in axes.lines:
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
                if line.get_label().startswith("held out"):
                    points += 1
                    # Half a marker is 3 of the 460 points of the axis's width.
                    assert left + 3 / 460 * (right - left) < x < right - 3 / 460 * (right - left)
                    assert low < y < high
        assert axes.get_xlabel() == "training documents" and "nats" in axes.get_ylabel()
        box = axes.get_legend().get_window_extent()
        assert not box.overlaps(axes.get_window_extent()), "the legend covers the panel"
    assert points == 5 * len(evaluated)  # as many modes as `evaluation` has
    titles = [axes.get_title() for axes in panels_of(figure)]
    assert "Held-out loss: perplexity of stdlib.test" in titles[loss == "document"]


def test_names_of_long_paths_fit_into_the_figures(tmp_path, monkeypatch):
    path = "files:/scratch/of/a/user/with many folders/" + "texts_of_a_corpus/" * 4 + "*.jsonl"
    lines = [dict(iteration=i, nll=1.0) for i in (1, 2)] + [evaluation(2, task=path)]
    summary = positions(text_task())
    summary = dataclasses.replace(summary, task=dataclasses.replace(summary.task, name=path))
    with drawn(monkeypatch) as figures:
        plot_training(lines, tmp_path / "curve.png", loss="later")
        plot_results([summary], tmp_path / "test.png")
    for figure in figures:
        for axes in panels_of(figure):
            for part in (axes.title, axes.get_legend()):
                # Pixels; letters are measured at another resolution than that of the file, for
                # which the figure was laid out, and their sizes are rounded.
                box, rounding = part.get_window_extent(), 5
                assert -rounding <= box.x0 and box.x1 <= figure.bbox.width + rounding, part
                assert -rounding <= box.y0 and box.y1 <= figure.bbox.height + rounding, part


def positions(summary: TaskSummary) -> TaskSummary:
    """The summary with perplexities by position."""
    for numbers in summary.modes.values():
        numbers["by_position"] = [
            dict(start=2**i, stop=2 ** (i + 1), perplexity=numbers["perplexity"] + i)
            for i in range(11)
        ]
    return summary


def test_panels_have_titles_and_units_two_in_a_row(tmp_path, monkeypatch):
    results = [positions(text_task()), copy_task(), retrieval_task()]
    with drawn(monkeypatch) as figures:
        plot_results(results, tmp_path / "test.png")
    (figure,) = figures
    assert most_columns(figure) == 2 and len(panels_of(figure)) == 3
    for axes, result in zip(panels_of(figure), results, strict=True):
        assert axes.get_title() == result.task.title and axes.get_ylabel()
        title = axes.title.get_window_extent()
        others = [other.get_window_extent() for other in figure.axes if other is not axes]
        assert not any(title.overlaps(other) for other in others), "a title covers a panel"
        legend = axes.get_legend()
        assert not legend or not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_a_single_number_has_no_bar(tmp_path):
    numbers = dict(documents=4, loss=1.5, nll=1.5, loss_interval_95=[1.0, 2.0])
    task = ScoredTask("x", "question answering", 64, 64, None, 16)
    alone = TaskSummary(task, {}, dict(memory=numbers))
    both = TaskSummary(task, {}, dict(memory=numbers, window=numbers))
    assert drawable([alone, both]) == [both]
    path = tmp_path / "test.png"
    assert plot_results([both], path) == path and path.exists()
    assert plot_results([alone], path) is None and not path.exists()
    # One depth of a retrieval task is a single number per mode, and no curve.
    trials = retrieval_task()
    for numbers in trials.modes.values():
        numbers["by_depth"] = numbers["by_depth"][:1]
    only = TaskSummary(trials.task, {}, dict(memory=trials.modes["memory"]))
    assert drawable([trials, only]) == [trials]


def test_bars_have_the_intervals_of_their_numbers(tmp_path, monkeypatch):
    numbers = dict(documents=4, loss=1.5, nll=1.5, loss_interval_95=[1.0, 2.25])
    one = numbers | dict(documents=1)
    task = ScoredTask("x", "question answering", 64, 64, None, 16)
    with drawn(monkeypatch) as figures:
        plot_results([TaskSummary(task, {}, dict(memory=numbers, raw=one))], tmp_path / "a.png")
    (axes,) = panels_of(figures[0])
    (interval,) = [c.get_segments()[0] for c in axes.collections]
    assert interval[:, 1].tolist() == [1.0, 2.25]
    assert axes.get_ylim()[0] == 0 < 2.25 < axes.get_ylim()[1]


def test_studies_and_benchmarks_have_two_panels_in_a_row(tmp_path, monkeypatch):
    from benchmarks.plots import TITLES, draw

    from uiollms.study.learning import plot_curves
    from uiollms.study.tables import plot

    results = ROOT / "docs/results"
    rows = json.loads((results / "study-cost/results.json").read_text())["rows"]
    lines = (results / "study-recall-4/curves.jsonl").read_text().splitlines()
    curves = [json.loads(line) for line in lines[1:]]
    columns = ["seconds", "peak_mib", "encoder_backwards"]
    with drawn(monkeypatch) as figures:
        plot(rows, columns, tmp_path / "cost.png")
        plot_curves({f"distance {i}": curves for i in (1, 4, 8)}, {}, tmp_path / "learning.png")
        draw(json.loads((results / "bench/zen4-length.json").read_text()), tmp_path / "bench.png")
    for figure in figures:
        assert most_columns(figure) == 2
        for axes in panels_of(figure):
            assert axes.get_title() and axes.get_xlabel()
            (low, high) = axes.get_ylim()
            for line in axes.lines:
                assert low <= min(line.get_ydata()) and max(line.get_ydata()) <= high
    assert [len(panels_of(figure)) for figure in figures] == [3, 3, len(TITLES)]
