"""Performs the recipes of docs/extending.md step by step on a copy of the repository. Their diffs
and files are applied to the copy, and their commands run in it."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
PARTS = ("src", "tests", "config", "docs", "raw_data", "adapters", "train.py", "test.py")


def recipe(heading: str) -> str:
    (text,) = re.findall(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
    return text


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository without its weights and its history."""
    names = [*PARTS, "pyproject.toml", *(path.name for path in ROOT.glob("*.json"))]
    for name in names:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.png", "results")
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    return tmp_path


def change(folder: Path, block: str) -> None:
    """Applies a diff block. It consists of the name of a file and of hunks, whose lines begin with
    a space, - or +. The old lines of a hunk must be in the file once. A file with + lines alone is
    new."""
    name, _, hunks = block.partition("\n")
    path = folder / name
    for hunk in hunks.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        if not old:
            assert not path.exists(), f"{name} is there already"
            path.parent.mkdir(exist_ok=True)
            path.write_text(new)
            continue
        text = path.read_text()
        # The lines of a hunk may be the beginning of a longer line.
        if text.count(old) != 1:
            old, new = old.rstrip("\n"), new.rstrip("\n")
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        path.write_text(text.replace(old, new))


def write(folder: Path, block: str) -> None:
    """Writes a python block. Its first line is `# at the end of FILE` or `# new file FILE`."""
    where, _, code = block.partition("\n")
    name = where.split()[-1]
    path = folder / name
    assert where in (f"# at the end of {name}", f"# new file {name}")
    assert path.exists() == ("at the end" in where)
    before = f"{path.read_text()}\n\n" if path.exists() else ""
    path.parent.mkdir(exist_ok=True)
    path.write_text(before + code)


def run(folder: Path, command: str) -> None:
    """Runs a command of a recipe, which may begin with environment variables, in the folder. What
    pip installs goes into its folder `installed`, which only these commands see."""
    words = re.findall(r'"[^"]*"|\S+', command)
    paths = [str(folder / name) for name in ("src", "", "installed")]
    settings = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    program = {"python": [], "uiollms": ["-m", "uiollms"], "pip": ["-m", "pip"]}[words.pop(0)]
    if "pip" in program:
        words += ["--no-deps", "--no-build-isolation", "--target", str(folder / "installed")]
    arguments = [sys.executable, *program, *(word.strip('"') for word in words)]
    done = subprocess.run(
        arguments, cwd=folder, env=settings, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_works_step_by_step(heading, copy):
    kinds = set()
    for kind, block in BLOCK.findall(recipe(heading)):
        block = textwrap.dedent(block)
        kinds.add(kind)
        if kind == "diff":
            change(copy, block)
        elif kind == "python":
            write(copy, block)
        else:
            for command in block.splitlines():
                run(copy, command)
    assert "bash" in kinds


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_has_at_most_six_steps(heading):
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", recipe(heading), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and 1 < len(numbers) <= 6


def test_the_recipes_are_those_that_contributing_links():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    linked = re.findall(r"docs/extending\.md#([\w-]+)", contributing)
    assert linked == [heading.lower().replace(" ", "-") for heading in RECIPES]
