"""Read documents from datasets of the Hugging Face hub and from parquet files, through
memory-mapped Arrow.

A dataset's files come from $UIOLLMS_HUB_DIR/<org>/<name> if that folder exists, else from the hub's
cache on this machine, into which they are downloaded if they are missing. The `datasets` library
converts them to Arrow files once. Programs in a dataset's repository are never run. The token for
gated datasets is read only from the environment variable HF_TOKEN.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uiollms.data.documents import Corpus, LazyCorpus
from uiollms.data.readers.fields import MakeDocument, any_fields
from uiollms.files.errors import ConfigError
from uiollms.files.folders import hub_dir

SPLITS = ("train", "validation", "test")
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}  # by file ending without .gz


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the hub.

    name: its id; aliases: other ids under which $UIOLLMS_HUB_DIR may contain it; files: a glob of
    the files of each split, if the file names do not contain the split. If the names of the files
    determine the splits, only the files of one split are downloaded (for example the test books of
    pg19 without 6 GB of training books).
    """

    name: str
    aliases: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        if self.local_folder() or self.cached_folder():
            return None
        return f"hub dataset {self.name} is not on this machine; it is downloaded when first used"

    def split(self, name: str) -> HubSplit:
        """Returns one split as a source."""
        return HubSplit(self, name)

    def local_folder(self) -> Path | None:
        root = hub_dir()
        folders = [root / name for name in (self.name, *self.aliases)] if root else []
        return next((folder for folder in folders if folder.is_dir()), None)

    def cached_folder(self) -> Path | None:
        """Returns the folder of an earlier download of any split, or None."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self.fetch(None, local_files_only=True)
        except LocalEntryNotFoundError:
            return None

    def has(self, split: str, folder: Path) -> bool:
        """Whether a folder contains the files of a split, judged by their names."""
        return bool(self.paths(split, folder)) or not any(
            self.paths(other, folder) for other in SPLITS
        )

    def paths(self, split: str, folder: Path) -> list[str]:
        """Returns the data files of a split: those that match its glob, else those whose names
        contain the split (data/test-00000-of-00001.parquet). Returns none if the names of the
        files do not determine the splits."""
        if self.files:
            found = folder.glob(self.files[split]) if split in self.files else []
            return sorted(str(path) for path in found if path.is_file())
        word = re.compile(rf"(?<![a-z]){split}(?![a-z])", re.IGNORECASE)
        found = [
            path
            for path in sorted(folder.rglob("*"))
            if word.search(path.relative_to(folder).as_posix())
        ]
        return [str(path) for path in found if path.is_file() and suffix_of(str(path)) in BUILDERS]

    def download(self, split: str) -> Path:
        """Downloads the files of a split, or of the whole dataset if the file names do not
        determine the splits, and returns their folder."""
        folder = self.fetch([self.files[split]] if self.files else [f"*{split}*"])
        return folder if self.files or self.paths(split, folder) else self.fetch(None)

    def fetch(self, patterns: list[str] | None, local_files_only: bool = False) -> Path:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self.name,
            repo_type="dataset",
            allow_patterns=patterns,
            # False: do not use a token that an earlier login stored on the disk.
            token=os.environ.get("HF_TOKEN") or False,
            local_files_only=local_files_only,
        )
        return Path(folder)

    def load(self, split: str, columns: Sequence[str]) -> Any:
        """Loads the columns of a split as a datasets.Dataset. Raises ConfigError with one line."""
        import datasets

        try:
            folder = self.local_folder() or self.download(split)
            if paths := self.paths(split, folder):
                # The library interprets names as globs.
                named = [glob.escape(path) for path in paths]
                kind = builder_of(paths[0])
                dataset = datasets.load_dataset(kind, data_files=named, split="train")
            elif self.files:
                raise FileNotFoundError(f"no file matches {folder / self.files[split]}")
            else:
                dataset = datasets.load_dataset(str(folder), split=split)
        except Exception as error:  # network, disk and formats raise errors of many libraries
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(
                f"hub dataset {self.name}, split {split}: cannot be loaded ({reason}); check the "
                "network, and HF_TOKEN if the dataset is gated, or set UIOLLMS_HUB_DIR to a folder "
                f"that contains a copy of it as {self.name}"
            ) from error
        return select_columns(dataset, columns, f"hub dataset {self.name}, split {split}")

    def rows(self, split: str, columns: Sequence[str], make: MakeDocument) -> Corpus:
        """Opens the documents of a split, one per row."""
        return dataset_documents(self.load(split, columns), f"hub:{self.name}/{split}", make)


@dataclass(frozen=True)
class HubSplit:
    """One split of a hub dataset as a source."""

    dataset: HubDataset
    split: str

    @property
    def name(self) -> str:
        return f"{self.dataset.name} ({self.split})"

    def local_folder(self) -> Path | None:
        return self.dataset.local_folder()

    def missing(self) -> str | None:
        local = self.local_folder()
        folder = local or self.dataset.cached_folder()
        if folder and self.dataset.has(self.split, folder):
            return None
        if local:  # nothing is downloaded into this folder
            return (
                f"{local} contains no file of split {self.split} of the hub dataset "
                f"{self.dataset.name}"
            )
        return (
            f"hub dataset {self.dataset.name}, split {self.split}, is not on this machine; it is "
            "downloaded when first used"
        )


def suffix_of(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix


def builder_of(path: str) -> str:
    suffix = suffix_of(path)
    if suffix not in BUILDERS:
        raise ValueError(f"{path}: expected one of {', '.join(BUILDERS)}")
    return BUILDERS[suffix]


def select_columns(dataset: Any, columns: Sequence[str], source: str) -> Any:
    """Selects columns, so that reading a row reads only these. Raises ConfigError for a missing
    column."""
    for column in columns:
        if column not in dataset.column_names:
            raise ConfigError(
                f"{source}: column {column!r} is missing, found {sorted(dataset.column_names)}"
            )
    return dataset.select_columns(list(columns))


def dataset_documents(dataset: Any, source: str, make: MakeDocument) -> Corpus:
    def read(i: int) -> Any:
        return make(dataset[i], f"{source}: row {i + 1}")

    return LazyCorpus(len(dataset), read)


def parquet_file(path: str, make: MakeDocument = any_fields, limit: int | None = None) -> Corpus:
    """Opens a parquet file with a column `text`, a column `messages`, or columns `input` and
    `output`, or several of them with nulls."""
    import datasets

    try:
        dataset = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train")
    except Exception as error:  # raises errors of many libraries
        raise ConfigError(
            f"{path}: cannot be read as parquet ({' '.join(str(error).split())[:300]})"
        ) from error
    columns = [
        name for name in ("text", "messages", "input", "output") if name in dataset.column_names
    ]
    if columns in ([], ["input"], ["output"]):
        columns = ["input", "output"]  # the error names the one that is missing
    return dataset_documents(select_columns(dataset, columns, path), path, make)
