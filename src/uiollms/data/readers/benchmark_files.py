"""Files of benchmarks in a local copy of their dataset, $UIOLLMS_HUB_DIR/<org>/<name>."""

from __future__ import annotations

import glob
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uiollms.data.readers.hub import builder_of, select_columns
from uiollms.data.readers.json_lines import MOST_GROWTH, MOST_UNPACKED, file_state
from uiollms.files.atomic import atomic_file, make_folder
from uiollms.files.errors import ConfigError
from uiollms.files.folders import cache_dir, hub_dir


@dataclass(frozen=True)
class BenchmarkFile:
    """One file of a benchmark's dataset.

    datasets: the names of the dataset, of which the first is shown
    patterns: globs of the file in the dataset's folder; the first that matches is read
    packed:   (a zip archive in the folder, the file's name in it), read where no pattern matches
    download: the command that fetches the dataset, with {folder} in place of its folder
    """

    datasets: tuple[str, ...]
    patterns: tuple[str, ...]
    packed: tuple[str, str] | None = None
    download: str = ""

    @property
    def name(self) -> str:
        return self.datasets[0]

    def find(self) -> Path | None:
        """Returns the path of the file, or of the archive that contains it. None if both are
        missing."""
        root = hub_dir()
        folders = [root / name for name in self.datasets] if root else []
        for folder in folders:
            for pattern in self.patterns:
                if found := sorted(folder.glob(pattern)):
                    return found[0]
            if self.packed and (folder / self.packed[0]).is_file():
                return folder / self.packed[0]
        return None

    def missing(self) -> str | None:
        if self.find():
            return None
        folder = f"$UIOLLMS_HUB_DIR/{self.datasets[0]}"
        return (
            f"{folder} contains no {self.patterns[0]}; where there is network: "
            f"{self.download.format(folder=folder)}"
        )

    def path(self) -> Path:
        """Returns the path of the file, which is unpacked once into the cache folder. Raises
        ConfigError if it is missing, with the command that fetches it."""
        found = self.find()
        if found is None:
            raise ConfigError(str(self.missing()))
        if self.packed and found.name == self.packed[0]:
            return unzip(found, self.packed[1])
        return found


def unzip(archive: Path, member: str) -> Path:
    """Returns the path of the unpacked copy of a file in a zip archive. Raises ConfigError for a
    damaged archive, for one that lacks the file, and for a file that unpacks to far more than its
    size."""
    digest = hashlib.sha256(f"{file_state(archive)} {member}".encode()).hexdigest()[:16]
    copy = cache_dir() / "unpacked" / f"{Path(member).stem}-{digest}{Path(member).suffix}"
    if copy.exists():
        return copy
    try:
        with zipfile.ZipFile(archive) as files:
            if member not in files.namelist():
                raise ConfigError(f"{archive}: contains no {member}")
            size = files.getinfo(member)
            most = max(MOST_UNPACKED, MOST_GROWTH * size.compress_size)
            if size.file_size > most:
                raise ConfigError(
                    f"{archive}: {member} is not unpacked: it grows past {most >> 20:,} MiB"
                )
            make_folder(copy.parent)
            with atomic_file(copy) as work, files.open(member) as packed, work.open("wb") as part:
                while data := packed.read(1 << 20):
                    part.write(data)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{archive}: {member} cannot be unpacked: {error}") from None
    return copy


def table(path: Path, columns: Sequence[str]) -> Any:
    """Returns the columns of a .json, .jsonl or .parquet file as a datasets.Dataset."""
    import datasets

    try:
        kind = builder_of(str(path))
        rows = datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train")
    except Exception as error:  # raises errors of many libraries
        raise ConfigError(
            f"{path}: cannot be read ({' '.join(str(error).split())[:300]})"
        ) from error
    return select_columns(rows, columns, str(path))
