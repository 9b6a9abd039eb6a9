"""Tests of the API page that `make api` writes. Every public name is on it, and every link on it
has a target."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

import uiollms

ROOT = Path(__file__).parent.parent
# The HTML tags that Markdown makes of plain text, code, lists and links. Emphasis is left out,
# because in a docstring it would come from `a * b * c` or `__name__` by mistake.
MARKUP = {"p", "code", "pre", "a", "ul", "ol", "li", "div", "span"}
VOID = {"meta", "link", "input", "br", "img", "wbr", "path", "circle", "rect"}
# A path to a file of this repository, as in docs/results.md.
REPOSITORY_PATH = re.compile(r"\b((?:docs|tests|src|config|benchmarks|examples)/[\w/.-]+\.\w+)")


class Page(HTMLParser):
    """The parts of one HTML file that the tests check."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.docstrings: dict[str, str] = {}  # the anchor before a docstring -> its text
        # Tags and paragraphs of all docstrings.
        self.tags: set[str] = set()
        self.paragraphs: list[str] = []
        self.signatures = ""
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self._anchor = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "meta" and attributes.get("http-equiv") == "refresh":
            self.links.append(str(attributes["content"]).partition("url=")[2])
        if tag in VOID:
            return
        self._open.append((tag, attributes))
        if attributes.get("id"):
            self.anchors.add(str(attributes["id"]))
            if tag in ("section", "div"):
                self._anchor = str(attributes["id"])
        if tag == "a":
            self.links.append(str(attributes["href"]))
        if self._inside("docstring"):
            self.tags.add(tag)
            if tag == "p":
                self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        opened, _ = self._open.pop()
        assert opened == tag, f"<{opened}> at {self._anchor} is closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        if self._inside("docstring"):
            self.docstrings[self._anchor] = self.docstrings.get(self._anchor, "") + data
            if "p" in [tag for tag, _ in self._open]:
                self.paragraphs[-1] += data
        elif self._inside("attr"):
            self.signatures += data

    def _inside(self, name: str) -> bool:
        return any(name in (attributes.get("class") or "").split() for _, attributes in self._open)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder that the command of `make api` writes."""
    folder = tmp_path_factory.mktemp("api")
    makefile = (ROOT / "Makefile").read_text()
    (command,) = re.findall(r"^api: .*\n\t\$\(BIN\)/(.*)$", makefile, re.MULTILINE)
    words = shlex.split(command.replace("runs/api", str(folder)))
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "uiollms.html").read_text(encoding="utf-8"))


def test_every_public_name_is_on_the_page_with_a_docstring(page):
    assert len(uiollms.__all__) == len(set(uiollms.__all__)) > 20
    assert {name for name in uiollms.__all__ if not page.docstrings.get(name, "").strip()} == set()
    sections = {anchor for anchor in page.anchors if "." not in anchor}
    assert sections - {"navtoggle", "togglestate"} == set(uiollms.__all__)


def test_inherited_methods_are_on_the_page(page):
    """Methods that it inherits from torch and transformers are left out."""
    for method in ("from_pretrained", "save_pretrained", "compress", "forward", "generate"):
        assert page.docstrings[f"MemoryLM.{method}"]
    assert not page.anchors & {"MemoryLM.parameters", "MemoryLM.init_weights", "MemoryState.crop"}


def test_every_link_leads_to_a_file_and_an_anchor(folder):
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    found = 0
    for path, page in pages.items():
        for link in page.links:
            if link.startswith(("https://", "http://")):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), f"{path.name} links to {link}"
            assert not anchor or anchor in pages[target].anchors, f"{path.name} links to {link}"
            found += 1
    assert found > 200


def test_the_files_that_docstrings_name_exist(page):
    named = {path for text in page.docstrings.values() for path in REPOSITORY_PATH.findall(text)}
    assert named and {path for path in named if not (ROOT / path).exists()} == set()


def test_docstrings_read_on_the_page_as_in_the_source(folder, page):
    """Markdown takes some characters of formulas for markup. The page keeps the lines of a
    paragraph, but not its fixed-width font, so anything aligned within a line has to be indented
    by four spaces, but for the text after the name of an argument."""
    assert page.tags <= MARKUP
    assert "white-space:pre-wrap" in (folder / "uiollms.html").read_text().replace(" ", "")
    lines = [line for text in page.paragraphs for line in text.splitlines()]
    aligned = [line for line in lines if re.search(r"\S  +\S", line)]
    assert [line for line in aligned if not re.match(r"[\w, ]+: +\S+( \S+)*$", line)] == []


def test_the_wheel_contains_py_typed_and_every_module(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(tmp_path)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert "uiollms/py.typed" in packed
    files = {path.relative_to(ROOT / "src").as_posix() for path in ROOT.glob("src/uiollms/**/*.py")}
    assert files <= packed
