"""What was measured on a task: numbers with intervals, in one form for all kinds of tasks.

    text       perplexity and language modeling: perplexity, also by position and by chunk
    loss       question answering, beacons, news, memory utilization: mean loss over scored tokens (KL where training has it)
    copy       auto encoding, longdata copy: BLEU-4, ROUGE-L and token accuracy of the free-running copy
    retrieval  passkey, needle: share of right answers, also by depth

Shapes: T' scored tokens of a document.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from uiollms.config import COPY_TASKS, RETRIEVAL_TASKS, TEXT_TASKS
from uiollms.refusals import json_path

ABOUT = ("task", "task_type", "truncation", "chunk_size", "protocol")  # what a result is of, as it is stored
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class DocumentScore:
    """One document in one mode. nll, loss [T'] float32 in nats, without and with the teacher's share; positions [T'] int64;
    texts: (reference, generated) pairs; hits: of how many (right, all) tokens generated freely; correct, depth: of a
    retrieval trial."""

    nll: Tensor
    loss: Tensor
    positions: Tensor
    texts: tuple[tuple[str, str], ...] = ()
    hits: tuple[int, int] = (0, 0)
    correct: bool = False
    depth: float = 0.0

    @cached_property
    def mean_nll(self) -> float:
        return self.nll.double().mean().item()

    @cached_property
    def mean_loss(self) -> float:
        return self.loss.double().mean().item()


@dataclass(eq=False)
class TaskResult:
    """One task, and for text one protocol. scores: mode -> the number of a document within the task -> its score; a mode may
    lack documents ("shuffled", where no other document is long enough)."""

    name: str
    task_type: str
    truncation: int | None
    chunk_size: int
    protocol: str | None
    scores: dict[str, dict[int, DocumentScore]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        if self.task_type in TEXT_TASKS:
            return "text"
        return "copy" if self.task_type in COPY_TASKS else "retrieval" if self.task_type in RETRIEVAL_TASKS else "loss"

    @property
    def about(self) -> tuple[str, str, int | None, int, str | None]:
        """The values of `ABOUT`."""
        return self.name, self.task_type, self.truncation, self.chunk_size, self.protocol

    @property
    def main(self) -> tuple[str, str, str]:
        """The number that stands for the task: its key in a mode's numbers, its interval's, its name."""
        if self.task_type == "perplexity":
            return "perplexity", "interval_95", "perplexity"
        key, name = {
            "text": ("nll", "NLL"),
            "loss": ("loss", "loss"),
            "copy": ("bleu4", "BLEU-4"),
            "retrieval": ("accuracy", "accuracy"),
        }[self.kind]
        return key, f"{key}_interval_95", name

    @property
    def title(self) -> str:
        """perplexity (paper) of sotu.test"""
        return f"{self.task_type}{f' ({self.protocol})' if self.protocol else ''} of {self.name}"

    @cached_property
    def modes(self) -> dict[str, dict[str, Any]]:
        """Mode -> its numbers: plain values for JSON. Losses are in nats per scored token, intervals are 95 % and come from
        resampled documents (BLEU-4 has none), shares are 0 to 1, BLEU-4 is 0 to 100."""
        return {mode: self.measure(list(scores.values())) for mode, scores in self.scores.items() if scores}

    def measure(self, documents: Sequence[DocumentScore]) -> dict[str, Any]:
        weighted = [(d.mean_nll, len(d.nll)) for d in documents]
        measured: dict[str, Any] = {
            "documents": len(documents),
            "nll": token_weighted(weighted),
            "nll_interval_95": bootstrap(weighted, token_weighted),
            "perplexity": exp(token_weighted(weighted)),
            "interval_95": bootstrap(weighted, lambda drawn: exp(token_weighted(drawn))),
        }
        if self.kind == "text":
            perplexities = [exp(d.mean_nll) for d in documents]
            measured["document_mean"] = mean(perplexities)
            measured["document_mean_interval_95"] = bootstrap(perplexities, mean)
            measured["by_position"] = by_position(documents)
            measured["by_chunk"] = by_chunk(documents, self.chunk_size)
        if self.kind == "loss":
            losses = [(d.mean_loss, len(d.loss)) for d in documents]
            measured["loss"] = token_weighted(losses)
            measured["loss_interval_95"] = bootstrap(losses, token_weighted)
            measured["document_mean_loss"] = mean([loss for loss, _ in losses])
            measured["document_mean_loss_interval_95"] = bootstrap([loss for loss, _ in losses], mean)
        if self.kind == "retrieval":
            right = [float(d.correct) for d in documents]
            measured["accuracy"], measured["accuracy_interval_95"] = mean(right), bootstrap(right, mean)
            depths = {depth: [float(d.correct) for d in documents if d.depth == depth] for depth in [d.depth for d in documents]}
            measured["by_depth"] = [{"depth": d, "trials": len(r), "accuracy": mean(r)} for d, r in depths.items()]
        if self.kind == "copy":
            hits = [d.hits for d in documents]
            measured["token_accuracy"] = sum(right for right, _ in hits) / sum(count for _, count in hits)
            measured["bleu4"] = bleu4([pair for d in documents for pair in d.texts])
        if any(d.texts for d in documents):
            rouge = [rouge_l(d.texts) for d in documents]
            measured["rouge_l"], measured["rouge_l_interval_95"] = mean(rouge), bootstrap(rouge, mean)
        return measured

    @property
    def recovered(self) -> float | None:
        """(window - memory) / (window - raw) of the perplexities: the share of what raw context wins that memory wins too.
        None where one of them is past what a float holds."""
        if self.kind != "text" or not {"window", "raw"} <= self.modes.keys():
            return None
        window, memory, raw = (self.modes[mode]["perplexity"] for mode in ("window", "memory", "raw"))
        if not all(value is not None and math.isfinite(value) for value in (window, memory, raw)):
            return None
        return (window - memory) / (window - raw) if window != raw else None

    @classmethod
    def from_summary(cls, summary: dict[str, Any]) -> TaskResult:
        """A result with the numbers that `summary` wrote, and without its documents. Raises KeyError, ValueError for other
        JSON."""
        result = cls(*checked_about(summary))
        modes = {key: value for key, value in summary.items() if isinstance(value, dict)}
        result.modes = {mode: checked_numbers(numbers, mode) for mode, numbers in modes.items()}
        return result

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; mean, max and min of the documents' perplexities as the released program reports them."""
        perplexities = [exp(d.mean_nll) for d in self.scores["memory"].values()]
        return {
            "task": self.name,
            "task_type": self.task_type,
            "protocol": self.protocol,
            "truncation": self.truncation,
            "chunk_size": self.chunk_size,
            "documents": len(perplexities),
            "scored_tokens": sum(len(d.nll) for d in self.scores["memory"].values()),
            "mean": mean(perplexities),
            "max": max(perplexities),
            "min": min(perplexities),
            **self.modes,
            "recovered": self.recovered,
        }


def exp(nll: float) -> float:
    """The perplexity of a mean NLL; past 709.78 nats, where a float ends, infinite (null in JSON, which has the
    NLL beside it)."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def token_weighted(documents: Sequence[tuple[float, int]]) -> float:
    """(mean, tokens) of every document -> the mean over all tokens."""
    total = sum(count for _, count in documents)
    return sum(value * count for value, count in documents) / total


def bootstrap(
    items: Sequence[Item], statistic: Callable[[Sequence[Item]], float], level: float = 0.95, draws: int = 1000
) -> tuple[float, float]:
    """Percentile interval of a statistic of the documents, resampled with replacement (seed 0)."""
    rng = random.Random(0)
    found = sorted(statistic(rng.choices(items, k=len(items))) for _ in range(draws))
    tail = int((1 - level) / 2 * draws)
    return found[tail], found[-1 - tail]


def by_position(documents: Sequence[DocumentScore]) -> list[dict[str, Any]]:
    """Tokens of all documents in buckets between powers of two: position 1, 2-3, 4-7, 8-15 ... Empty buckets are left out."""
    groups = torch.cat([d.positions for d in documents]).double().log2().floor().long()  # exact: powers of two are
    return [{"start": 2**g, "stop": 2 ** (g + 1), **numbers} for g, numbers in grouped(groups, documents)]


def by_chunk(documents: Sequence[DocumentScore], chunk_size: int) -> list[dict[str, Any]]:
    """By the chunk that a token is predicted from, which is also the number of memories read (with the document protocol a
    chunk's first token is predicted from the chunk before it)."""
    groups = (torch.cat([d.positions for d in documents]) - 1) // chunk_size
    return [{"chunk": g, **numbers} for g, numbers in grouped(groups, documents)]


def by_length(documents: Sequence[DocumentScore]) -> list[dict[str, Any]]:
    """What documents of only their first L tokens would have: for powers of two L, and for the longest document's length, over
    the documents that are so long."""
    lengths = [int(d.positions.max()) + 1 for d in documents]
    found = []
    for length in [*(2**g for g in range(1, max(lengths).bit_length()) if 2**g < max(lengths)), max(lengths)]:
        long_enough = [d for d, own in zip(documents, lengths, strict=True) if own >= length]
        nll = torch.cat([d.nll[d.positions < length] for d in long_enough]).double()
        if len(nll):
            average = nll.mean().item()
            numbers = {"documents": len(long_enough), "tokens": len(nll), "nll": average, "perplexity": exp(average)}
            found.append({"length": length, **numbers})
    return found


def grouped(groups: Tensor, documents: Sequence[DocumentScore]) -> Iterable[tuple[int, dict[str, Any]]]:
    """groups [all scored tokens]: the group of each -> (group, its token count, mean NLL and perplexity)."""
    nll = torch.cat([d.nll for d in documents]).double()
    counts = torch.bincount(groups)
    sums = torch.bincount(groups, weights=nll)
    for group in counts.nonzero().squeeze(1).tolist():
        average = (sums[group] / counts[group]).item()
        yield group, {"tokens": int(counts[group]), "nll": average, "perplexity": exp(average)}


def bleu4(texts: Sequence[tuple[str, str]]) -> float:
    """Corpus BLEU-4 (sacrebleu's own tokeniser and smoothing), 0 to 100, of (reference, generated) pairs."""
    from sacrebleu import corpus_bleu  # with nltk below, half a second that only these tasks need

    return corpus_bleu([generated for _, generated in texts], [[reference for reference, _ in texts]]).score


def rouge_l(texts: Sequence[tuple[str, str]]) -> float:
    """Mean F-measure of ROUGE-L (rouge-score, without stemming), 0 to 1, of (reference, generated) pairs."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return mean([scorer.score(reference, generated)["rougeL"].fmeasure for reference, generated in texts])


MOST_POSITIONS = 2**40


def checked_about(found: dict[str, Any]) -> list[Any]:
    """The values of `ABOUT`, of the types that a result has. Raises KeyError, ValueError."""
    name, task_type, truncation, chunk_size, protocol = values = [found[key] for key in ABOUT]
    kinds = [isinstance(name, str), isinstance(task_type, str), protocol is None or isinstance(protocol, str)]
    sizes = [truncation is None or whole_number(truncation), whole_number(chunk_size)]
    if wrong := [key for key, right in zip((*ABOUT[:2], ABOUT[4], *ABOUT[2:4]), kinds + sizes, strict=True) if not right]:
        raise ValueError(f"{wrong[0]} is {found[wrong[0]]!r}, no {wrong[0]} of a result")
    return values


Pair = tuple[float | None, float | None]


class Bucket(BaseModel):
    """Of by_position."""

    start: Annotated[int, Field(gt=0, lt=MOST_POSITIONS)]
    stop: Annotated[int, Field(gt=1, lt=MOST_POSITIONS)]
    perplexity: float | None


class AtDepth(BaseModel):
    depth: float
    accuracy: float


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


def checked_numbers(numbers: dict[str, Any], mode: str) -> dict[str, Any]:
    """A mode's numbers as they are. Raises ValueError that names one of another type than it has."""
    try:
        Numbers.model_validate_json(json.dumps(numbers), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{mode}.{json_path(fault['loc'])}: {fault['msg']}") from None
    return numbers


def whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST_POSITIONS
