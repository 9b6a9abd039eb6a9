"""The file format of a memory (`.mem`): a safetensors file, whose metadata contains a header with a
checksum of the whole file.

Shapes: L layers, C chunks, m num_memory, D hidden size, p tokens that do not fill a chunk, l
chunk_size.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from uiollms.config.corpora import Checked
from uiollms.config.load import parse
from uiollms.files.atomic import atomic_file, make_folder
from uiollms.files.errors import ConfigError, shortened
from uiollms.files.json_files import loads
from uiollms.files.reading import check_tree
from uiollms.model.fingerprint import Fingerprint
from uiollms.weights.fitness import not_finite

OLD_FORMAT: Literal["uiollms memory 1"] = "uiollms memory 1"  # of version 0.1
FORMAT: Literal["uiollms memory 2"] = "uiollms memory 2"
NO_CHECKSUM = "0" * 64  # its value in the header while the checksum is computed
CHECKSUM_FIELD = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
LONGEST_NAME = 60  # characters of a document's name in a message
LONGEST_HEADER = 100 * 2**20  # bytes; the limit of safetensors
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DAMAGED = "damaged: not the bytes that were written (sha256); copy it, or compress the text, again"
NOT_A_MEMORY = "a safetensors file, but not a memory made by `compress`"


class Source(Checked):
    """A document that a memory contains."""

    name: str
    num_tokens: Annotated[int, Field(ge=0, lt=2**63)]

    @property
    def display_name(self) -> str:
        """The name in quotes, safe for a terminal: unprintable characters are escaped, and a long
        name is cut."""
        cut = self.name if len(self.name) <= LONGEST_NAME else f"{self.name[:LONGEST_NAME]}.."
        return repr(cut)


class Header(Checked):
    """What a file contains besides tensors. sha256: the checksum of the whole file, computed with
    zeros in place of the checksum itself."""

    format: Literal["uiollms memory 1", "uiollms memory 2"]
    made_by: Fingerprint
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    sha256: str = ""


# ---- writing -------------------------------------------------------------------------------------


def write_memory(
    path: Path, tensors: Mapping[str, Tensor], made_by: Fingerprint, sources: Sequence[Source]
) -> None:
    """Writes a file with its checksum. If it fails, a file that was at `path` stays as it was."""
    header = Header(format=FORMAT, made_by=made_by, sources=tuple(sources), sha256=NO_CHECKSUM)
    data = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={"uiollms": header.model_dump_json()},
    )
    end = 8 + int.from_bytes(data[:8], "little")
    start, rest = data[:end], memoryview(data)[end:]
    field = CHECKSUM_FIELD.search(start)
    assert field
    make_folder(path.parent)
    with atomic_file(path) as work, work.open("wb") as file:
        file.write(start[: field.start(1)] + checksum(start, [rest]).encode())
        file.write(start[field.end(1) :])
        file.write(rest)


# ---- reading -------------------------------------------------------------------------------------


def read_memory(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Returns the header and the tensors of a file. Raises ConfigError for a file that is no memory
    or has another checksum, and for NaN or infinite numbers."""
    try:
        check_tree(path)  # opening a named pipe would wait for a writer
        with path.open("rb") as file:
            start, header_text = read_start(file, path)
            found = checksum(start, iter(partial(file.read, 2**20), b""))
        header = parse_header(header_text, path, damaged=written_checksum(start) != found)
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # safetensors raises errors of many kinds for a foreign file
        raise not_readable(path, error) from None
    if not_finite((name, t) for name, t in tensors.items() if t.dtype in FLOATS):
        raise ConfigError(
            f"{path}: the memory holds NaN or infinite numbers; compress the text again"
        )
    if header.format == FORMAT and found != header.sha256:
        raise ConfigError(f"{path}: {DAMAGED}")
    if tensors.keys() - {"chunk_ids"} != {"slots", "open_ids"}:
        raise ConfigError(f"{path}: {NOT_A_MEMORY}")
    return header, tensors


def read_start(file: BinaryIO, path: Path) -> tuple[bytes, str]:
    """Reads all bytes before the tensors. Returns them and the text of the header in them. Raises
    ConfigError for a foreign file, without reading more of it."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    try:
        if len(first) < 8 or length > LONGEST_HEADER:
            raise ValueError("no safetensors header")
        start = first + file.read(length)
        metadata = json.loads(start[8:]).get("__metadata__")
    except (ValueError, AttributeError, RecursionError) as error:
        raise not_readable(path, error) from None
    header_text = metadata.get("uiollms") if isinstance(metadata, dict) else None
    if not isinstance(header_text, str):
        raise ConfigError(f"{path}: {NOT_A_MEMORY}")
    return start, header_text


def parse_header(text: str, path: Path, damaged: bool) -> Header:
    """Returns the header. If the file is damaged, which its checksum shows, that is the error, and
    not what is wrong with the header."""
    try:
        header = parse(Header, loads(text, f"{path}: header"), path)
    except (ValueError, RecursionError) as error:
        if damaged:
            raise ConfigError(f"{path}: {DAMAGED}") from None
        if isinstance(error, ConfigError):
            raise
        raise not_readable(path, error) from None
    if (header.format == FORMAT) != bool(header.sha256):
        raise ConfigError(f"{path}: {DAMAGED}")
    return header


def not_readable(path: Path, error: Exception) -> ConfigError:
    """Returns an error of one line. The message of `error` may contain bytes of the file, so it is
    escaped and shortened."""
    reason = shortened(ascii(str(error))[1:-1], 200)
    return ConfigError(f"{path}: not a memory, or damaged ({reason})")


# ---- the checksum --------------------------------------------------------------------------------


def checksum(start: bytes, rest: Iterable[bytes | memoryview]) -> str:
    """Computes the SHA-256 of a file with zeros in place of the checksum in its header. start: the
    bytes before the tensors. rest: the bytes after them, in parts. Returns "" if the header has no
    checksum."""
    field = CHECKSUM_FIELD.search(start)
    if field is None:
        return ""
    sha256 = hashlib.sha256(start[: field.start(1)] + NO_CHECKSUM.encode() + start[field.end(1) :])
    for part in rest:
        sha256.update(part)
    return sha256.hexdigest()


def written_checksum(start: bytes) -> str:
    """Returns the checksum in the header of a file, or "" if there is none."""
    field = CHECKSUM_FIELD.search(start)
    return field[1].decode() if field else ""
