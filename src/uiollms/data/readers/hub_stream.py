"""Read any dataset of the Hugging Face hub as a stream, without a download of the whole.

A stream has no random access, so a dataset is read in blocks of BLOCK consecutive rows. The mixture
shuffles each block (data/mixture.py), and the position of a run is a block and a place in the
block's order. A resumed run reads the block again, so it continues with the same documents. The
shuffle buffer of `datasets` is not used, because a stream's state does not contain the buffer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from uiollms.data.documents import Document
from uiollms.data.readers.fields import chat, text_field
from uiollms.data.readers.json_lines import file_state
from uiollms.files.atomic import atomic_file, make_folder
from uiollms.files.errors import ConfigError
from uiollms.files.folders import cache_dir, hub_dir

BLOCK = 1000  # rows; two blocks are held in memory
COLUMNS = ("text", "messages")  # one of them is read if the name has no column
Value = TypeVar("Value")


@dataclass(frozen=True)
class HubStream:
    """A split of a hub dataset as a source, "hub:ORG/NAME[:CONFIG][:SPLIT][#COLUMN]".

    parts: what follows the name, at most a config and a split. A single part is a config if the
    dataset has one of that name, else a split. The split is `train` by default.
    """

    dataset: str
    parts: tuple[str, ...] = ()
    column: str | None = None

    @property
    def name(self) -> str:
        column = f"#{self.column}" if self.column else ""
        return ":".join(("hub", self.dataset, *self.parts)) + column

    def local_folder(self) -> Path | None:
        root = hub_dir()
        return root / self.dataset if root and (root / self.dataset).is_dir() else None

    def missing(self) -> str | None:
        if self.local_folder() is None:
            return f"hub dataset {self.dataset} is not on this machine; it is read from the hub"
        try:
            self.open_stream()
        except ConfigError as error:
            return str(error)
        return None

    def reading(self, read: Callable[[], Value]) -> Value:
        """Returns read(). Errors of the network, the disk and the formats, which come from many
        libraries, become a ConfigError of one line."""
        try:
            return read()
        except ConfigError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(
                f"corpus {self.name}: cannot be read ({reason}); check the name, the network, and "
                "HF_TOKEN if the dataset is gated, or set UIOLLMS_HUB_DIR to a folder that "
                f"contains a copy of it as {self.dataset}"
            ) from error

    def open_stream(self) -> StreamedCorpus:
        """Opens the stream. Raises ConfigError for a dataset, config, split or column that does not
        exist."""
        return self.reading(self._open)

    def _open(self) -> StreamedCorpus:
        import datasets

        path = str(self.local_folder() or self.dataset)
        access: dict[str, Any] = {"token": os.environ.get("HF_TOKEN") or False}
        config, split = None, "train"
        if len(self.parts) == 2:
            config, split = self.parts
        elif self.parts:
            configs = datasets.get_dataset_config_names(path, **access)
            if self.parts[0] in configs:
                config = self.parts[0]
            else:
                split = self.parts[0]
                # Without a config the dataset's default one is read, if it has one.
                known = datasets.get_dataset_split_names(
                    path, configs[0] if len(configs) == 1 else None, **access
                )
                if split not in known:
                    raise ConfigError(
                        f"corpus {self.name}: {split!r} is neither a config nor a split of the "
                        f"dataset; configs are {', '.join(configs)}, splits are {', '.join(known)}"
                    )
        builder = datasets.load_dataset_builder(path, config, **access)
        stream = builder.as_streaming_dataset(split=split)
        names = stream.column_names or list(next(iter(stream), {}))
        column = self._column(names)
        stated = (builder.info.splits or {}).get(split)
        files = (builder.config.data_files or {}).get(split, ())
        state = [file_state(file) if os.path.isfile(file) else str(file) for file in files]
        key = hashlib.sha256(json.dumps([path, config, split, state]).encode()).hexdigest()[:16]
        stream = stream.select_columns([column])
        size = (stated and stated.num_examples) or count_rows(stream, key)
        return StreamedCorpus(self, stream, size, column, f"hub:{self.dataset}/{split}")

    def _column(self, names: Sequence[str]) -> str:
        """The column that is read. Raises ConfigError if it does not exist or is not determined."""
        if self.column is None:
            found = [name for name in COLUMNS if name in names]
            if len(found) == 1:
                return found[0]
            wrong = "has both columns" if found else "has none of the columns"
            raise ConfigError(
                f"corpus {self.name}: the dataset {wrong} {' and '.join(COLUMNS)}; add #COLUMN to "
                f"the name, one of {', '.join(sorted(names))}"
            )
        if self.column not in names:
            raise ConfigError(
                f"corpus {self.name}: column {self.column!r} is missing, found {sorted(names)}"
            )
        return self.column


def count_rows(stream: Any, key: str) -> int:
    """Counts the rows of a stream by reading it, once for each state of its files. key: identifies
    that state."""
    path = cache_dir() / "hub-rows" / key
    if not path.exists():
        count = sum(len(rows) for rows in stream.with_format("arrow").iter(BLOCK))
        make_folder(path.parent)
        with atomic_file(path) as work:
            work.write_text(str(count), encoding="utf-8")
    return int(path.read_text(encoding="utf-8"))


class StreamedCorpus(Sequence[Document]):
    """The rows of a stream as documents. `block_size` consecutive rows are shuffled among
    themselves. Rows may be read in any order; reading is fast within a block and from a block to
    the next, and any other block is reached by reading what is before it."""

    def __init__(self, source: HubStream, stream: Any, size: int, column: str, shown: str) -> None:
        self.source, self.stream, self.size = source, stream, size
        self.column, self.shown, self.block_size = column, shown, BLOCK
        self.rows: dict[int, dict[str, Any]] = {}  # of the last two blocks
        self.iterator: Iterator[dict[str, Any]] = iter(())
        self.position = size  # number of the row that the iterator yields next

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        if not -self.size <= i < self.size:
            raise IndexError(i)
        number = i % self.size
        fields = self.source.reading(lambda: self._row(number))
        source = f"{self.shown}: row {number + 1}"
        if isinstance(fields[self.column], list):
            return chat(fields, source, self.column)
        return Document(text_field(fields, self.column, source), source)

    def _row(self, number: int) -> dict[str, Any]:
        start = number // self.block_size * self.block_size
        if number not in self.rows and not start <= self.position <= number:
            self.iterator, self.position = iter(self.stream.skip(start)), start
        while number not in self.rows:
            row = next(self.iterator, None)
            if row is None:
                raise ConfigError(
                    f"corpus {self.source.name}: the dataset states {self.size} rows, its files "
                    f"have {self.position}"
                )
            if self.position % self.block_size == 0:
                least = self.position - self.block_size
                self.rows = {n: r for n, r in self.rows.items() if least <= n < self.position}
            self.rows[self.position] = row
            self.position += 1
        return self.rows[number]

    def has_messages(self) -> bool:
        """Whether the first row is a conversation."""
        row = self.source.reading(lambda: self._row(0)) if self.size else {self.column: None}
        return isinstance(row[self.column], list)
