"""What a run ran on: versions, git revision, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = ("uiollms", "torch", "transformers", "peft", "safetensors", "numpy", "datasets")


@cache
def environment() -> dict[str, str | None]:
    """What ran: versions, and the git revision of this program where it is a clone."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "git": git_revision(Path(__file__).parents[2]),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from its source folder
            found[package] = None
    return found | {"platform": platform.platform()}


def git_revision(root: Path) -> str | None:
    """The commit of a clone, with "+" behind it where tracked files have changed since; None
    outside of one."""
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
    """What a program prints. Raises OSError or SubprocessError where it cannot be had."""
    done = subprocess.run(command, capture_output=True, timeout=10, check=True)
    return done.stdout.decode("utf-8", "replace")


def device_name() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )


def unused_gpu() -> str | None:
    """A line for whoever has an NVIDIA GPU that the installed torch cannot use. None where torch
    can, where there is no such GPU, and where CUDA_VISIBLE_DEVICES hides it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words on an old driver take several lines
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
    """The first NVIDIA GPU and its driver, from `nvidia-smi` or from the kernel, which does not
    name the GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        shown = output_of(query)
    except (OSError, subprocess.SubprocessError):
        shown = ""
    if "," in shown:
        name, driver = shown.splitlines()[0].rsplit(", ", 1)
        return f"{name} (driver {driver})"
    return "an NVIDIA driver" if NVIDIA_DRIVER.exists() else None
