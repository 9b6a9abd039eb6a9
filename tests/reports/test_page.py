"""Tests what the HTML report says first, its markup, and how a browser lays it out."""

import json
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import BROWSER, BROWSERS
from test_plots import positions
from test_tables import copy_task, retrieval_task, text_task

from uiollms.evaluation.results import TaskSummary
from uiollms.reports.conclusions import conclusions
from uiollms.reports.page import write_report
from uiollms.reports.run_folder import RunFolder

VOID = {"meta", "link", "img", "br", "hr", "input"}


def run_of(*results: TaskSummary, steps: int = 40) -> RunFolder:
    metrics = [
        dict(iteration=4 * i, nll=2 + 2 / i, lr=1e-3, seconds=i) for i in range(1, steps + 1)
    ]
    return RunFolder(Path("run"), metrics=metrics, results=list(results), evaluated="test.py")


def test_three_sentences_tell_that_memory_helps():
    training, memory, own = conclusions(run_of(text_task()))
    assert training.startswith("Training took 160 steps") and "fell from 3.04" in training
    assert "24 documents of stdlib.test" in memory and "with memory is 24.00" in memory
    assert memory.endswith("without it 29.00: memory helps.")
    assert "costs 0.450 (0.400 .. 0.500) nats per token more" in own
    assert own.endswith("memory recovers 62% (52% .. 72%).")


def changed(summary: TaskSummary, **estimates) -> TaskSummary:
    comparison = type(summary.comparison)(**vars(summary.comparison) | estimates)
    return TaskSummary(summary.task, summary.totals, summary.modes, comparison)


def test_three_sentences_are_honest_where_memory_does_not_help():
    estimate = type(text_task().comparison.bound)
    worse = changed(
        text_task(recovered=-0.3),
        below_window=estimate(-0.2, (-0.3, -0.1)),
        bound=estimate(-0.1, (-0.2, -0.05)),
    )
    _, memory, own = conclusions(run_of(worse))
    assert "memory does not help" in memory and "no better than another's" in own
    assert own.endswith("memory recovers nothing: worse than no memory.")
    unclear = changed(text_task(), below_window=estimate(0.1, (-0.1, 0.3)))
    assert "within chance" in conclusions(run_of(unclear))[1]
    assert "one document does not show" in conclusions(run_of(text_task(documents=1)))[1]
    assert conclusions(run_of(text_task(raw_nll=3.5)))[2].endswith("not help on these documents.")
    nothing = conclusions(run_of(copy_task(), steps=0))
    assert "has no training" in nothing[0] and "No evaluation of running text" in nothing[1]
    assert "not compared with that of another document" in nothing[2]


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A report of a run with all kinds of tasks and long names."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    written = dict(pieces=[["x" * 300, True], [" y", False]], right=1)
    copies = copy_task()
    copies.modes["memory"]["written"] = dict(
        original="x" * 300, tokens=16, alone=written, guided=written
    )
    run = run_of(positions(text_task()), copies, retrieval_task())
    run.versions = {"platform": "Linux-" + "6.12.0_" * 30, "device": "cpu"}
    return write_report(run)[0].resolve()


class Markup(HTMLParser):
    """Checks that elements are closed in order, and collects them with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_accessible(page):
    text = page.read_text()
    found = Markup(text).found
    tags = [tag for tag, _ in found]
    assert tags.count("h1") == tags.count("main") == tags.count("title") == 1
    assert ("html", {"lang": "en"}) in found
    assert any("width=device-width" in a.get("content", "") for tag, a in found if tag == "meta")
    assert all(a["alt"] for tag, a in found if tag == "img") and "img" in tags
    assert all(a.get("scope") in ("row", "col") for tag, a in found if tag == "th")
    assert not any({"width", "style"} & a.keys() for _, a in found)
    assert "prefers-color-scheme: dark" in text
    # The sentences stand before any table or picture.
    assert text.index('class="summary"') < text.index("<table") < text.index("<img")


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
@pytest.mark.parametrize("width", [420, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_without_scrolling_sideways(page, width, dark):
    """A frame of the width contains the page, and a script reads the layout that results."""
    probe = page.parent / "probe.html"
    probe.write_text(f"""<!DOCTYPE html><iframe style="width:{width}px;height:900px;border:0"
        srcdoc="{page.read_text().replace("&", "&amp;").replace('"', "&quot;")}"></iframe>
        <script>onload = () => {{
        const view = document.querySelector("iframe").contentWindow, root = view.document;
        const wide = [...root.body.querySelectorAll("*")].filter(e => !e.closest("thead") &&
            e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 80));
        const style = view.getComputedStyle(root.body);
        document.querySelector("pre").textContent = "RESULT" + JSON.stringify({{
            scroll: root.documentElement.scrollWidth, wide: wide.length, back: style.backgroundColor,
            text: style.color, stacked: view.getComputedStyle(root.querySelector(".modes td")).display,
            images: [...root.images].every(i => i.complete && i.naturalWidth > 0) }}) + "END"; }}
        </script><pre></pre>""")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"]
    command = [BROWSER, *options, "--window-size=1400,1000", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    shown = json.loads(dom.rsplit("RESULT", 1)[1].split("END")[0])
    assert shown["scroll"] <= width and shown["wide"] == 0 and shown["images"]
    assert shown["stacked"] == ("block" if width == 420 else "table-cell")
    brightness = [sum(map(int, shown[k][4:-1].split(", "))) for k in ("back", "text")]
    assert (brightness[0] < brightness[1]) == dark and abs(brightness[0] - brightness[1]) > 450
