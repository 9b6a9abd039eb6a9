"""What is left of a JSON object without its faulty fields, so that the rest can be looked at
too."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from uiollms.files.errors import ConfigError, forgiving

Model = TypeVar("Model", bound=BaseModel)

# In the place of a faulty field that has no default: values that no other check objects to.
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
    """The error of a JSON value that is no `model`, and behind its lines those of the faults that
    `check` finds in what can be used of the value."""
    lines = str(error).splitlines()
    rest = usable_part(model, value) if check else None
    if check and rest is not None:
        try:
            check(rest)
        except ConfigError as more:
            lines += str(more).splitlines()
    return ConfigError("\n".join(dict.fromkeys(lines)))


def usable_part(model: type[Model], value: Any) -> Model | None:
    """A JSON value without its faulty fields, which have their defaults or stand-ins instead; None
    where one of them has neither."""
    value = copy.deepcopy(value)
    with forgiving():
        while True:
            try:
                return model.model_validate_json(json.dumps(value))
            except ValidationError as error:
                if not all(mend(value, fault["loc"]) for fault in error.errors()):
                    return None


def mend(value: Any, location: tuple[str | int, ...]) -> bool:
    """Take the deepest field that a fault's location names out of a JSON value, or put its stand-in
    there; whether that could be done."""
    holder: Any = None
    key: Any = None
    for part in location:
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif isinstance(value, dict) and part in value:
            holder, key, value = value, part, value[part]
        elif isinstance(value, dict) and part in STAND_INS:  # a field that is not there
            holder, key = value, part
            break
        else:  # such as the name of a union's member
            break
    if holder is None:
        return False
    if key in STAND_INS and holder.get(key) != STAND_INS[key]:
        holder[key] = STAND_INS[key]
    else:
        del holder[key]
    return True
