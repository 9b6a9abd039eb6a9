"""Evaluation: documents -> perplexity, with memory and beside what it is to be compared with.

    memory   chunks read the memories of all earlier chunks: the model
    window   every chunk on its own, no memory: what the frozen base does with the same window
    raw      the base with the whole raw context, where its positions allow: what memory would be if it lost nothing

Shapes: T tokens of a document, T' scored tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uiollms.distributed import ALONE, Division
from uiollms.loss import linear_nll
from uiollms.memory import Prefix
from uiollms.model import MemoryLM
from uiollms.step import batched, check_sample, decode_rows, empty_prefix, encode_all, project_all
from uiollms.tasks import IGNORED, Row, Sample

PROTOCOLS: dict[str, Callable[[Tensor, int], Sample]] = {
    "paper": Sample.language_modeling,
    "document": Sample.document,
}


class Score(NamedTuple):
    """nll [T'] float: nats of every scored token; positions [T'] int64: its place in the document."""

    nll: Tensor
    positions: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL."""
        return math.exp(self.nll.double().mean().item())


@torch.no_grad()
def score(model: MemoryLM, input_ids: Tensor, protocol: str = "paper", mode: str = "memory") -> Score:
    """Per-token NLL of one document [T] or [1, T]. protocol: "paper" leaves the first token of every chunk unscored,
    "document" only the document's first; mode: see the top of this file. Raises ValueError past the capacity, and for
    "raw" past the base's positions."""
    sample = PROTOCOLS[protocol](input_ids, model.memory_config.chunk_size)
    positions = torch.cat([row.start + row.scored + 1 for row in sample.rows])
    length = sum(len(row.input_ids) for row in sample.rows)
    if mode == "raw":
        return Score(raw_nll(model, sample, length), positions)
    if mode == "window":
        sample = replace(sample, chunks=sample.chunks[:0], rows=tuple(replace(r, num_memories=0) for r in sample.rows))
    check_sample(model, sample)
    memory, _ = encode_all(model, sample.chunks)
    keys, values = project_all(model, memory, Division(ALONE, len(sample.chunks), ()))
    parts = []
    for batch in batched([t for t, row in enumerate(sample.rows) if len(row.scored)], model.chunk_batch):
        prefix = shared_prefix(model, [sample.rows[t] for t in batch], keys, values)
        parts.append(decode_rows(model, sample, batch, prefix)[1].cpu())
    return Score(torch.cat(parts) if parts else torch.empty(0), positions)


def shared_prefix(model: MemoryLM, rows: Sequence[Row], keys: Sequence[Tensor], values: Sequence[Tensor]) -> Prefix:
    """One document's memory, [1, H, M, K] per layer, in front of all of its rows."""
    slots = max(row.num_memories for row in rows) * model.memory_config.num_memory
    if slots == 0:
        return empty_prefix(model)

    def handed_out(layers: Sequence[Tensor]) -> list[list[Tensor]]:
        return [[kv[:, :, :slots].expand(len(rows), -1, -1, -1)] for kv in layers]

    return Prefix(handed_out(keys), handed_out(values))


def raw_nll(model: MemoryLM, sample: Sample, length: int) -> Tensor:
    """NLL [T'] of the sample's scored tokens by the base, each given all raw tokens before it."""
    positions = model.config.max_position_embeddings
    if length > positions:
        raise ValueError(f"the raw context has {length} tokens, the base {positions} positions")
    ids = torch.cat([row.input_ids for row in sample.rows])
    targets = torch.cat([row.targets for row in sample.rows])
    hidden = model.decode(ids[None], empty_prefix(model), [0])[0]
    scored = (targets != IGNORED).nonzero().squeeze(1)
    head = model.base.lm_head
    device = head.weight.device
    return linear_nll(hidden[scored.to(hidden.device)].to(device), head, targets[scored].to(device)).cpu()


@dataclass
class PerplexityResult:
    """Perplexities of one task. per_document: for every mode the documents' mean NLL and scored tokens, in nats."""

    name: str
    truncation: int | None
    per_document: dict[str, list[tuple[float, int]]]

    def perplexity(self, mode: str = "memory") -> float:
        """Token-weighted: exp of the mean NLL of all scored tokens."""
        return token_weighted(self.per_document[mode])

    def interval(self, mode: str = "memory", level: float = 0.95, draws: int = 1000) -> tuple[float, float]:
        """Bootstrap interval of the token-weighted perplexity, documents resampled (seed 0)."""
        rng, documents = random.Random(0), self.per_document[mode]
        means = sorted(token_weighted(rng.choices(documents, k=len(documents))) for _ in range(draws))
        tail = int((1 - level) / 2 * draws)
        return means[tail], means[-1 - tail]

    @property
    def recovered(self) -> float | None:
        """(window - memory) / (window - raw): the share of what raw context wins that memory wins too."""
        if not {"window", "raw"} <= self.per_document.keys():
            return None
        window, raw = self.perplexity("window"), self.perplexity("raw")
        return (window - self.perplexity()) / (window - raw)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; mean, max and min over documents as the released program reports them."""
        ppl = [math.exp(nll) for nll, _ in self.per_document["memory"]]
        result: dict[str, Any] = {
            "task": self.name,
            "truncation": self.truncation,
            "documents": len(ppl),
            "scored_tokens": sum(n for _, n in self.per_document["memory"]),
            "mean": sum(ppl) / len(ppl),
            "max": max(ppl),
            "min": min(ppl),
        }
        for mode in self.per_document:
            result[mode] = {"perplexity": self.perplexity(mode), "interval_95": self.interval(mode)}
        return result | {"recovered": self.recovered}


def token_weighted(documents: Sequence[tuple[float, int]]) -> float:
    total = sum(count for _, count in documents)
    return math.exp(sum(nll * count for nll, count in documents) / total)


def evaluate_perplexity(
    model: MemoryLM,
    documents: Iterable[Tensor],
    name: str,
    truncation: int | None,
    modes: Sequence[str] = ("memory",),
    protocol: str = "paper",
) -> PerplexityResult:
    """Score token documents [T] in every mode; "raw" is left out where a document is longer than the base's positions."""
    per_document: dict[str, list[tuple[float, int]]] = {mode: [] for mode in modes}
    for ids in documents if modes else ():
        if len(ids) > model.config.max_position_embeddings:
            per_document.pop("raw", None)
        for mode in per_document:
            nll = score(model, ids, protocol, mode).nll
            per_document[mode].append((nll.double().mean().item(), len(nll)))
    return PerplexityResult(name, truncation, per_document)
