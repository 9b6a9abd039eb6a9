"""Rules as tests: what the documents name exists, versions agree, files stay small."""

import ast
import importlib.util
import platform
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from rattler import BuildString, Channel, MatchSpec, PackageRecord

from uiollms.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "uiollms"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PAGES = sorted(
    [*(ROOT / "docs").glob("*.md"), *ROOT.glob("docs/log/*.md"), *ROOT.glob("adapters/*.md")]
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *PAGES, *(ROOT / "raw_data").glob("*.md")])


def test_no_module_passes_450_lines():
    assert {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 450} == {}


def test_every_module_says_its_purpose_in_one_line():
    for path in SOURCES:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc and doc.splitlines()[0].strip(), path


def test_no_silenced_errors_and_no_forbidden_loaders():
    for path in [*SOURCES, ROOT / "train.py", ROOT / "test.py"]:
        text = path.read_text()
        assert not re.search(r"except[^\n]*:\s*\n?\s*pass\b", text), path
        assert "trust_remote_code=True" not in text and "weights_only=False" not in text, path


PATH = re.compile(
    r"`([\w.-]+(?:/[\w.-]+)*\.(?:py|json|md|yaml|toml|png|lock|safetensors|cff))`|`((?:[\w.-]+/)+)`"
)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_every_path_a_document_names_exists(document):
    for match in PATH.finditer(document.read_text()):
        name = next(group for group in match.groups() if group)
        if name.startswith(("http", "runs/")):
            continue
        places = [ROOT / name, document.parent / name, PACKAGE / name, ROOT / "src" / name]
        places.append(ROOT / "raw_data" / "examples" / name)  # files that users put into raw_data
        assert any(p.exists() for p in places), f"{document.name} names {name}"


def prose(document: Path) -> list[str]:
    """The lines of a page that are neither in a table, nor code, nor a URL that cannot break."""
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [
        line
        for line in text.splitlines()
        if not re.match(r"\||    ", line) and not re.search(r"https?://\S{60}", line)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_prose_ends_by_column_100(document):
    lines = prose(document)
    assert len(lines) > 5
    assert [line for line in lines if len(line) > 100] == []


def anchors(document: Path) -> set[str]:
    """The headings of a page as the names that links use: "Will it fit? `--dry_run`" is
    will-it-fit---dry_run."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_leads_somewhere_from_where_it_stands(document):
    for path, anchor in LINK.findall(document.read_text()):
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {path}#{anchor}"


COMMAND = re.compile(
    r"(?:python |(?:`|^    (?:\$ )?)(?=uiollms ))(uiollms|-m benchmarks[\w.]*|[\w/]+\.py)([^`\n#]*)",
    re.MULTILINE,
)


def test_every_command_a_document_names_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = 0
    for document in DOCUMENTS:
        text = document.read_text()
        named = re.findall(r"(?:`|^    )make ([\w-]+)", text, re.MULTILINE)
        assert set(named) <= targets, f"{document.name}: make {set(named) - targets}"
        for program, arguments in COMMAND.findall(text):
            path = ROOT / program
            if program == "uiollms":
                command = arguments.split()[0] if arguments.split() else "--help"
                if command.startswith("--") or command == "COMMAND":
                    path = PACKAGE / "__main__.py"
                else:
                    assert command in COMMANDS, f"{document.name}: uiollms {command}"
                    module = COMMANDS[command].module.removesuffix(".py")
                    path = PACKAGE / "cli" / f"{module}.py"
                    path = path if path.exists() else ROOT / path.name
            elif program.startswith("-m"):
                place = ROOT / program.removeprefix("-m ").replace(".", "/")
                path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
            assert path.exists(), f"{document.name}: {program}"
            if path.name == "lm_eval.py":
                continue  # its options are lm-eval's
            shared = [PACKAGE / "cli" / name for name in ("common.py", "chat.py")]
            parts = [path, *path.parent.glob(f"{path.stem}_*.py"), *shared]
            options = "".join(part.read_text() for part in parts)
            for flag in re.findall(r"--\w+", arguments):
                found += 1
                assert f'"{flag}"' in options, f"{document.name}: {program} has no {flag}"
    assert found > 30


def test_every_test_a_document_names_exists():
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"^def (test_\w+)", written, re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"`(test_\w+)`", document.read_text()))
        assert named <= tests, f"{document.name} names {named - tests}"


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 280  # the authors' sections with their commands are half of it
    index = ROOT / "docs" / "README.md"
    assert index in {ROOT / path for path, _ in LINK.findall(text)}
    linked = {(index.parent / path).resolve() for path, _ in LINK.findall(index.read_text())}
    assert {*DOCUMENTS} - {index, ROOT / "CHANGELOG.md"} <= linked


def test_the_pictures_are_drawn_by_the_programs_functions():
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    assert {path.name for path in (ROOT / "docs").glob("*.png")} == set(picture.PICTURES)
    results = ROOT / "docs" / "results"
    drawn = {path.relative_to(results).as_posix() for path in results.rglob("*.png")}
    assert drawn == set(picture.RESULT_PICTURES)
    encoder, _ = picture.masks(l=4, m=2).axes
    assert encoder.images[0].get_array().tolist()[4:] == [
        [1, 1, 0, 0, 2, 0],
        [1, 1, 1, 1, 0, 2],
    ]  # attention.py's example
    assert len(picture.weights(draws=2).axes) == 2 * 5 + 1  # and the colour bar


def test_environment_yaml_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yaml").read_text())
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    required = project["dependencies"] + project["optional-dependencies"]["smollm2"]
    assert sorted(pip) == sorted([*required, "-e ."])  # conda runs pip in the file's folder
    assert f"python{project['requires-python']}" in conda["dependencies"]


def locked_versions() -> dict[str, str]:
    """requirements.lock as name -> version."""
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line and line[0] != "#"
    ]
    return {
        name.lower().replace("_", "-"): version
        for name, version in (line.split("==") for line in lines)
    }


def test_environment_yaml_is_what_conda_can_read():
    """It cannot be solved where no channel is: its syntax is held to conda's own grammar, its
    pip part to the lock file."""
    conda = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert conda.keys() == {"name", "channels", "dependencies"}
    assert [Channel(name).name for name in conda["channels"]] == ["conda-forge"]
    texts = [text for text in conda["dependencies"] if isinstance(text, str)]
    python, _ = (MatchSpec(text, strict=True) for text in texts)  # raises what conda could not read
    assert python.matches(
        PackageRecord("python", platform.python_version(), BuildString("0"), 0, "linux-64")
    )
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    for requirement in map(Requirement, [line for line in pip if line != "-e ."]):
        assert requirement.specifier.contains(locked_versions()[requirement.name.lower()]), (
            requirement
        )


def test_citation_and_changelog_know_this_version():
    """CITATION.cff was validated with cffconvert 2.0.0 when it was written; here what would go
    stale."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )
    (paper,) = citation["references"]
    assert (
        "2406.18173" in str(paper["identifiers"])
        and "arXiv 2406.18173" in (ROOT / "src/uiollms/__init__.py").read_text()
    )
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_lock_satisfies_pyproject():
    locked = locked_versions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [text for name in ("dev", "smollm2", "lm-eval", "serve") for text in extras[name]]
    for text in project["dependencies"] + named:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name.lower()]), text


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme and "make demo" in readme
