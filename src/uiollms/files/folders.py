"""The folders that the program reads and writes. Environment variables can change them."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)
_config_folder = Path()  # where `raw_dir` looks, after the working directory


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
    in the working directory, else raw_data beside the config that was read last."""
    if folder := os.environ.get("UIOLLMS_RAW_DATA"):
        return Path(folder)
    here, beside = Path("raw_data"), _config_folder / "raw_data"
    if here.is_dir() or not beside.is_dir():
        return here
    report_raw_dir(beside)
    return beside


@cache
def report_raw_dir(folder: Path) -> None:
    """Logs once that corpora are read from a folder outside the working directory."""
    log.info("raw_data is read from %s", folder)


def set_config_folder(folder: Path) -> None:
    """Sets the folder of the config of this process, in which `raw_dir` looks."""
    global _config_folder
    _config_folder = folder


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
