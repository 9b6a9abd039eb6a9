"""The folders that the program reads and writes. Environment variables can change them."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder of results that are computed once (converted models, unpacked files, beacon
    indexes): $UIOLLMS_CACHE, else ~/.cache/uiollms."""
    return Path(os.environ.get("UIOLLMS_CACHE") or Path.home() / ".cache" / "uiollms")


def shipped_dir() -> Path:
    """The folder of train.py and test.py, the demo's and the other configs, and the adapters: the
    folder `shipped` of an installed package, or the root of the checkout."""
    package = Path(__file__).parents[1]
    shipped = package / "shipped"
    return shipped if shipped.is_dir() else package.parents[1]


def raw_dir() -> Path:
    """The folder of the files that raw_data/README.md describes: $UIOLLMS_RAW_DATA, else raw_data
    in the working directory."""
    return Path(os.environ.get("UIOLLMS_RAW_DATA") or "raw_data")


def hub_dir() -> Path | None:
    """The folder of local copies of hub datasets, as <org>/<name>, which are used instead of
    downloads: $UIOLLMS_HUB_DIR, else None."""
    folder = os.environ.get("UIOLLMS_HUB_DIR")
    return Path(folder) if folder else None


def run_folder(run_dir: str | None, save_ckp: str | None, env_conf: str | Path) -> Path:
    """The folder of a run's files: `run_dir` if given, else a folder derived from `save_ckp`, so
    that runs with different checkpoints have different folders, else one named after the config.

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
