"""The files that a glob pattern of the user matches."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator


def matching_files(pattern: str) -> list[str]:
    """Returns the files that match a glob. Brackets denote a set of letters, except where they
    belong to a name: that of an existing file, of an existing folder at the start of the pattern,
    or of any file or folder if nothing matches otherwise."""
    if os.path.isfile(pattern):
        return [pattern]
    parts = pattern.split("/")
    heads = ("/".join(parts[:n]) for n in reversed(range(1, len(parts))))
    head = next((head for head in heads if os.path.isdir(head)), "")
    tail = pattern.removeprefix(head)
    for rest in (tail, tail.replace("[", "[[]")):
        found = expand_glob(glob.escape(head) + rest)
        if paths := [path for path in found if not os.path.isdir(path)]:
            return paths
    return []


def expand_glob(pattern: str) -> list[str]:
    """Returns the paths that match a glob, in arbitrary order. `**` follows links but enters each
    folder once, because a link to a parent folder would be followed for ever."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    i = parts.index("**")
    head, tail = "/".join(parts[:i]), "/".join(parts[i + 1 :]) or "*"
    tops = glob.glob(head) if head else ["/" if i else ""]
    seen: set[tuple[int, int]] = set()
    folders = [folder for top in sorted(tops) for folder in walk_folders(top, seen)]
    return sorted(
        {
            path
            for folder in folders
            for path in expand_glob(os.path.join(glob.escape(folder), tail))
        }
    )


def walk_folders(top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Yields `top` and the folders below it, without hidden ones and those in `seen`. All yielded
    folders are added to `seen`."""
    for folder, inner, _ in os.walk(top or ".", followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            inner.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield folder if top else folder.removeprefix(".").removeprefix("/")
