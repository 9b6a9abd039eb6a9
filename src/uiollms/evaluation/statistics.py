"""Numbers computed from scored documents: means, intervals, curves by position, differences
between modes, and the overlap of generated with reference texts.

Two estimates compare memory with its controls, on the same documents:

    bound      nll_shuffled - nll_memory, in nats per scored token. It is what a document's memory
               is worth beyond another document's. At 0 training has learned a prefix that helps
               every document alike.
    recovered  (nll_window - nll_memory) / (nll_window - nll_raw). It is the fraction of the raw
               context's gain that memory gains too.

Both are computed from sums over tokens, as the reported NLL is. Their intervals come from
documents that are drawn again with replacement. All modes use the same draws, because a hard
document is hard in every mode.

Shapes: D documents, K modes, T' scored tokens of a document.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Array = np.ndarray
DRAWS, SEED, LEVEL = 2000, 0, 0.95
BLOCK = 2**20  # documents drawn at once, which bounds the memory that the draws take


@dataclass(frozen=True, eq=False)
class DocumentScore:
    """The scores of one document in one mode.

    nll:       [T'] float32, nats of every scored token
    loss:      [T'] float32, the training loss of every scored token, in nats; it differs from
               `nll` where the task distils a teacher
    positions: [T'] int64, index of every scored token in its document
    texts:     (reference, generated) pairs of tasks that generate
    written:   the first chunk of a copy task and its copies, in the form of `summaries.Written`
    answer:    (metric, score from 0 to 1) of the answer to a benchmark's question
    hits:      (right tokens, all tokens) of a free-running copy
    correct:   whether a retrieval trial was answered
    depth:     where a retrieval trial hides its sentence, 0 to 1
    """

    nll: Tensor
    loss: Tensor
    positions: Tensor
    texts: tuple[tuple[str, str], ...] = ()
    written: dict[str, Any] | None = None
    answer: tuple[str, float] | None = None
    hits: tuple[int, int] = (0, 0)
    correct: bool = False
    depth: float = 0.0

    @cached_property
    def mean_nll(self) -> float:
        return self.nll.double().mean().item()

    @cached_property
    def mean_loss(self) -> float:
        return self.loss.double().mean().item()


# ---- Means and their intervals -------------------------------------------------------------------


def exp(nll: float) -> float:
    """The perplexity of a mean NLL. Past 709.78 nats, the end of float64, it is infinite (null in
    JSON, which also contains the NLL)."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def token_weighted(documents: Sequence[tuple[float, int]]) -> float:
    """(mean, number of tokens) of every document -> the mean over all tokens."""
    total = sum(count for _, count in documents)
    return sum(value * count for value, count in documents) / total


def bootstrap(
    items: Sequence[Item],
    statistic: Callable[[Sequence[Item]], float],
    level: float = 0.95,
    draws: int = 1000,
) -> tuple[float, float]:
    """Percentile interval of a statistic of the documents, which are resampled with replacement
    (seed 0)."""
    rng = random.Random(0)
    found = sorted(statistic(rng.choices(items, k=len(items))) for _ in range(draws))
    tail = int((1 - level) / 2 * draws)
    return found[tail], found[-1 - tail]


# ---- Comparisons of modes ------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A number computed from the documents, and its 95 % interval."""

    value: float
    interval_95: tuple[float, float]


Nlls = Mapping[int, Tensor]  # index of a document -> nats of every scored token


def difference(minuend: Nlls, subtrahend: Nlls) -> Estimate | None:
    """Mean NLL of one mode minus that of another, in nats per token, over the documents that both
    modes have. Returns None if they share no document."""
    return estimate([minuend, subtrahend], lambda s: (s[..., 0] - s[..., 1], s[..., -1]))


def recovered_fraction(window: Nlls, memory: Nlls, raw: Nlls) -> Estimate | None:
    """`recovered` of the module's docstring. Returns None if no document has all three modes, and
    if the value or its interval is not finite, as where the raw context gains nothing."""
    return estimate([window, memory, raw], lambda s: (s[..., 0] - s[..., 1], s[..., 0] - s[..., 2]))


def estimate(
    modes: Sequence[Nlls], ratio: Callable[[Array], tuple[Array, Array]]
) -> Estimate | None:
    """A ratio of sums over the documents that all modes have.

    ratio: maps sums [..., K + 1] (the NLL of every mode, then the number of tokens) to numerator
    and denominator [...].
    """
    shared = sorted(set.intersection(*(set(nlls) for nlls in modes)))
    if not shared:
        return None
    sums = np.array(
        [
            [float(nlls[d].sum(dtype=torch.float64)) for nlls in modes] + [len(modes[0][d])]
            for d in shared
        ]
    )
    rng = np.random.default_rng(SEED)
    drawn = []
    for start in range(0, DRAWS, size := max(1, BLOCK // len(shared))):
        picks = rng.integers(0, len(shared), (min(size, DRAWS - start), len(shared)))
        drawn.append(sums[picks].sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        value, values = (np.divide(*ratio(s)) for s in (sums.sum(0), np.concatenate(drawn)))
    if not (np.isfinite(value) and np.isfinite(values).all()):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), (float(low), float(high)))


# ---- Curves --------------------------------------------------------------------------------------


def by_position(documents: Sequence[DocumentScore]) -> list[dict[str, Any]]:
    """Numbers of the tokens of all documents in buckets between powers of two: position 1, 2-3,
    4-7, 8-15 ... Empty buckets are left out."""
    # log2 is exact at powers of two, so no token falls into the bucket before its own.
    groups = torch.cat([d.positions for d in documents]).double().log2().floor().long()
    return [
        {"start": 2**g, "stop": 2 ** (g + 1), **numbers}
        for g, numbers in grouped(groups, documents)
    ]


def by_chunk(documents: Sequence[DocumentScore], chunk_size: int) -> list[dict[str, Any]]:
    """Numbers by the chunk that a token is predicted from. The chunk's index is also the number of
    memories read. (In the document protocol the chunk before predicts a chunk's first token.)"""
    groups = (torch.cat([d.positions for d in documents]) - 1) // chunk_size
    return [{"chunk": g, **numbers} for g, numbers in grouped(groups, documents)]


def by_length(documents: Sequence[DocumentScore]) -> list[dict[str, Any]]:
    """Numbers of the documents cut to their first L tokens. L takes the powers of two and the
    length of the longest document; each L uses the documents that have as many tokens."""
    lengths = [int(d.positions.max()) + 1 for d in documents]
    found = []
    for length in [
        *(2**g for g in range(1, max(lengths).bit_length()) if 2**g < max(lengths)),
        max(lengths),
    ]:
        long_enough = [d for d, n in zip(documents, lengths, strict=True) if n >= length]
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
    """groups [all scored tokens] int64, the group of each token -> (group, its token count, mean
    NLL and perplexity) of every group that is not empty."""
    nll = torch.cat([d.nll for d in documents]).double()
    counts = torch.bincount(groups)
    sums = torch.bincount(groups, weights=nll)
    for group in counts.nonzero().squeeze(1).tolist():
        average = (sums[group] / counts[group]).item()
        yield group, {"tokens": int(counts[group]), "nll": average, "perplexity": exp(average)}


# ---- Texts ---------------------------------------------------------------------------------------


def bleu4(texts: Sequence[tuple[str, str]]) -> float:
    """Corpus BLEU-4 of (reference, generated) pairs, 0 to 100, with the default tokeniser and
    smoothing of sacrebleu."""
    # sacrebleu and rouge_score take half a second to import, which only tasks with texts need.
    from sacrebleu import corpus_bleu

    return corpus_bleu(
        [generated for _, generated in texts], [[reference for reference, _ in texts]]
    ).score


def bleu4_interval(documents: Sequence[Sequence[tuple[str, str]]]) -> tuple[float, float]:
    """The 95 % interval of the corpus BLEU-4 of documents, each with its (reference, generated)
    pairs, from documents that are drawn again. BLEU-4 depends on sums of counts, which are computed
    once for every document."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    sums = []
    for texts in documents:
        found = metric.corpus_score([copy for _, copy in texts], [[text for text, _ in texts]])
        sums.append([*found.counts, *found.totals, found.sys_len, found.ref_len])

    def score(drawn: Sequence[Sequence[int]]) -> float:
        total = [sum(column) for column in zip(*drawn, strict=True)]
        return BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], "exp").score

    return bootstrap(sums, score)


def rouge_l(texts: Sequence[tuple[str, str]]) -> float:
    """Mean F-measure of ROUGE-L of (reference, generated) pairs, 0 to 1 (rouge-score, without
    stemming)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return mean(
        [scorer.score(reference, generated)["rougeL"].fmeasure for reference, generated in texts]
    )
