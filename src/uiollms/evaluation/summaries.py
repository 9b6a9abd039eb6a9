"""Checks of summaries that are read again, from test.json or metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uiollms.alternatives.costs import Cost
from uiollms.evaluation.statistics import Estimate
from uiollms.files.errors import json_path

# The keys of the task that a result belongs to. Files of earlier versions lack the last two.
REQUIRED_KEYS = ("task", "task_type", "truncation", "chunk_size", "protocol")
TASK_KEYS = (*REQUIRED_KEYS, "num_memory", "corpus_version")
SIZE_KEYS = ("truncation", "chunk_size", "num_memory")
OPTIONAL_KEYS = ("truncation", "protocol", "num_memory", "corpus_version")
MAX_POSITIONS = 2**40


def checked_task(found: Mapping[str, Any]) -> list[Any]:
    """The values of `TASK_KEYS`, with the types that a result has. Raises KeyError for a missing
    key, ValueError for a value of another type."""
    task = {key: found[key] if key in REQUIRED_KEYS else found.get(key) for key in TASK_KEYS}
    for key, value in task.items():
        fits = whole_number(value) if key in SIZE_KEYS else isinstance(value, str)
        if not fits and not (value is None and key in OPTIONAL_KEYS):
            raise ValueError(f"{key} is {value!r}, which is no {key} of a result")
    return list(task.values())


def checked_estimate(summary: Mapping[str, Any], name: str) -> Estimate | None:
    """A summary's number with its interval. Returns None for earlier versions, which wrote no
    number, or one without an interval. Raises ValueError for values of another type."""
    value, interval = summary.get(name), summary.get(f"{name}_interval_95")
    if value is None or interval is None:
        return None
    try:
        low, high = interval
        return Estimate(float(value), (float(low), float(high)))
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is {value!r} ({interval!r}), which is no {name} of a result"
        ) from None


Pair = tuple[float | None, float | None]


class Bucket(BaseModel):
    """One entry of by_position."""

    start: Annotated[int, Field(gt=0, lt=MAX_POSITIONS)]
    stop: Annotated[int, Field(gt=1, lt=MAX_POSITIONS)]
    perplexity: float | None


class AtDepth(BaseModel):
    """One entry of by_depth."""

    depth: float
    accuracy: float


class Copy(BaseModel):
    """A copied text. pieces: (text, whether its tokens are right) in order; right: number of right
    tokens."""

    pieces: list[tuple[str, bool]]
    right: int


class Written(BaseModel):
    """A chunk of text that the model reproduces from memory.

    tokens: number of tokens of the chunk
    alone:  the free-running copy; a token is right if the original has it in the same order
    guided: the likeliest token at every position, given the true tokens before it
    """

    original: str
    tokens: int
    alone: Copy
    guided: Copy


class Numbers(BaseModel):
    """The numbers of one mode that tables and plots show. Any of them may be missing."""

    model_config = ConfigDict(extra="allow")

    documents: int
    perplexity: float | None = None
    nll: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    bleu4: float | None = None
    rouge_l: float = 0.0
    answer_metric: str | None = None
    answer_score: float | None = None
    answer_score_interval_95: Pair | None = None
    exact_match: float | None = None
    token_f1: float | None = None
    token_accuracy: float = 0.0
    document_mean: float | None = None
    interval_95: Pair | None = None
    nll_interval_95: Pair | None = None
    loss_interval_95: Pair | None = None
    bleu4_interval_95: Pair | None = None
    accuracy_interval_95: Pair | None = None
    document_mean_interval_95: Pair | None = None
    by_position: list[Bucket] = []
    by_depth: list[AtDepth] = []
    written: Written | None = None
    cost: Cost | None = None


def checked_numbers(numbers: dict[str, Any], mode: str) -> dict[str, Any]:
    """Returns a mode's numbers unchanged. Raises ValueError that names a number of a wrong type."""
    try:
        Numbers.model_validate_json(json.dumps(numbers), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{mode}.{json_path(fault['loc'])}: {fault['msg']}") from None
    return numbers


def checked_failures(summary: Mapping[str, Any]) -> dict[str, str]:
    """The modes that were not scored, and why. Raises ValueError for values of another type."""
    found = summary.get("not_scored", [])
    try:
        failures = {entry["mode"]: entry["why"] for entry in found}
    except (KeyError, TypeError):
        failures = {"": None}
    if not all(isinstance(text, str) for pair in failures.items() for text in pair):
        raise ValueError(f"not_scored is {found!r}, which is no list of modes and reasons")
    return failures


def whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_POSITIONS
