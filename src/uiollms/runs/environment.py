"""Software versions, git revision and machine of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = ("uiollms", "torch", "transformers", "peft", "safetensors", "numpy", "datasets")


@cache
def environment() -> dict[str, str | None]:
    """The versions of Python and of the packages that compute, the platform, and the git revision
    of this program if it runs from a clone."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "git": git_revision(Path(__file__).parents[2]),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # for example when it is imported from its source folder
            found[package] = None
    return found | {"platform": platform.platform()}


def git_revision(root: Path) -> str | None:
    """The commit of a clone, followed by "+" if tracked files have changed since then. None if
    `root` is no clone."""
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return output_of(["git", "-C", str(root), *arguments])

    try:
        return git("rev-parse", "HEAD").strip() + (
            "+" if git("status", "--porcelain", "--untracked-files=no").strip() else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def output_of(command: list[str]) -> str:
    """Runs a program and returns what it prints. Raises OSError or SubprocessError if it fails."""
    finished = subprocess.run(command, capture_output=True, timeout=10, check=True)
    return finished.stdout.decode("utf-8", "replace")


def device_name(gpus: Sequence[torch.device]) -> str:
    """The name of the first GPU that a model uses, or of the processor if it uses none."""
    if gpus:
        return torch.cuda.get_device_name(gpus[0])
    return platform.processor() or platform.machine()


def unused_gpu() -> str | None:
    """A warning of one line if the machine has an NVIDIA GPU that the installed torch cannot use.
    None if torch can use it, if there is no such GPU, or if CUDA_VISIBLE_DEVICES hides it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warning about an old driver takes several lines
        if torch.cuda.is_available():
            return None
    gpu = nvidia_gpu()
    if gpu is None:
        return None
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"{gpu} is here, but torch {torch.__version__} ({build}) cannot use it, and the CPU "
        "computes: install a build of "
        "torch that fits the driver, such as `make setup TORCH=torch==2.10.0` for CUDA 12 (Set-up "
        "in README.md)"
    )


def nvidia_gpu() -> str | None:
    """The first NVIDIA GPU and its driver, as `nvidia-smi` reports them; without that program only
    that the kernel has a driver. None if there is neither."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        table = output_of(query)
    except (OSError, subprocess.SubprocessError):
        table = ""
    if "," in table:
        name, driver = table.splitlines()[0].rsplit(", ", 1)
        return f"{name} (driver {driver})"
    return "an NVIDIA driver" if NVIDIA_DRIVER.exists() else None
