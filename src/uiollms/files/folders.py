"""Folders the program reads from and keeps things in; each can be moved by an environment
variable."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where what was computed once is kept (converted models, unpacked files, beacon indexes):
    $UIOLLMS_CACHE, else ~/.cache/uiollms."""
    return Path(os.environ.get("UIOLLMS_CACHE") or Path.home() / ".cache" / "uiollms")


def raw_dir() -> Path:
    """Where the files of raw_data/README.md lie: $UIOLLMS_RAW_DATA, else raw_data in the working
    directory."""
    return Path(os.environ.get("UIOLLMS_RAW_DATA") or "raw_data")


def hub_dir() -> Path | None:
    """Where copies of hub datasets lie as <org>/<name>, looked up before the hub:
    $UIOLLMS_HUB_DIR, else nowhere."""
    folder = os.environ.get("UIOLLMS_HUB_DIR")
    return Path(folder) if folder else None


def run_folder(run_dir: str | None, save_ckp: str | None, env_conf: str | Path) -> Path:
    """Where a run keeps its files: `run_dir` if given, else what `save_ckp` decides, so that
    runs with checkpoints of their own have folders of their own.

    runs/8x/checkpoint -> runs/8x | ckp/32x.pth -> runs/32x | adapters/mine -> runs/mine | null
    -> runs/<config's name>
    """
    if run_dir:
        return Path(run_dir)
    if not save_ckp:
        return Path("runs") / Path(env_conf).stem
    saved = Path(save_ckp)
    return (
        saved.parent
        if saved.name == "checkpoint" and saved.parent.name
        else Path("runs") / saved.stem
    )
