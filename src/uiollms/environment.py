"""What a run ran on: versions, git revision, machine."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("uiollms", "torch", "transformers", "peft", "safetensors", "numpy", "datasets")


@cache
def environment() -> dict[str, str | None]:
    """What ran: versions, and the git revision of this program where it is a clone."""
    found: dict[str, str | None] = {"python": platform.python_version(), "git": git_revision(Path(__file__).parents[2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from its source folder
            found[package] = None
    return found | {"platform": platform.platform()}


def git_revision(root: Path) -> str | None:
    """The commit of a clone, with "+" behind it where tracked files have changed since; None outside of one."""
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
