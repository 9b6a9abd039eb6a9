"""Rules as tests: what the documents name exists, versions agree, imports point one way, files stay small."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "uiollms"
SOURCES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "raw_data").glob("*.md")])

# Lower modules first: a module imports only from above itself in this list.
ORDER = """
    config schema faults integrity paths environment devices distributed data.cleaning data.documents data.files data.hub
    data.beacons data.corpora_text data.corpora_own data.corpora_tasks data.mixture data lora loss attention flash memory library
    usage generation base model pretend_kernels pretend placement pretrained tasks flops estimators kv_gradients step evaluate
    samples retrieval results evaluation training checkpoint saving run_state report run cli plan dry_run convert data.__main__
    study.gradients study.cost study.tables study.learning study.recall study study.__main__ __main__ __init__
""".split()
# from_pretrained and save_pretrained are methods of the model, as in transformers; they import their work when called.
HANDED_UP = {("usage", "saving")}


def imports_of(path: Path) -> set[str]:
    """Names of the uiollms modules that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text())
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return {name.removeprefix("uiollms.") for name in names if name.startswith("uiollms.")}


def module_name(path: Path) -> str:
    """src/uiollms/data/files.py -> data.files; a package's __init__ is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def test_imports_point_one_way():
    assert {module_name(p) for p in SOURCES} == set(ORDER)
    for path in SOURCES:
        own = module_name(path)
        for name in imports_of(path):
            assert name == own or (own, name) in HANDED_UP or ORDER.index(name) < ORDER.index(own), f"{own} imports {name}"


def test_no_module_passes_350_lines():
    assert {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 350} == {}


def test_every_module_says_its_purpose_in_one_line():
    for path in SOURCES:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc and doc.splitlines()[0].strip(), path


def test_no_silenced_errors_and_no_forbidden_loaders():
    for path in [*SOURCES, ROOT / "train.py", ROOT / "test.py"]:
        text = path.read_text()
        assert not re.search(r"except[^\n]*:\s*\n?\s*pass\b", text), path
        assert "trust_remote_code=True" not in text and "weights_only=False" not in text, path


PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*\.(?:py|json|md|yaml|toml|png|lock|safetensors|cff))`|`((?:[\w.-]+/)+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_every_path_a_document_names_exists(document):
    for match in PATH.finditer(document.read_text()):
        name = next(group for group in match.groups() if group)
        if name.startswith(("http", "runs/")):
            continue
        places = [ROOT / name, document.parent / name, document.parent / "examples" / name, PACKAGE / name, ROOT / "src" / name]
        assert any(p.exists() for p in places), f"{document.name} names {name}"


def anchors(document: Path) -> set[str]:
    """The headings of a page as the names that links use: "Will it fit? `--dry_run`" is will-it-fit---dry_run."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_leads_somewhere_from_where_it_stands(document):
    for path, anchor in LINK.findall(document.read_text()):
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {path}#{anchor}"


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    linked = {ROOT / path for path, _ in LINK.findall(text)}
    assert set(ROOT.glob("docs/*.md")) <= linked


def test_environment_yaml_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yaml").read_text())
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    assert sorted(pip) == sorted(project["dependencies"] + project["optional-dependencies"]["smollm2"])
    assert f"python{project['requires-python']}" in conda["dependencies"]


def test_the_lock_satisfies_pyproject():
    from packaging.requirements import Requirement

    locked = dict(
        line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line and line[0] != "#"
    )
    locked = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["dev"] + extras["smollm2"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name.lower()]), text


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme and "make demo" in readme
