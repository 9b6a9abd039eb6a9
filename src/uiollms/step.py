"""One training step for every estimator, whose graphs hold at most one batch of chunks of either role, whatever S is.

    1  encode all chunks without a graph; turn their memories into keys and values
    2  decode the rows in batches; each backward ends at the keys and values, where two sums are kept: all gradients (for
       the decoder's LoRA) and the W-weighted ones (for the encoder, at chunks whose weights are not all zero)
    3  backward through the projections: the first sum to the decoder's LoRA, the second to the memories
    4  encode again, with a graph, only the chunks whose weighted gradient is not zero, and go backward from their memories
       (where a whole document fits one batch of chunks, the graph of those chunks is kept in 1 and they are not encoded again)

With a group of several processes each does 1, 3 and 4 for its own chunks and 2 for its own rows; keys and values are gathered
before 2, their gradients summed at the chunks' owners after it (distributed.py). Gradients of the group add up to the document's.

Shapes: N rows, C chunks, B rows of a batch, T tokens, m num_memory, M = C * m slots, L layers, H key/value heads,
K head size, D hidden size.
Source: UIO-LLMs section 3.3; the two passes: GradCache (Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from uiollms.apart import attends_apart
from uiollms.devices import device_of, give_back, moved
from uiollms.distributed import ALONE, Division, Group
from uiollms.estimators import Estimator, make_estimator
from uiollms.kv_gradients import KVGradients, at, batched, pick, put
from uiollms.model import LayerMemory, MemoryLM
from uiollms.passes import check_sample, decode_rows, empty_prefix, encode_all, project_all, teach
from uiollms.tasks import Sample


class StepResult(NamedTuple):
    """losses [N]: every row's share of the sample's loss; scored [N] int64: its scored tokens; reencoded: the chunks
    that went through the encoder with a graph; nll: the sum of the scored tokens' NLL, in nats, unweighted (a tensor:
    reading it waits for the device). In a group of several processes: of this one's rows and chunks, zero elsewhere."""

    losses: Tensor
    scored: Tensor
    reencoded: tuple[int, ...]
    nll: Tensor


Rng = random.Random | int | None


@overload
def gradient_step(
    model: MemoryLM,
    sample: Sample,
    weights: Tensor | None = None,
    *,
    estimator: Estimator | str | None = None,
    rng: Rng = None,
    scale: float = 1.0,
    report_all: bool = True,
    group: Group = ALONE,
    **settings: int | bool,
) -> StepResult: ...


@overload
def gradient_step(
    model: MemoryLM,
    sample: Sequence[Sample],
    weights: Sequence[Tensor] | None = None,
    *,
    estimator: Estimator | str | None = None,
    rng: Sequence[Rng] | None = None,
    scale: float = 1.0,
    report_all: bool = True,
    group: Group = ALONE,
    **settings: int | bool,
) -> list[StepResult]: ...


def gradient_step(
    model: MemoryLM,
    sample: Sample | Sequence[Sample],
    weights: Tensor | Sequence[Tensor] | None = None,
    *,
    estimator: Estimator | str | None = None,
    rng: Rng | Sequence[Rng] = None,
    scale: float = 1.0,
    report_all: bool = True,
    group: Group = ALONE,
    **settings: int | bool,
) -> StepResult | list[StepResult]:
    """Run the two-pass step on one sample and ADD the gradients of `scale` * loss into `.grad` of the trained
    parameters. The decoder's gradient is exact; the encoder's is weighted by `weights` [N, N] (row: the sample's row, column:
    memory) if given, else by a draw of `estimator` (an object, or a name with settings `S` and `compensate`; by default the
    exact gradient) with `rng`. Raises ValueError past the capacity.

    Several samples, with a list of weights or of rngs, go through encoder and decoder together, in batches of
    `chunk_batch` chunks or rows of any of them: the same gradients as one after the other, and a result for each.

    report_all: also compute the losses that nothing trained can change (rows that read no memory), for the report; without,
    they count as 0 losses of 0 tokens.
    group: the processes that share the samples, with equal weights and an `rng` in the same state.
    """
    if isinstance(estimator, str):
        estimator = make_estimator(estimator, **settings)  # type: ignore[arg-type]
    estimator = estimator or make_estimator("exact")
    if isinstance(sample, Sample):
        alone: Any = None if weights is None else [weights]
        seed: Any = [rng]
        return _steps(model, [sample], alone, estimator, seed, scale, report_all, group)[0]
    rngs: Any = [None] * len(sample) if rng is None else rng
    results: dict[int, StepResult] = {}
    for kl_weight in dict.fromkeys(one.kl_weight for one in sample):  # a batch of rows has one kind of loss
        chosen = [i for i, one in enumerate(sample) if one.kl_weight == kl_weight]
        given = None if weights is None else [weights[i] for i in chosen]
        own = [rngs[i] for i in chosen]
        found = _steps(model, [sample[i] for i in chosen], given, estimator, own, scale, report_all, group)
        results |= zip(chosen, found, strict=True)
    return [results[i] for i in range(len(sample))]


def _steps(
    model: MemoryLM,
    samples: Sequence[Sample],
    weights: Sequence[Tensor] | None,
    estimator: Estimator,
    rngs: Sequence[Rng],
    scale: float,
    report_all: bool,
    group: Group,
) -> list[StepResult]:
    """The step on samples with one `kl_weight`, numbered through: rows, chunks, and columns of the weights."""
    for each in samples:
        check_sample(model, each)
    samples = [each.with_recent(model.memory_config.recent_tokens) for each in samples]
    generators = [rng if isinstance(rng, random.Random) else random.Random(rng) for rng in rngs]
    drawn: list[Tensor] = []
    seeds: list[int] | None = [] if model.training and model.memory_config.lora_dropout else None
    for i, (each, generator) in enumerate(zip(samples, generators, strict=True)):
        count = len(each.chunks)
        window = None if weights is not None else row_weights(each, estimator.window(count + 1, generator))
        drawn.append((weights[i] if window is None else window)[:, :count])  # type: ignore[index]
        if seeds is not None:
            seeds += [generator.getrandbits(62) for _ in range(count)]
    sample, window = Sample.joined(samples), torch.block_diag(*drawn)

    # Documents whose chunks fit one batch are not encoded twice: the graph of step 1 is kept for step 4.
    needed = set(chunks_with_gradient(sample, window))
    division = Division(group, len(sample.chunks), sorted(needed))
    chunks, seeds = sample.chunks[division.own], pick(seeds, division.own)  # from here on those of this process
    wanted = [i for i, s in enumerate(division.own) if s in needed & division.owned]
    at_once = wanted if len(chunks) <= model.chunk_batch and not estimator.reads_norms else []
    memory, graph = encode_all(model, chunks, at_once, seeds)
    keys, values = project_all(model, memory, division, seeds, sample.chunk_numbers)

    m, dtype = model.memory_config.num_memory, model.master_dtype
    sums = KVGradients(keys, values, window, sample, m, sorted(needed), dtype)
    taught = teach(model, sample)
    exact = torch.promote_types(model.dtype, torch.float32)
    books = Books(sample, exact, device_of(model.base.lm_head))
    for batch in row_batches(sample, group, model.chunk_batch, with_memory=False):
        if report_all:
            with torch.no_grad():
                books.enter(batch, *decode_rows(model, sample, batch, empty_prefix(model), taught))
    for batch in row_batches(sample, group, model.chunk_batch, with_memory=True):
        with torch.enable_grad():
            prefix = sums.prefix(batch, [sample.rows[t] for t in batch], attends_apart(model.base))
            backward(model, scale * books.enter(batch, *decode_rows(model, sample, batch, prefix, taught)))

    memory_grads = sums.backward_projection(model, memory, division, wanted, seeds)  # L x [len(wanted), m, D]
    places: Sequence[int] = range(len(wanted))
    if estimator.reads_norms and needed:
        norms = torch.zeros(len(division.own), dtype=torch.float64, device=memory_grads[-1].device)
        put([norms], wanted, [chunk_norms(memory_grads)])
        columns = drawn_columns(estimator, division.gather(norms).tolist(), sample.documents, needed, generators)
        factors = [columns[division.own[i]] for i in wanted]
        memory_grads = [scale_chunks(layer, factors) for layer in memory_grads]
        places = [j for j, factor in enumerate(factors) if factor != 0]
    for batch in [places] if at_once else batched(places, model.chunk_batch):
        if not at_once:
            picked = [wanted[j] for j in batch]
            with torch.enable_grad():
                graph = model.encode_layers(chunks[picked], pick(seeds, picked))
        # Under slot_input "last" layer 0's memory has no graph: nothing trained lies below it.
        pairs = zip(graph, memory_grads, strict=True)
        outputs = [(layer, at(grad, batch)) for layer, grad in pairs if layer.requires_grad]
        if outputs:
            backward(model, *zip(*outputs, strict=True))
    return books.results(samples, [division.own[wanted[j]] for j in places])


def drawn_columns(
    estimator: Estimator,
    norms: Sequence[float],
    documents: Sequence[int],
    needed: set[int],
    rngs: Sequence[random.Random],
) -> list[float]:
    """A factor for every chunk, drawn document by document from the norms of the chunks' memory gradients."""
    columns: list[float] = []
    for count, rng in zip(documents, rngs, strict=True):
        own = range(len(columns), len(columns) + count)
        factors = estimator.columns([norms[c] for c in own], rng) if needed & {*own} else None
        columns += factors or [1.0] * count
    return columns


def backward(model: MemoryLM, outputs: Tensor | Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> None:
    """Backward from a graph that is whole, when memory is at its peak: where the least is asked for, what lies free between
    tensors goes first."""
    if model.chunk_batch == 1:
        give_back(model.device)
    torch.autograd.backward(outputs, gradients)


def row_weights(sample: Sample, window: Tensor) -> Tensor:
    """An estimator's window [C + 1, C + 1], whose row n is for a loss that reads the first n memories, handed to the
    sample's rows: [N, C + 1]. For a document in chunks row t reads t memories, and this is the window itself."""
    return window[[row.num_memories for row in sample.rows]]


def chunks_with_gradient(sample: Sample, weights: Tensor) -> list[int]:
    """The chunks whose memory some scored row reads with a weight that is not zero."""
    spans = [(row.memories.start, row.memories.stop) if len(row.scored) else (0, 0) for row in sample.rows]
    first, stop = torch.tensor(spans).T[..., None]
    numbers = torch.arange(len(sample.chunks))
    read = (first <= numbers) & (numbers < stop)  # [N, C]
    return (read & (weights[:, : len(sample.chunks)].cpu() != 0)).any(0).nonzero().flatten().tolist()


class Books:
    """Losses, scored tokens and NLL of a step's rows, added up on the device without waiting for it."""

    def __init__(self, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
        self.sample = sample
        self.losses = torch.zeros(len(sample.rows), dtype=dtype, device=device)
        self.scored = torch.zeros(len(sample.rows), dtype=torch.int64)
        self.nll = torch.zeros(len(sample.rows), dtype=dtype, device=device)

    def enter(self, batch: Sequence[int], loss: Tensor, nll: Tensor, row_of: Tensor) -> Tensor:
        """Book loss and NLL [N'] of a batch's scored tokens; return the batch's share of the sample's loss."""
        rows = [self.sample.rows[t] for t in batch]
        weighted = loss * torch.cat([row.token_weights[row.scored] for row in rows]).to(loss, non_blocking=True)
        numbers = torch.tensor(batch)[row_of]
        for booked, arrived in ((self.losses, weighted), (self.nll, nll)):
            booked.index_add_(0, moved(numbers, booked.device), arrived.detach().to(booked))
        self.scored += torch.bincount(numbers, minlength=len(self.scored))
        return weighted.sum()

    def results(self, samples: Sequence[Sample], reencoded: Sequence[int]) -> list[StepResult]:
        """For each of the samples that were joined, its own rows and chunks."""
        parts = [column.split([len(one.rows) for one in samples]) for column in (self.losses, self.scored, self.nll)]
        results, first = [], 0
        for one, losses, scored, nll in zip(samples, *parts, strict=True):
            own = range(first, first := first + len(one.chunks))
            results.append(StepResult(losses, scored, tuple(c - own.start for c in reencoded if c in own), nll.sum()))
        return results


def row_batches(sample: Sample, group: Group, size: int, with_memory: bool) -> Iterator[Sequence[int]]:
    """Numbers of this process's rows that score anything and that do, or do not, read memory, in batches. Rows go round the
    group one by one, because later rows read more."""
    numbers = [t for t, row in enumerate(sample.rows) if len(row.scored) and (row.num_memories > 0) == with_memory]
    return batched(numbers[group.rank :: group.size], size)


def chunk_norms(memory_grads: LayerMemory) -> Tensor:
    """The Euclidean norm of every chunk's memory gradient over all layers, [n] float64, on the last layer's device: a step
    waits for the devices only where these are read."""
    squares = [moved(layer.double().pow(2).sum((1, 2)), memory_grads[-1].device) for layer in memory_grads]
    return torch.stack(squares).sum(0).sqrt()


def scale_chunks(layer: Tensor, factors: Sequence[float]) -> Tensor:
    """[C, m, D] times a factor for every chunk."""
    return layer * torch.tensor(factors, dtype=torch.float64)[:, None, None].to(layer, non_blocking=True)
