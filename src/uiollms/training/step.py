"""One training step for every estimator, whose graphs hold at most one batch of chunks of either
role, whatever S is.

    1  encode all chunks without a graph; turn their memories into keys and values
    2  decode the rows in batches; each backward ends at the keys and values, where two sums are
       kept: all gradients (for the decoder's LoRA) and the W-weighted ones (for the encoder, at
       chunks whose weights are not all zero)
    3  backward through the projections: the first sum to the decoder's LoRA, the second to the
       memories
    4  encode again, with a graph, only the chunks whose weighted gradient is not zero, and go
       backward from their memories (where a whole document fits one batch of chunks, the graph of
       those chunks is kept in 1 and they are not encoded again)

With a group of several processes each does 1, 3 and 4 for its own chunks and 2 for its own rows;
keys and values are gathered before 2, their gradients summed at the chunks' owners after it
(distributed/groups.py). Gradients of the group add up to the document's.

Shapes: N rows, C chunks, B rows of a batch, T tokens, m num_memory, M = C * m slots, L layers, H
key/value heads, K head size, D hidden size. Source: UIO-LLMs section 3.3; the two passes:
GradCache (Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from uiollms.data.limits import check_sample
from uiollms.data.sample import Sample
from uiollms.distributed.division import Division
from uiollms.distributed.groups import ALONE, Group
from uiollms.kernels.allocator import trim_heap
from uiollms.kernels.devices import device_of, to_device
from uiollms.kernels.indexing import batched, select_seeds, take_rows, write_rows
from uiollms.model.memory_lm import LayerMemory, MemoryLM
from uiollms.model.passes import decode_rows, empty_prefix, encode_all, project_all, teacher_hidden
from uiollms.model.state import supports_in_place
from uiollms.training.estimators import Estimator, make_estimator
from uiollms.training.memory_gradients import MemoryGradients
from uiollms.training.tally import LossTally, StepResult

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
    """Run the two-pass step on one sample and ADD the gradients of `scale` * loss into `.grad`
    of the trained parameters. The decoder's gradient is exact; the encoder's is weighted by
    `weights` [N, N] (row: the sample's row, column: memory) if given, else by a draw of
    `estimator` (an object, or a name with settings `S` and `compensate`; by default the exact
    gradient) with `rng`. Raises ValueError past the capacity.

    Several samples, with a list of weights or of rngs, go through encoder and decoder together,
    in batches of `chunk_batch` chunks or rows of any of them: the same gradients as one after
    the other, and a result for each.

    report_all: also compute the losses that nothing trained can change (rows that read no
    memory), for the report; without, they count as 0 losses of 0 tokens. group: the processes
    that share the samples, with equal weights and an `rng` in the same state.
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
    for kl_weight in dict.fromkeys(
        one.kl_weight for one in sample
    ):  # a batch of rows has one kind of loss
        chosen = [i for i, one in enumerate(sample) if one.kl_weight == kl_weight]
        given = None if weights is None else [weights[i] for i in chosen]
        own = [rngs[i] for i in chosen]
        found = _steps(
            model, [sample[i] for i in chosen], given, estimator, own, scale, report_all, group
        )
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
    """The step on samples with one `kl_weight`: what is drawn, then the four stages of this
    module's docstring."""
    for each in samples:
        check_sample(model.limits, each)
    samples = [each.with_recent(model.memory_config.recent_tokens) for each in samples]
    step = draw_weights(model, samples, weights, estimator, rngs, group)
    gradients = encode_and_project(step)
    tally = decode_losses(step, gradients, scale, report_all)
    memory_grads = gradients.backward_projection(
        model, step.memory, step.division, step.local_with_gradient, step.local_seeds
    )
    reencoded = backward_encoder(step, memory_grads)
    return tally.results(samples, reencoded)


@dataclass
class Step:
    """What the four stages share. All samples are joined: their rows, chunks and the columns of the
    weights are numbered through. `local` are this process's chunks, in the order of
    `division.local_chunks`.

    weights: [N, at least C], of every row's loss at every memory;
    with_gradient: the chunks, ascending, at which some weight is not zero;
    local_chunks: [n, l] token ids; local_seeds: of their LoRA dropout, None without any;
    local_with_gradient: which of the local chunks get their gradient in this process.
    """

    model: MemoryLM
    sample: Sample
    weights: Tensor
    estimator: Estimator
    generators: list[random.Random]
    group: Group
    division: Division
    with_gradient: list[int]
    local_chunks: Tensor
    local_seeds: list[int] | None
    local_with_gradient: list[int]
    memory: LayerMemory = field(default_factory=list)  # L x [n, m, D]
    graph: LayerMemory = field(
        default_factory=list
    )  # L x [len(local_with_gradient), m, D], if kept


def draw_weights(
    model: MemoryLM,
    samples: Sequence[Sample],
    weights: Sequence[Tensor] | None,
    estimator: Estimator,
    rngs: Sequence[Rng],
    group: Group,
) -> Step:
    """Each sample's weights and dropout seeds, drawn from its own generator, and who
    encodes which chunk."""
    generators = [rng if isinstance(rng, random.Random) else random.Random(rng) for rng in rngs]
    drawn: list[Tensor] = []
    seeds: list[int] | None = [] if model.training and model.memory_config.lora_dropout else None
    for i, (each, generator) in enumerate(zip(samples, generators, strict=True)):
        count = len(each.chunks)
        window = (
            None
            if weights is not None
            else row_weights(each, estimator.weight_matrix(count + 1, generator))
        )
        drawn.append((weights[i] if window is None else window)[:, :count])  # type: ignore[index]
        if seeds is not None:
            seeds += [generator.getrandbits(62) for _ in range(count)]
    sample, joined = Sample.joined(samples), torch.block_diag(*drawn)
    with_gradient = chunks_with_gradient(sample, joined)
    division = Division(group, len(sample.chunks), with_gradient)
    mine = {*with_gradient} & division.owned_chunks
    return Step(
        model,
        sample,
        joined,
        estimator,
        generators,
        group,
        division,
        with_gradient,
        local_chunks=sample.chunks[division.local_chunks],
        local_seeds=select_seeds(seeds, division.local_chunks),
        local_with_gradient=[i for i, chunk in enumerate(division.local_chunks) if chunk in mine],
    )


def encode_and_project(step: Step) -> MemoryGradients:
    """Stage 1: memories of all chunks and their keys and values, which all processes get, as the
    leaves of the decoder's graphs."""
    model, sample, division = step.model, step.sample, step.division
    # Chunks that fit one batch are not encoded twice, unless their gradients' norms decide which of
    # them are drawn: the graph of those with a gradient is kept for stage 4.
    once = len(step.local_chunks) <= model.chunk_batch and not step.estimator.reads_norms
    with_graph = step.local_with_gradient if once else []
    step.memory, step.graph = encode_all(model, step.local_chunks, with_graph, step.local_seeds)
    keys, values = project_all(model, step.memory, division, step.local_seeds, sample.chunk_numbers)
    m, dtype = model.memory_config.num_memory, model.master_dtype
    return MemoryGradients(keys, values, step.weights, sample, m, step.with_gradient, dtype)


def decode_losses(
    step: Step, gradients: MemoryGradients, scale: float, report_all: bool
) -> LossTally:
    """Stage 2: the losses of this process's rows, batch by batch, and backward to the memories'
    keys and values, where `gradients` adds up what arrives."""
    model, sample = step.model, step.sample
    teachers = teacher_hidden(model, sample)
    exact = torch.promote_types(model.dtype, torch.float32)
    tally = LossTally(sample, exact, device_of(model.base.lm_head))
    for batch in row_batches(sample, step.group, model.chunk_batch, with_memory=False):
        if report_all:
            with torch.no_grad():
                tally.add(batch, *decode_rows(model, sample, batch, empty_prefix(model), teachers))
    for batch in row_batches(sample, step.group, model.chunk_batch, with_memory=True):
        with torch.enable_grad():
            prefix = gradients.prefix(batch, supports_in_place(model.base))
            backward(
                model,
                scale * tally.add(batch, *decode_rows(model, sample, batch, prefix, teachers)),
            )
    return tally


def backward_encoder(step: Step, memory_grads: LayerMemory) -> list[int]:
    """Stage 4: from the memories' gradients, L x [len(local_with_gradient), m, D], through the
    encoder, whose graph stage 1 kept or is made now, batch by batch. Returns the chunks that went
    through it with a graph."""
    model, division, local = step.model, step.division, step.local_with_gradient
    selected: Sequence[int] = range(len(local))
    if step.estimator.reads_norms and step.with_gradient:
        norms = torch.zeros(
            len(division.local_chunks), dtype=torch.float64, device=memory_grads[-1].device
        )
        write_rows([norms], local, [chunk_norms(memory_grads)])
        columns = draw_column_factors(step, division.gather(norms).tolist())
        factors = [columns[division.local_chunks[i]] for i in local]
        memory_grads = [scale_chunks(layer, factors) for layer in memory_grads]
        selected = [j for j, factor in enumerate(factors) if factor != 0]
    for batch in [selected] if step.graph else batched(selected, model.chunk_batch):
        graph = step.graph
        if not graph:
            encoded = [local[j] for j in batch]
            with torch.enable_grad():
                graph = model.encode_layers(
                    step.local_chunks[encoded], select_seeds(step.local_seeds, encoded)
                )
        # Under slot_input "last" layer 0's memory has no graph: nothing trained lies below it.
        pairs = zip(graph, memory_grads, strict=True)
        outputs = [(layer, take_rows(grad, batch)) for layer, grad in pairs if layer.requires_grad]
        if outputs:
            backward(model, *zip(*outputs, strict=True))
    return [division.local_chunks[local[j]] for j in selected]


def draw_column_factors(step: Step, norms: Sequence[float]) -> list[float]:
    """A factor for every chunk, drawn document by document from the norms of the chunks' memory
    gradients."""
    columns: list[float] = []
    for count, rng in zip(step.sample.documents, step.generators, strict=True):
        own = range(len(columns), len(columns) + count)
        drawn = {*step.with_gradient} & {*own}
        factors = step.estimator.columns([norms[c] for c in own], rng) if drawn else None
        columns += factors or [1.0] * count
    return columns


def backward(
    model: MemoryLM, outputs: Tensor | Sequence[Tensor], gradients: Sequence[Tensor] | None = None
) -> None:
    """Backward from a graph that is whole, when memory is at its peak: where the least is asked
    for, what lies free between tensors goes first."""
    if model.chunk_batch == 1:
        trim_heap(model.device)
    torch.autograd.backward(outputs, gradients)


def row_weights(sample: Sample, window: Tensor) -> Tensor:
    """An estimator's window [C + 1, C + 1], whose row n is for a loss that reads the first n
    memories, handed to the sample's rows: [N, C + 1]. For a document in chunks row t reads t
    memories, and this is the window itself."""
    return window[[row.num_memories for row in sample.rows]]


def chunks_with_gradient(sample: Sample, weights: Tensor) -> list[int]:
    """The chunks whose memory some scored row reads with a weight that is not zero."""
    spans = [
        (row.memories.start, row.memories.stop) if len(row.scored) else (0, 0)
        for row in sample.rows
    ]
    first, stop = torch.tensor(spans).T[..., None]
    numbers = torch.arange(len(sample.chunks))
    read = (first <= numbers) & (numbers < stop)  # [N, C]
    return (
        (read & (weights[:, : len(sample.chunks)].cpu() != 0)).any(0).nonzero().flatten().tolist()
    )


def row_batches(
    sample: Sample, group: Group, size: int, with_memory: bool
) -> Iterator[Sequence[int]]:
    """Numbers of this process's rows that score anything and that do, or do not, read memory, in
    batches. Rows go round the group one by one, because later rows read more."""
    numbers = [
        t
        for t, row in enumerate(sample.rows)
        if len(row.scored) and (row.num_memories > 0) == with_memory
    ]
    return batched(numbers[group.rank :: group.size], size)


def chunk_norms(memory_grads: LayerMemory) -> Tensor:
    """The Euclidean norm of every chunk's memory gradient over all layers, [n] float64, on the
    last layer's device: a step waits for the devices only where these are read."""
    squares = [
        to_device(layer.double().pow(2).sum((1, 2)), memory_grads[-1].device)
        for layer in memory_grads
    ]
    return torch.stack(squares).sum(0).sqrt()


def scale_chunks(layer: Tensor, factors: Sequence[float]) -> Tensor:
    """[C, m, D] times a factor for every chunk."""
    return layer * torch.tensor(factors, dtype=torch.float64)[:, None, None].to(
        layer, non_blocking=True
    )
