"""Results read again: what a summary in test.json or metrics.jsonl says, checked."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uiollms.evaluation.statistics import Estimate
from uiollms.files.errors import json_path

# What a result is of, as it is stored; files of earlier versions lack the last two.
FIRST = ("task", "task_type", "truncation", "chunk_size", "protocol")
ABOUT = (*FIRST, "num_memory", "corpus_version")
SIZES = ("truncation", "chunk_size", "num_memory")
MOST_POSITIONS = 2**40


def checked_about(found: dict[str, Any]) -> list[Any]:
    """The values of `ABOUT`, of the types that a result has. Raises KeyError, ValueError."""
    about = {key: found[key] if key in FIRST else found.get(key) for key in ABOUT}
    optional = ("truncation", "protocol", "num_memory", "corpus_version")
    for key, value in about.items():
        fits = whole_number(value) if key in SIZES else isinstance(value, str)
        if not fits and not (value is None and key in optional):
            raise ValueError(f"{key} is {value!r}, no {key} of a result")
    return list(about.values())


def checked_estimate(summary: dict[str, Any], name: str) -> Estimate | None:
    """A summary's number with its interval; older ones have none, or a number without one. Raises
    ValueError for what is no such pair."""
    value, interval = summary.get(name), summary.get(f"{name}_interval_95")
    if value is None or interval is None:
        return None
    try:
        low, high = interval
        return Estimate(float(value), (float(low), float(high)))
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r} ({interval!r}), no {name} of a result") from None


Pair = tuple[float | None, float | None]


class Bucket(BaseModel):
    """Of by_position."""

    start: Annotated[int, Field(gt=0, lt=MOST_POSITIONS)]
    stop: Annotated[int, Field(gt=1, lt=MOST_POSITIONS)]
    perplexity: float | None


class AtDepth(BaseModel):
    depth: float
    accuracy: float


class Copy(BaseModel):
    """pieces: a text piece by piece, true for one whose tokens are right; right: how many tokens
    are."""

    pieces: list[tuple[str, bool]]
    right: int


class Written(BaseModel):
    """A chunk of so many tokens, told by memory alone. alone: what the model writes down of it,
    whose tokens are right where the original has them in the same order; guided: its guess of
    every token behind the true ones before it."""

    original: str
    tokens: int
    alone: Copy
    guided: Copy


class Numbers(BaseModel):
    """A mode's numbers that are shown when a summary is read again, each where it is there."""

    model_config = ConfigDict(extra="allow")

    documents: int
    perplexity: float | None = None
    nll: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    bleu4: float | None = None
    rouge_l: float = 0.0
    token_accuracy: float = 0.0
    document_mean: float | None = None
    interval_95: Pair | None = None
    nll_interval_95: Pair | None = None
    loss_interval_95: Pair | None = None
    accuracy_interval_95: Pair | None = None
    document_mean_interval_95: Pair | None = None
    by_position: list[Bucket] = []
    by_depth: list[AtDepth] = []
    written: Written | None = None


def checked_numbers(numbers: dict[str, Any], mode: str) -> dict[str, Any]:
    """A mode's numbers as they are. Raises ValueError that names one of another type than it
    has."""
    try:
        Numbers.model_validate_json(json.dumps(numbers), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{mode}.{json_path(fault['loc'])}: {fault['msg']}") from None
    return numbers


def whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST_POSITIONS
