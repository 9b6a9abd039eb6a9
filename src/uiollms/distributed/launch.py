"""Environment variables that a launcher or the user sets: they are checked before anything else
reads them, and give the number of this process on its machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from uiollms.files.errors import ConfigError, Faults, shortened

SIZES = """
    WORLD_SIZE LOCAL_WORLD_SIZE SLURM_NTASKS PMI_SIZE OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE
    MPI_LOCALNRANKS OMPI_COMM_WORLD_LOCAL_SIZE MV2_COMM_WORLD_LOCAL_SIZE
""".split()
RANKS = """
    RANK LOCAL_RANK GROUP_RANK SLURM_PROCID SLURM_LOCALID PMI_RANK OMPI_COMM_WORLD_RANK
    OMPI_COMM_WORLD_LOCAL_RANK MPI_LOCALRANKID MV2_COMM_WORLD_RANK MV2_COMM_WORLD_LOCAL_RANK
""".split()
MOST_PROCESSES = 2**16
# name -> (least, most)
NUMBERS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(SIZES, (0, MOST_PROCESSES)),  # some launchers set 0 for none
    **dict.fromkeys(RANKS, (-1, MOST_PROCESSES - 1)),  # some launchers set -1 for none
    "MASTER_PORT": (0, 2**16 - 1),
}
RANK_OF = {"WORLD_SIZE": "RANK", "LOCAL_WORLD_SIZE": "LOCAL_RANK"}
FOLDERS = ("UIOLLMS_CACHE", "UIOLLMS_RAW_DATA", "UIOLLMS_HUB_DIR")


def check_environment(given: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError, with one line for each fault, for environment variables that must be
    numbers or folders and are not. given: the variables, by default os.environ."""
    given = os.environ if given is None else given
    faults = Faults()
    numbers = {}
    for name, (least, most) in NUMBERS.items():
        if text := given.get(name):
            with faults.collect():
                numbers[name] = as_number(name, text, least, most)
    for size, rank in RANK_OF.items():
        if 0 < numbers.get(size, 0) <= numbers.get(rank, 0):
            why = f"expected a number below {size}, which is {numbers[size]}"
            faults.add(f"environment variable {rank}: {why}, found {numbers[rank]}")
    for name in FOLDERS:
        if (text := given.get(name)) and Path(text).exists() and not Path(text).is_dir():
            faults.add(
                f"environment variable {name}: {shortened(text)} is not a folder; set one, or "
                "unset it"
            )
    faults.report()


class LocalProcess(NamedTuple):
    """This process as one of the `size` processes of a run on its machine, numbered from 0."""

    rank: int = 0
    size: int = 1


def local_process(given: Mapping[str, str] | None = None) -> LocalProcess:
    """Reads LOCAL_RANK and LOCAL_WORLD_SIZE, which torchrun and `accelerate launch` set. Without
    LOCAL_WORLD_SIZE a process that has a LOCAL_RANK shares its machine with all WORLD_SIZE
    processes; without both it is alone. Raises ConfigError for values that are not such numbers.
    given: the variables, by default os.environ."""
    given = os.environ if given is None else given

    def number(name: str) -> int:
        return as_number(name, text, *NUMBERS[name]) if (text := given.get(name)) else 0

    has_rank = bool(given.get("LOCAL_RANK")) and number("LOCAL_RANK") >= 0
    rank = number("LOCAL_RANK") if has_rank else 0
    size = number("LOCAL_WORLD_SIZE") or (number("WORLD_SIZE") if has_rank else 1)
    return LocalProcess(rank, max(size, rank + 1))


def as_number(name: str, text: str, least: int, most: int) -> int:
    digits = text.strip()
    if len(digits) <= 20 and digits.removeprefix("-").isdecimal() and digits.isascii():
        if least <= int(digits) <= most:
            return int(digits)
    expected = f"a whole number from {least} to {most}"
    found = shortened(text, 60)
    raise ConfigError(
        f"environment variable {name}: expected {expected}, found {found!r}; unset it, or correct "
        "it"
    )
