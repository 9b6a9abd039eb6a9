"""Hostile versions of good files, drawn with a seeded generator."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
from pathlib import Path
from random import Random
from typing import Any

SPECIAL = ["pipe", "folder", "zero", "null", "socket", "loop", "nothing", "sparse", "empty"]
TEXTS = [
    "",
    ".",
    "..",
    "cpu",
    "auto",
    "files:[",
    "files:**",
    "**",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 300,
]
TEXTS += [
    "x" * 100_000,
    "%s{}$HOME",
    "ü東京 [v1]",
    "\u202e",
    "\x1b[31mred",
    "nan",
    "1e999",
    "pipe",
    "zero",
    "loop",
]
NUMBERS = [-(10**30), -1, 0, 1, 2, 3, 128, 10**9, 2**31, 2**32, 2**63 - 1, 2**63, 10**30]
NUMBERS += [0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e30, 1e308, float("inf"), float("nan")]
# Values that some field accepts, so that a wrong config passes the first check and reaches the
# model, the data and the disk.
WORDS = [
    "auto",
    "cpu",
    "sdpa",
    "fp64",
    "bf16",
    "fp16",
    "uio",
    "tbptt",
    "exact",
    "importance",
    "document",
    "paper",
]
WORDS += [
    "random",
    "start",
    "full",
    "first",
    "window",
    "raw",
    "shuffled",
    "ccf",
    "base",
    "memory.json",
    "out/ckp",
]
WORDS += [
    "files:lines.jsonl",
    "files:*.txt",
    "files:rows.parquet",
    "files:**/*.gz",
    "minipile copy 256.train",
    "sotu.test",
]
WORDS += [
    "passkey",
    "needle",
    "auto encoding",
    "longdata copy",
    "question answering",
    "memory utilization",
    "out",
]
MILD = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    16,
    24,
    32,
    48,
    50,
    60,
    96,
    100,
    128,
    0.1,
    0.25,
    0.9,
    1e-3,
    1.5,
    True,
    False,
    None,
]
RAW = [
    "1" * 5000,
    "-" + "9" * 400,
    "1e999",
    "0x10",
    "1.",
    "[" * 1000 + "]" * 1000,
    "[" * 99 + "]" * 99,
]
RAW += [
    '{"a":' * 200 + "1" + "}" * 200,
    "[" * 100_000,
    "nul",
    "'a'",
    '"\\ud800"',
    '"\\u0000"',
    "// no",
    ",",
    "",
]


def any_value(rng: Random, depth: int = 0) -> Any:
    if rng.random() < 0.5:
        mild = rng.choice([WORDS, MILD, MILD])
        return rng.choice([rng.choice(mild)] * 4 + [[rng.choice(mild)]])
    kind = rng.choice(["text", "number", "number", "raw", "word", "list", "object"])
    if kind == "list" and depth < 3:
        return [any_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind == "object" and depth < 3:
        return {
            rng.choice([*TEXTS[:10], "a"]): any_value(rng, depth + 1)
            for _ in range(rng.randint(0, 2))
        }
    if kind == "raw":
        return f"@raw{rng.randrange(len(RAW))}@"
    return rng.choice({"text": TEXTS, "number": NUMBERS}.get(kind, [None, True, False]))


def paths_in(value: Any, path: tuple = ()) -> list[tuple]:
    """Returns the path of every value within nested objects and lists."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    found = []
    for key, inner in items:
        found += [(*path, key), *paths_in(inner, (*path, key))]
    return found


def mutate_json(rng: Random, good: Any, fixed: tuple[str, ...] = ()) -> str:
    """Returns the text of a JSON value with one or two changes. Values at keys in `fixed` stay.
    They are the paths to which a run writes, and what makes a run long."""
    value = copy.deepcopy(good)
    for _ in range(rng.choice([1, 1, 1, 2])):
        free = [path for path in paths_in(value) if not set(path) & set(fixed)]
        if not free:
            break
        path = rng.choice(free)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        how = rng.choice(["replace", "replace", "replace", "delete", "rename", "add"])
        if how == "replace":
            parent[path[-1]] = any_value(rng)
        elif how == "delete":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            name = rng.choice([*TEXTS, "schema", "seed ", path[-1].upper()])
            parent[name] = parent.pop(path[-1]) if how == "rename" else any_value(rng)
        else:
            parent.append(any_value(rng) if rng.random() < 0.5 else copy.deepcopy(parent[0]))
    return to_text(value)


def to_text(value: Any) -> str:
    text = json.dumps(value, indent=1)
    return re.sub(r'"@raw(\d+)@"', lambda match: RAW[int(match[1])], text)


def repeat_key(rng: Random, good: Any) -> str:
    """Returns the text of a JSON value in which one key is written twice in its object."""
    text = json.dumps(good, indent=1)
    match = rng.choice(list(re.finditer(r'("[^"\n]+"): ', text)))
    return (
        f"{text[: match.start()]}{match[1]}: {rng.choice(['1', 'null', '[]'])}, "
        f"{text[match.start() :]}"
    )


def mutate_bytes(rng: Random, good: bytes) -> bytes:
    """Returns the bytes with one to three changes: flipped bits, written, removed or doubled bytes,
    a removed end, another encoding, zeros, deep nesting or long numbers."""
    data = bytearray(good)
    for _ in range(rng.choice([1, 1, 2, 3])):
        start = rng.randrange(len(data) + 1)
        how = rng.choice(
            [
                "flip",
                "flip",
                "write",
                "cut",
                "end",
                "double",
                "zeros",
                "mark",
                "code",
                "deep",
                "digits",
            ]
        )
        if how == "flip" and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif how == "write":
            data[start : start + 4] = rng.randbytes(rng.randint(1, 8))
        elif how == "cut":
            del data[start : start + rng.randint(1, 64)]
        elif how == "end":
            del data[start:]
        elif how == "double":
            data[start:start] = data[start : start + 64]
        elif how == "zeros":
            data[start:start] = bytes(rng.choice([1, 8, 4096]))
        elif how == "mark":
            data[:0] = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"\xef\xbb\xbf\r\n"])
        elif how == "code":
            code = rng.choice(["utf-16", "utf-32", "utf-16-be", "cp1252"])
            data = bytearray(bytes(data).decode("utf-8", "replace").encode(code, "replace"))
        elif how == "deep":
            data[start:start] = b"[" * rng.choice([99, 1000, 100_000])
        else:
            data[start:start] = b"9" * rng.choice([400, 5000])
    return bytes(data)


def mutate_tensors(rng: Random, good: bytes) -> bytes:
    """Returns a safetensors file with changes in its header, in the header's length or anywhere."""
    length = int.from_bytes(good[:8], "little")
    how = rng.choice(["bytes", "bytes", "length", "header", "header", "twice"])
    if how == "bytes":
        return mutate_bytes(rng, good)
    if how == "length":
        wrong = rng.choice([0, 1, length - 1, length + 1, len(good), 2**40, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + good[8:]
    header = json.loads(good[8 : 8 + length])
    text = mutate_json(rng, header) if how == "header" else repeat_key(rng, header)
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data + good[8 + length :]


def make_special(rng: Random, path: Path) -> str:
    """Replaces a path by something that is not a whole file. Returns the kind."""
    kind = rng.choice(SPECIAL)
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(path.name + "-away"))
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("zero", "null"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "socket":
        # The name of a socket is limited to about 100 bytes, so it is bound in its folder.
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
            os.close(here)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind in ("sparse", "empty"):
        path.touch()
        os.truncate(path, 2**41 if kind == "sparse" else 0)
    return kind
