"""Remove the faulty fields of a JSON object, so that the remaining fields can be checked too."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from uiollms.files.errors import ConfigError, ignoring_faults

Model = TypeVar("Model", bound=BaseModel)

# Values for faulty fields without a default; they pass all other checks.
STAND_INS = {
    "device_map": "cpu",
    "eval": 1,
    "max_lr": 1e-4,
    "model_dtype": "fp32",
    "save": 1,
    "tbptt": 1,
    "train_iters": 2**30,
}


def with_other_faults(
    error: ConfigError, model: type[Model], value: Any, check: Callable[[Model], object] | None
) -> ConfigError:
    """Returns `error`, which parsing `value` as a `model` raised, extended by the faults that
    `check` finds in the usable part of the value."""
    lines = str(error).splitlines()
    rest = usable_part(model, value) if check else None
    if check and rest is not None:
        try:
            check(rest)
        except ConfigError as more:
            lines += str(more).splitlines()
    return ConfigError("\n".join(dict.fromkeys(lines)))


def usable_part(model: type[Model], value: Any) -> Model | None:
    """Parses a JSON value whose faulty fields are replaced by their defaults or stand-ins. Returns
    None if a faulty field has neither."""
    value = copy.deepcopy(value)
    with ignoring_faults():
        while True:
            try:
                return model.model_validate_json(json.dumps(value))
            except ValidationError as error:
                if not all(remove_fault(value, fault["loc"]) for fault in error.errors()):
                    return None


def remove_fault(value: Any, location: tuple[str | int, ...]) -> bool:
    """Removes the deepest field that a fault's location names from a JSON value, in place, or
    replace it by its stand-in. Returns whether there was such a field."""
    holder: Any = None
    key: Any = None
    for part in location:
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif isinstance(value, dict) and part in value:
            holder, key, value = value, part, value[part]
        elif isinstance(value, dict) and part in STAND_INS:  # a missing field
            holder, key = value, part
            break
        else:  # such as the name of a union member
            break
    if holder is None:
        return False
    if key in STAND_INS and holder.get(key) != STAND_INS[key]:
        holder[key] = STAND_INS[key]
    else:
        del holder[key]
    return True
