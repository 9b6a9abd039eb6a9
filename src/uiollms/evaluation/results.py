"""Results of evaluation tasks: `TaskScores` contains what was scored, document by document, and
`TaskSummary` the numbers with intervals that tables and JSON files show.

Every kind of task has one main number:

    text       perplexity and language modeling: perplexity or NLL, also by position and by chunk
    loss       question answering, beacons, news, memory utilization: mean loss over scored tokens
               (a KL divergence where training uses one)
    copy       auto encoding, longdata copy: BLEU-4, ROUGE-L and token accuracy of the free-running
               copy
    retrieval  passkey, needle: fraction of right answers, also by depth
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from uiollms.alternatives.costs import Cost
from uiollms.config.corpora import COPY_TASKS, RETRIEVAL_TASKS, TEXT_TASKS
from uiollms.evaluation.answer_metrics import METRICS
from uiollms.evaluation.statistics import (
    DocumentScore,
    Estimate,
    bleu4,
    bleu4_interval,
    bootstrap,
    by_chunk,
    by_position,
    difference,
    exp,
    mean,
    recovered_fraction,
    rouge_l,
    token_weighted,
)
from uiollms.evaluation.summaries import (
    checked_estimate,
    checked_failures,
    checked_numbers,
    checked_task,
)


@dataclass(frozen=True)
class ScoredTask:
    """The task that a result belongs to, and the sizes it was scored with.

    truncation:     tokens of a document, or None without a limit
    protocol:       which tokens were scored, for text tasks only
    num_memory:     memory slots of a chunk; None in files of earlier versions
    corpus_version: the state of a corpus that has several, such as "Python 3.12.3"
    """

    name: str
    task_type: str
    truncation: int | None
    chunk_size: int
    protocol: str | None
    num_memory: int | None = None
    corpus_version: str | None = None

    @property
    def kind(self) -> str:
        """One of the four kinds of the module's docstring."""
        for kind, types in {
            "text": TEXT_TASKS,
            "copy": COPY_TASKS,
            "retrieval": RETRIEVAL_TASKS,
        }.items():
            if self.task_type in types:
                return kind
        return "loss"

    @property
    def main_number(self) -> tuple[str, str, str]:
        """(its key in a mode's numbers, the key of its interval, its name in tables)"""
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
    def weighs_documents_equally(self) -> bool:
        """Whether the NLL is the mean over documents of their mean NLLs, as with Activation Beacon,
        and not the mean over tokens."""
        return self.protocol == "beacon"

    @property
    def size(self) -> str:
        """Tokens and memory slots of a chunk, such as "256 / 32"."""
        return f"{self.chunk_size} / {self.num_memory}" if self.num_memory else f"{self.chunk_size}"

    @property
    def title(self) -> str:
        """Such as "perplexity (paper) of sotu.test", or "perplexity (paper) of stdlib.test (Python
        3.12.3)"."""
        protocol = f" ({self.protocol})" if self.protocol else ""
        version = f" ({self.corpus_version})" if self.corpus_version else ""
        return f"{self.task_type}{protocol} of {self.name}{version}"


@dataclass(frozen=True)
class Comparison:
    """Memory compared with its controls, in nats per token (`recovered`: a fraction); see
    statistics.py. A field is None where a mode that it needs was not evaluated.

    below_window, below_recent: NLL of that mode minus NLL with memory
    """

    bound: Estimate | None = None
    below_window: Estimate | None = None
    below_recent: Estimate | None = None
    recovered: Estimate | None = None


@dataclass(frozen=True, eq=False)
class TaskScores:
    """What was scored of one task (of a text task: under one protocol).

    scores: mode -> index of a document -> its score. A mode may lack documents: "shuffled" lacks
    those for which no other document is long enough.
    costs: mode -> what it costs, if the task measures it
    failures: mode -> why it was not scored
    """

    task: ScoredTask
    scores: Mapping[str, Mapping[int, DocumentScore]]
    costs: Mapping[str, Cost] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def comparison(self) -> Comparison:
        equal = self.task.weighs_documents_equally

        def nlls(mode: str) -> dict[int, Tensor]:
            found = self.scores.get(mode, {})
            if equal:  # a document is one number
                return {i: torch.tensor([d.mean_nll]).double() for i, d in found.items()}
            return {i: d.nll for i, d in found.items()}

        memory, window, raw = nlls("memory"), nlls("window"), nlls("raw")
        return Comparison(
            bound=difference(nlls("shuffled"), memory),
            below_window=difference(window, memory),
            below_recent=difference(nlls("recent"), memory),
            recovered=recovered_fraction(window, memory, raw),
        )

    def summarize(self) -> TaskSummary:
        """All numbers of the task. Intervals take a thousand resamplings each, so callers that
        need a summary twice store it."""
        perplexities = [exp(d.mean_nll) for d in self.scores["memory"].values()]
        totals = {
            "documents": len(perplexities),
            "scored_tokens": sum(len(d.nll) for d in self.scores["memory"].values()),
            "mean": mean(perplexities),
            "max": max(perplexities),
            "min": min(perplexities),
        }
        modes = {
            mode: mode_numbers(self.task, list(scores.values()))
            | ({"cost": asdict(self.costs[mode])} if mode in self.costs else {})
            for mode, scores in self.scores.items()
            if scores
        }
        return TaskSummary(self.task, totals, modes, self.comparison, self.failures)


@dataclass(frozen=True, eq=False)
class TaskSummary:
    """The numbers of one task, as plain values for JSON.

    totals: counts, and mean, max and min of the documents' perplexities, as the released program
            reports them
    modes:  mode -> its numbers (`mode_numbers`), with the fields of `Cost` as "cost"
    failures: mode -> why it was not scored
    """

    task: ScoredTask
    totals: Mapping[str, Any]
    modes: Mapping[str, Mapping[str, Any]]
    comparison: Comparison = Comparison()
    failures: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """One entry of the results in test.json, and of `eval` in metrics.jsonl."""
        summary = {
            "task": self.task.name,
            "task_type": self.task.task_type,
            "protocol": self.task.protocol,
            "truncation": self.task.truncation,
            "chunk_size": self.task.chunk_size,
            "num_memory": self.task.num_memory,
            "corpus_version": self.task.corpus_version,
            **self.totals,
            **self.modes,
        }
        if self.failures:
            # A list, because every object here is a mode's.
            failures = [{"mode": mode, "why": why} for mode, why in self.failures.items()]
            summary["not_scored"] = failures
        for name in Comparison.__dataclass_fields__:
            value, interval = getattr(self.comparison, name) or (None, None)
            summary |= {name: value, f"{name}_interval_95": interval}
        return summary

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> TaskSummary:
        """The summary that `as_json` wrote, also by an earlier version. Raises KeyError or
        ValueError for other JSON."""
        names = ("documents", "scored_tokens", "mean", "max", "min")
        return cls(
            ScoredTask(*checked_task(found)),
            {name: found.get(name) for name in names},
            {
                mode: checked_numbers(numbers, mode)
                for mode, numbers in found.items()
                if isinstance(numbers, dict)
            },
            Comparison(
                *(checked_estimate(found, name) for name in Comparison.__dataclass_fields__)
            ),
            checked_failures(found),
        )


def mode_numbers(task: ScoredTask, documents: Sequence[DocumentScore]) -> dict[str, Any]:
    """The numbers of a task's documents in one mode. Losses are in nats per scored token,
    intervals are 95 % and come from resampled documents, fractions are 0 to 1, and BLEU-4 is 0 to
    100."""
    equal = task.weighs_documents_equally
    weighted = [(d.mean_nll, 1 if equal else len(d.nll)) for d in documents]
    numbers: dict[str, Any] = {
        "documents": len(documents),
        "nll": token_weighted(weighted),
        "nll_interval_95": bootstrap(weighted, token_weighted),
        "perplexity": exp(token_weighted(weighted)),
        "interval_95": bootstrap(weighted, lambda drawn: exp(token_weighted(drawn))),
    }
    numbers |= {
        "text": text_numbers,
        "loss": loss_numbers,
        "copy": copy_numbers,
        "retrieval": retrieval_numbers,
    }[task.kind](task, documents)
    if any(d.texts for d in documents):
        rouge = [rouge_l(d.texts) for d in documents]
        numbers["rouge_l"] = mean(rouge)
        numbers["rouge_l_interval_95"] = bootstrap(rouge, mean)
    if answers := [d.answer for d in documents if d.answer]:
        numbers["answer_metric"] = answers[0][0]
        numbers["answer_score"] = mean([score for _, score in answers])
        numbers["answer_score_interval_95"] = bootstrap([score for _, score in answers], mean)
    elif task.kind == "loss" and any(d.texts for d in documents):
        for name in ("exact_match", "token_f1"):
            scores = [
                METRICS[name](found, [wanted]) for d in documents for wanted, found in d.texts
            ]
            numbers[name] = mean(scores)
            numbers[f"{name}_interval_95"] = bootstrap(scores, mean)
    return numbers


def text_numbers(task: ScoredTask, documents: Sequence[DocumentScore]) -> dict[str, Any]:
    perplexities = [exp(d.mean_nll) for d in documents]
    numbers: dict[str, Any] = {
        "document_mean": mean(perplexities),
        "document_mean_interval_95": bootstrap(perplexities, mean),
        "by_position": by_position(documents),
    }
    # The chunks of a sliding window are its own, and a segment is read as one row.
    if (task.protocol or "").split(".")[0] not in ("sliding", "segment"):
        numbers["by_chunk"] = by_chunk(documents, task.chunk_size)
    return numbers


def loss_numbers(task: ScoredTask, documents: Sequence[DocumentScore]) -> dict[str, Any]:
    weighted = [(d.mean_loss, len(d.loss)) for d in documents]
    losses = [loss for loss, _ in weighted]
    return {
        "loss": token_weighted(weighted),
        "loss_interval_95": bootstrap(weighted, token_weighted),
        "document_mean_loss": mean(losses),
        "document_mean_loss_interval_95": bootstrap(losses, mean),
    }


def retrieval_numbers(task: ScoredTask, documents: Sequence[DocumentScore]) -> dict[str, Any]:
    right = [float(d.correct) for d in documents]
    depths = {
        depth: [float(d.correct) for d in documents if d.depth == depth]
        for depth in [d.depth for d in documents]
    }
    return {
        "accuracy": mean(right),
        "accuracy_interval_95": bootstrap(right, mean),
        "by_depth": [
            {"depth": depth, "trials": len(answers), "accuracy": mean(answers)}
            for depth, answers in depths.items()
        ],
    }


def copy_numbers(task: ScoredTask, documents: Sequence[DocumentScore]) -> dict[str, Any]:
    return {
        "token_accuracy": sum(d.hits[0] for d in documents) / sum(d.hits[1] for d in documents),
        "written": documents[0].written,
        "bleu4": bleu4([pair for d in documents for pair in d.texts]),
        "bleu4_interval_95": bleu4_interval([d.texts for d in documents]),
    }
