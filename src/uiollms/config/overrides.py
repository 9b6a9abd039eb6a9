"""One field of a config set on the command line, `--set train.max_lr=3e-5`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uiollms.files.errors import ConfigError, shortened
from uiollms.files.json_files import DEEPEST, loads


def apply_override(value: Any, override: str, path: str | Path) -> None:
    """Set one field of a JSON object in place: "train.corpus.0.truncation=2048"."""
    key, equals, text = override.partition("=")
    shown = f"--set {shortened(override)}"
    if not equals:
        raise ConfigError(f"{shown}: expected field=value, such as train.max_lr=3e-5")
    try:
        new = loads(text, f"--set {shortened(key)}")
    except json.JSONDecodeError:
        new = text  # a bare word is a string
    *parents, last = key.split(".")
    if len(parents) >= DEEPEST:
        raise ConfigError(f"{shown}: {path} has no field so deep")
    for part in parents:
        try:
            value = value[int(part)] if isinstance(value, list) else value.setdefault(part, {})
        except (ValueError, IndexError, AttributeError):
            way = f"has no {shortened(part)!r} on the way to {shortened(key)!r}"
            raise ConfigError(f"{shown}: {path} {way}") from None
    try:
        value[int(last) if isinstance(value, list) else last] = new
    except (ValueError, IndexError, TypeError):
        raise ConfigError(f"{shown}: {path} has no {shortened(key)!r}") from None
