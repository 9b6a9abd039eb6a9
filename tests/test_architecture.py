"""Tests the order of the packages of src/uiollms. In the list below, a package imports only from
itself and from the packages above it.

Imports inside functions count, and imports for type checkers alone do not. `__main__` modules are
left out, because they only start a command of `cli`.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "uiollms"
ORDER = """
files           reading and writing files as a whole, and errors of one line each
config          the typed sections of the JSON files
plugins         corpora, tasks and estimators of other packages
kernels         devices, memory, and what makes the arithmetic fast
distributed     processes, division of documents over them, and devices of a base's modules
data            corpora -> documents -> samples, batch by batch
weights         base models, adapters and model folders on disk
model           the memory-enhanced transformer
build           a config -> a model with its tokenizer and weights
alternatives    what a user would pick instead of a learned memory, at equal slots
evaluation      scores, controls, tasks and their results
training        estimators, the training step, optimizer and stages
runs            a run folder: checkpoints, metrics, signals, what is checked before a run
planning        --dry_run: a training step on simulated devices
study           what gradient estimators cost and what they gain
reports         tables, plots and pages
serving         the HTTP server and its page
cli             the commands
"""
NAMES = [line.split()[0] for line in ORDER.strip().splitlines()]
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """src/uiollms/data/readers/hub.py -> data.readers.hub. The name of an __init__ is that of its
    package."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__").strip(".")


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> Iterator[str]:
    """Yields the modules of uiollms that a file imports anywhere, except for types alone."""

    def nodes(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from nodes(child)

    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("uiollms.") for a in node.names if a.name.startswith("uiollms.")
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "uiollms":
            package = (node.module or "").removeprefix("uiollms").strip(".")
            for name in node.names:
                inner = f"{package}.{name.name}".strip(".")
                yield inner if inner in MODULES else package


@pytest.mark.parametrize("module", [m for m in MODULES if m and not m.endswith("__main__")])
def test_a_module_imports_only_from_its_package_and_those_above(module):
    index = NAMES.index(module.split(".")[0])
    for name in imports_of(MODULES[module]):
        assert NAMES.index(name.split(".")[0]) <= index, f"{module} imports {name}"


def test_every_folder_is_a_package():
    """A folder without `__init__` works in a checkout and is missing from an installation."""
    folders = {path.parent for path in FILES}
    assert folders == {p.parent for p in FILES if p.name == "__init__.py"}
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())
    names = {".".join(folder.relative_to(PACKAGE.parent).parts) for folder in folders}
    assert {*project["tool"]["setuptools"]["packages"]} == names | {"uiollms.shipped"}


def test_there_are_no_other_packages():
    assert {module.split(".")[0] for module in MODULES} - {"", "__main__"} == set(NAMES)


def test_no_modules_import_each_other_in_a_circle():
    """A package's __init__ runs before its modules, so a module does not count as importing it."""
    graph = {
        module: {
            name
            for name in imports_of(path)
            if name in MODULES and not module.startswith(f"{name}.")
        }
        for module, path in MODULES.items()
    }
    while leaves := {module for module, names in graph.items() if not names & graph.keys()}:
        graph = {module: names for module, names in graph.items() if module not in leaves}
    assert not graph, "these import each other in a circle: " + ", ".join(sorted(graph))
