"""What was measured on a task: numbers with intervals, in one form for all kinds of tasks.

    text       perplexity and language modeling: perplexity, also by position and by chunk
    loss       question answering, beacons, news, memory utilization: mean loss over scored tokens
               (KL where training has it)
    copy       auto encoding, longdata copy: BLEU-4, ROUGE-L and token accuracy of the free-running
               copy
    retrieval  passkey, needle: share of right answers, also by depth

Shapes: T' scored tokens of a document.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from uiollms.config.corpora import COPY_TASKS, RETRIEVAL_TASKS, TEXT_TASKS
from uiollms.evaluation.statistics import Estimate, difference, share_recovered
from uiollms.evaluation.summaries import checked_about, checked_estimate, checked_numbers

Item = TypeVar("Item")


# What memory is worth against its controls, as attributes of a result and keys of its summary.
ESTIMATES = ("bound", "below_window", "below_recent", "recovered")


@dataclass(frozen=True, eq=False)
class DocumentScore:
    """One document in one mode. nll, loss [T'] float32 in nats, without and with the teacher's
    share; positions [T'] int64; texts: (reference, generated) pairs; written: the first chunk's,
    see summaries.py; hits: of how many (right, all) tokens generated freely; correct, depth: of
    a retrieval trial."""

    nll: Tensor
    loss: Tensor
    positions: Tensor
    texts: tuple[tuple[str, str], ...] = ()
    written: dict[str, Any] | None = None
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
    """One task, and for text one protocol. scores: mode -> the number of a document within the
    task -> its score; a mode may lack documents ("shuffled", where no other document is long
    enough). num_memory: slots of its chunks, None where an older file does not say;
    corpus_version: which of several states of its corpus was read."""

    name: str
    task_type: str
    truncation: int | None
    chunk_size: int
    protocol: str | None
    num_memory: int | None = None
    corpus_version: str | None = None
    scores: dict[str, dict[int, DocumentScore]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        if self.task_type in TEXT_TASKS:
            return "text"
        return (
            "copy"
            if self.task_type in COPY_TASKS
            else "retrieval"
            if self.task_type in RETRIEVAL_TASKS
            else "loss"
        )

    @property
    def about(self) -> tuple[str | int | None, ...]:
        """The values of `ABOUT`."""
        what = self.name, self.task_type, self.truncation, self.chunk_size, self.protocol
        return *what, self.num_memory, self.corpus_version

    @property
    def main(self) -> tuple[str, str, str]:
        """The number that stands for the task: its key in a mode's numbers, its interval's, its
        name."""
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
    def size(self) -> str:
        """256 / 32: tokens and slots of a chunk."""
        return f"{self.chunk_size} / {self.num_memory}" if self.num_memory else f"{self.chunk_size}"

    @property
    def title(self) -> str:
        """perplexity (paper) of sotu.test; perplexity (paper) of stdlib.test (Python 3.12.3)"""
        protocol = f" ({self.protocol})" if self.protocol else ""
        version = f" ({self.corpus_version})" if self.corpus_version else ""
        return f"{self.task_type}{protocol} of {self.name}{version}"

    @cached_property
    def modes(self) -> dict[str, dict[str, Any]]:
        """Mode -> its numbers: plain values for JSON. Losses are in nats per scored token,
        intervals are 95 % and come from resampled documents (BLEU-4 has none), shares are 0 to
        1, BLEU-4 is 0 to 100."""
        return {
            mode: self.measure(list(scores.values()))
            for mode, scores in self.scores.items()
            if scores
        }

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
            measured["document_mean_loss_interval_95"] = bootstrap(
                [loss for loss, _ in losses], mean
            )
        if self.kind == "retrieval":
            right = [float(d.correct) for d in documents]
            measured["accuracy"], measured["accuracy_interval_95"] = (
                mean(right),
                bootstrap(right, mean),
            )
            depths = {
                depth: [float(d.correct) for d in documents if d.depth == depth]
                for depth in [d.depth for d in documents]
            }
            measured["by_depth"] = [
                {"depth": d, "trials": len(r), "accuracy": mean(r)} for d, r in depths.items()
            ]
        if self.kind == "copy":
            hits = [d.hits for d in documents]
            measured["token_accuracy"] = sum(right for right, _ in hits) / sum(
                count for _, count in hits
            )
            measured["written"] = documents[0].written
            measured["bleu4"] = bleu4([pair for d in documents for pair in d.texts])
        if any(d.texts for d in documents):
            rouge = [rouge_l(d.texts) for d in documents]
            measured["rouge_l"], measured["rouge_l_interval_95"] = (
                mean(rouge),
                bootstrap(rouge, mean),
            )
        return measured

    @cached_property
    def bound(self) -> Estimate | None:
        """See controls.py; None where nothing was shuffled."""
        return self.below("shuffled")

    @cached_property
    def below_window(self) -> Estimate | None:
        return self.below("window")

    @cached_property
    def below_recent(self) -> Estimate | None:
        return self.below("recent")

    def below(self, mode: str) -> Estimate | None:
        """NLL of a mode less that with memory, in nats a token; None where it was not evaluated."""
        pair = self.nlls(mode, "memory")
        return difference(*pair) if pair else None

    @cached_property
    def recovered(self) -> Estimate | None:
        """See controls.py; None without window and raw context."""
        three = self.nlls("window", "memory", "raw")
        return share_recovered(*three) if three else None

    def nlls(self, *modes: str) -> list[dict[int, Tensor]] | None:
        """The documents' NLLs in each of the modes; None where it was not evaluated in all."""
        if not all(self.scores.get(mode) for mode in modes):
            return None
        return [{i: d.nll for i, d in self.scores[mode].items()} for mode in modes]

    @classmethod
    def from_summary(cls, summary: dict[str, Any]) -> TaskResult:
        """A result with the numbers that `summary` wrote, and without its documents. Raises
        KeyError, ValueError for other JSON."""
        result = cls(*checked_about(summary))
        for name in ESTIMATES:
            setattr(result, name, checked_estimate(summary, name))
        modes = {key: value for key, value in summary.items() if isinstance(value, dict)}
        result.modes = {mode: checked_numbers(numbers, mode) for mode, numbers in modes.items()}
        return result

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; mean, max and min of the documents' perplexities as the
        released program reports them."""
        perplexities = [exp(d.mean_nll) for d in self.scores["memory"].values()]
        return {
            "task": self.name,
            "task_type": self.task_type,
            "protocol": self.protocol,
            "truncation": self.truncation,
            "chunk_size": self.chunk_size,
            "num_memory": self.num_memory,
            "corpus_version": self.corpus_version,
            "documents": len(perplexities),
            "scored_tokens": sum(len(d.nll) for d in self.scores["memory"].values()),
            "mean": mean(perplexities),
            "max": max(perplexities),
            "min": min(perplexities),
            **self.modes,
        } | {
            key: value
            for name in ESTIMATES
            for key, value in written(name, getattr(self, name)).items()
        }


def written(name: str, found: Estimate | None) -> dict[str, Any]:
    """An estimate as a summary has it, null where there is none."""
    value, interval = found or (None, None)
    return {name: value, f"{name}_interval_95": interval}


def exp(nll: float) -> float:
    """The perplexity of a mean NLL; past 709.78 nats, where a float ends, infinite (null in
    JSON, which has the NLL beside it)."""
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
    items: Sequence[Item],
    statistic: Callable[[Sequence[Item]], float],
    level: float = 0.95,
    draws: int = 1000,
) -> tuple[float, float]:
    """Percentile interval of a statistic of the documents, resampled with replacement (seed 0)."""
    rng = random.Random(0)
    found = sorted(statistic(rng.choices(items, k=len(items))) for _ in range(draws))
    tail = int((1 - level) / 2 * draws)
    return found[tail], found[-1 - tail]


def by_position(documents: Sequence[DocumentScore]) -> list[dict[str, Any]]:
    """Tokens of all documents in buckets between powers of two: position 1, 2-3, 4-7, 8-15 ...
    Empty buckets are left out."""
    groups = (
        torch.cat([d.positions for d in documents]).double().log2().floor().long()
    )  # exact: powers of two are
    return [
        {"start": 2**g, "stop": 2 ** (g + 1), **numbers}
        for g, numbers in grouped(groups, documents)
    ]


def by_chunk(documents: Sequence[DocumentScore], chunk_size: int) -> list[dict[str, Any]]:
    """By the chunk that a token is predicted from, which is also the number of memories read
    (with the document protocol a chunk's first token is predicted from the chunk before it)."""
    groups = (torch.cat([d.positions for d in documents]) - 1) // chunk_size
    return [{"chunk": g, **numbers} for g, numbers in grouped(groups, documents)]


def by_length(documents: Sequence[DocumentScore]) -> list[dict[str, Any]]:
    """What documents of only their first L tokens would have: for powers of two L, and for the
    longest document's length, over the documents that are so long."""
    lengths = [int(d.positions.max()) + 1 for d in documents]
    found = []
    for length in [
        *(2**g for g in range(1, max(lengths).bit_length()) if 2**g < max(lengths)),
        max(lengths),
    ]:
        long_enough = [d for d, own in zip(documents, lengths, strict=True) if own >= length]
        nll = torch.cat([d.nll[d.positions < length] for d in long_enough]).double()
        if len(nll):
            average = nll.mean().item()
            numbers = {
                "documents": len(long_enough),
                "tokens": len(nll),
                "nll": average,
                "perplexity": exp(average),
            }
            found.append({"length": length, **numbers})
    return found


def grouped(
    groups: Tensor, documents: Sequence[DocumentScore]
) -> Iterable[tuple[int, dict[str, Any]]]:
    """groups [all scored tokens]: the group of each -> (group, its token count, mean NLL and
    perplexity)."""
    nll = torch.cat([d.nll for d in documents]).double()
    counts = torch.bincount(groups)
    sums = torch.bincount(groups, weights=nll)
    for group in counts.nonzero().squeeze(1).tolist():
        average = (sums[group] / counts[group]).item()
        yield group, {"tokens": int(counts[group]), "nll": average, "perplexity": exp(average)}


def bleu4(texts: Sequence[tuple[str, str]]) -> float:
    """Corpus BLEU-4 (sacrebleu's own tokeniser and smoothing), 0 to 100, of (reference,
    generated) pairs."""
    from sacrebleu import corpus_bleu  # with nltk below, half a second that only these tasks need

    return corpus_bleu(
        [generated for _, generated in texts], [[reference for reference, _ in texts]]
    ).score


def rouge_l(texts: Sequence[tuple[str, str]]) -> float:
    """Mean F-measure of ROUGE-L (rouge-score, without stemming), 0 to 1, of (reference,
    generated) pairs."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return mean(
        [scorer.score(reference, generated)["rougeL"].fmeasure for reference, generated in texts]
    )
