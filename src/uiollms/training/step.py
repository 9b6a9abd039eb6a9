"""One training step, for every estimator. Its autograd graphs contain at most one batch of chunks
in the encoder, or one batch of rows in the decoder, however many chunks the estimator chooses.

    1  Encode all chunks without a graph, and project their memories to keys and values.
    2  Decode the rows in batches. Every backward pass ends at the keys and values of the memories
       and frees its graph. Two sums are kept there. The sum of all gradients is for the decoder's
       LoRA. The sum of the gradients weighted by the estimator's matrix W is for the encoder.
    3  Backpropagate through the projections: the first sum to the decoder's LoRA, the second to
       the memories.
    4  Encode the chunks whose weighted gradient is not zero once more, with a graph, and
       backpropagate from their memories. (Where the whole document fits one batch of chunks,
       stage 1 builds the graph of these chunks, and they are not encoded again.)

In a group of several processes each process does stages 1, 3 and 4 for its own chunks and stage 2
for its own rows. Keys and values are gathered before stage 2. After it, the gradients at a chunk
are summed in the process that owns the chunk (distributed/division.py). The gradients of all
processes add up to the document's.

Shapes: N rows, C chunks, B rows of a batch, T tokens, m num_memory, M = C * m slots, L layers, H
key/value heads, K head size, D hidden size, n chunks of this process. Source: UIO-LLMs section
3.3; the two passes: GradCache (Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from uiollms.data.limits import check_sample
from uiollms.data.sample import Sample
from uiollms.distributed.division import Division
from uiollms.distributed.groups import ALONE, Group
from uiollms.kernels.allocator import trim_heap
from uiollms.kernels.devices import device_of, to_device, upload
from uiollms.kernels.indexing import batched, select_seeds, take_rows, write_rows
from uiollms.model.lora import convert_once
from uiollms.model.memory_lm import LayerMemory, MemoryLM
from uiollms.model.passes import (
    RowBatch,
    decode_rows,
    empty_prefix,
    encode_all,
    prepare_rows,
    project_all,
    teacher_hidden,
)
from uiollms.model.state import supports_in_place
from uiollms.training.estimators import Estimator, make_estimator
from uiollms.training.memory_gradients import MemoryGradients
from uiollms.training.pipeline import Output, Pipeline, SegmentedGraph
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
    """Runs one training step on a sample and ADDS the gradients of `scale` * loss to the `.grad` of
    the trained parameters. Returns the losses of the rows and what else `StepResult` contains.

    The decoder's gradient is exact. The encoder's is weighted by `weights` [N, N], whose rows are
    the sample's rows and whose columns are memories. Without `weights` they are drawn from
    `estimator` with `rng`. The estimator is an object, or a name with the settings `S` and
    `compensate`; by default it is the exact gradient. Raises ValueError past the capacity, and for
    a model with `pipeline` whose weights are on disk.

    A list of samples, with a list of weights or of rngs, goes through encoder and decoder
    together, in batches of `chunk_batch` chunks or rows of any of them. It gives the same
    gradients as one sample after another, and a list of results.

    report_all: also compute the losses that nothing trained can change, those of rows that read
    no memory. Without it they count as 0 losses of 0 tokens. group: the processes that compute
    the step together; they must pass equal samples, equal weights and rngs in the same state.
    """
    if isinstance(estimator, str):
        estimator = make_estimator(estimator, **settings)  # type: ignore[arg-type]
    estimator = estimator or make_estimator("exact")
    if isinstance(sample, Sample):
        one_weights: Any = None if weights is None else [weights]
        one_rng: Any = [rng]
        return _run_stages(
            model, [sample], one_weights, estimator, one_rng, scale, report_all, group
        )[0]
    rngs: Any = [None] * len(sample) if rng is None else rng
    results: dict[int, StepResult] = {}
    for kl_weight in dict.fromkeys(each.kl_weight for each in sample):
        # All rows of a batch have the same kind of loss, so samples are grouped by kl_weight.
        chosen = [i for i, each in enumerate(sample) if each.kl_weight == kl_weight]
        found = _run_stages(
            model,
            [sample[i] for i in chosen],
            None if weights is None else [weights[i] for i in chosen],
            estimator,
            [rngs[i] for i in chosen],
            scale,
            report_all,
            group,
        )
        results |= zip(chosen, found, strict=True)
    return [results[i] for i in range(len(sample))]


def _run_stages(
    model: MemoryLM,
    samples: Sequence[Sample],
    weights: Sequence[Tensor] | None,
    estimator: Estimator,
    rngs: Sequence[Rng],
    scale: float,
    report_all: bool,
    group: Group,
) -> list[StepResult]:
    """Runs the step on samples with the same `kl_weight`: draws weights and seeds, then runs the
    four stages."""
    if model.pipeline and model.has_offloaded_weights:
        # The main thread would hold the lock of these weights while a backward pass waits for it.
        raise ValueError("pipeline does not work with weights on disk; set model.pipeline = False")
    if model.dtype == torch.float16:
        raise ValueError(
            "gradient_step: the base is in float16, in which gradients vanish, and there is no "
            "loss scaling; load it in bfloat16 or float32"
        )
    for each in samples:
        check_sample(model.limits, each)
    samples = [each.with_recent(model.memory_config.recent_tokens) for each in samples]
    step = prepare_step(model, samples, weights, estimator, rngs, group)
    with convert_once():
        gradients = encode_and_project(step)
        tally = decode_losses(step, gradients, scale, report_all)
        memory_grads = gradients.backward_projection(
            model, step.memory, step.division, step.local_with_gradient, step.local_seeds
        )
        reencoded = backward_encoder(step, memory_grads)
    return tally.results(samples, reencoded)


@dataclass
class Step:
    """What the four stages share. All samples are joined: their rows, their chunks and the
    columns of the weights are numbered consecutively. Local chunks are those of this
    process, in the order of `division.local_chunks`.

    weights: [N, C], the weight of each row's loss at each memory;
    with_gradient: the chunks, ascending, at which some weight is not zero;
    local_ids: [n, l], the token ids of the local chunks, on the device of the token embedding;
    local_seeds: their dropout seeds, None
    without dropout;
    local_with_gradient: the indices of the local chunks whose gradient this process computes.
    """

    model: MemoryLM
    sample: Sample
    weights: Tensor
    estimator: Estimator
    generators: list[random.Random]
    group: Group
    division: Division
    with_gradient: list[int]
    local_ids: Tensor
    local_seeds: list[int] | None
    local_with_gradient: list[int]
    memory: LayerMemory = field(default_factory=list)  # L x [n, m, D]
    # L x [len(local_with_gradient), m, D], where stage 1 builds the graph of stage 4
    graph: LayerMemory = field(default_factory=list)


def prepare_step(
    model: MemoryLM,
    samples: Sequence[Sample],
    weights: Sequence[Tensor] | None,
    estimator: Estimator,
    rngs: Sequence[Rng],
    group: Group,
) -> Step:
    """Prepares the step: draws the weight matrix (for `uio` the reservoirs) and the dropout seeds
    of each sample from its generator, and divides the chunks over the group."""
    generators = [rng if isinstance(rng, random.Random) else random.Random(rng) for rng in rngs]
    sample_weights: list[Tensor] = []
    seeds: list[int] | None = [] if model.training and model.memory_config.lora_dropout else None
    for i, (each, generator) in enumerate(zip(samples, generators, strict=True)):
        num_chunks = len(each.chunks)
        if weights is None:
            matrix = estimator.weight_matrix(num_chunks + 1, generator)
            sample_weights.append(row_weights(each, matrix)[:, :num_chunks])
        else:
            sample_weights.append(weights[i][:, :num_chunks])
        if seeds is not None:
            seeds += [generator.getrandbits(62) for _ in range(num_chunks)]
    sample, joined = Sample.joined(samples), torch.block_diag(*sample_weights)
    with_gradient = chunks_with_gradient(sample, joined)
    division = Division(group, len(sample.chunks), with_gradient)
    owned_with_gradient = {*with_gradient} & division.owned_chunks
    return Step(
        model,
        sample,
        joined,
        estimator,
        generators,
        group,
        division,
        with_gradient,
        local_ids=upload([sample.chunks[division.local_chunks]], model.device)[0],
        local_seeds=select_seeds(seeds, division.local_chunks),
        local_with_gradient=[
            i for i, chunk in enumerate(division.local_chunks) if chunk in owned_with_gradient
        ],
    )


def encode_and_project(step: Step) -> MemoryGradients:
    """Stage 1: encodes all chunks and projects their memories. Every process gets the keys and
    values of all chunks, the leaves of the decoder's graphs."""
    model, sample, division = step.model, step.sample, step.division
    # Chunks that fit one batch are encoded once, with the graph that stage 4 needs. The exception
    # is an estimator that chooses chunks by the norms of their gradients, after stage 3.
    fits = len(step.local_ids) <= model.chunk_batch and not step.estimator.reads_norms
    with_graph = step.local_with_gradient if fits else []
    step.memory, step.graph = encode_all(model, step.local_ids, with_graph, step.local_seeds)
    keys, values = project_all(model, step.memory, division, step.local_seeds, sample.chunk_numbers)
    m, dtype = model.memory_config.num_memory, model.master_dtype
    return MemoryGradients(keys, values, step.weights, sample, m, step.with_gradient, dtype)


def decode_losses(
    step: Step, gradients: MemoryGradients, scale: float, report_all: bool
) -> LossTally:
    """Stage 2: computes the losses of this process's rows, batch by batch, and backpropagates them
    to the memories' keys and values, where `gradients` sums them."""
    model, sample = step.model, step.sample
    teachers = teacher_hidden(model, sample)
    dtype = torch.promote_types(model.dtype, torch.float32)
    tally = LossTally(sample, dtype, device_of(model.base.lm_head))
    without, reading = (
        list(row_batches(sample, step.group, model.chunk_batch, with_memory))
        for with_memory in (False, True)
    )
    pipeline = Pipeline(partial(backward, model), model.pipeline)
    for rows in prepare_rows(model, sample, [*(without if report_all else ()), *reading]):
        if sample.rows[rows.numbers[0]].num_memories == 0:
            with torch.no_grad():
                tally.add(rows, *decode_rows(model, sample, rows, empty_prefix(model), teachers))
            continue

        def decode(graph: SegmentedGraph, rows: RowBatch = rows) -> list[Output]:
            prefix = gradients.prefix(rows.numbers, supports_in_place(model.base))
            losses = decode_rows(model, sample, rows, prefix, teachers, graph.move)
            return [Output(graph.segment, scale * tally.add(rows, *losses))]

        pipeline.run(decode)
    pipeline.finish()
    return tally


def backward_encoder(step: Step, memory_grads: LayerMemory) -> list[int]:
    """Stage 4: backpropagates the memories' gradients, L x [len(local_with_gradient), m, D],
    through the encoder. Its graph is stage 1's, or is built here, batch by batch. Returns the
    numbers of the chunks that were encoded with a graph."""
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
    pipeline = Pipeline(partial(backward, model), model.pipeline)
    for batch in [selected] if step.graph else batched(selected, model.chunk_batch):

        def encode(graph: SegmentedGraph, batch: Sequence[int] = batch) -> list[Output]:
            memory = step.graph
            if not memory:
                encoded = [local[j] for j in batch]
                seeds = select_seeds(step.local_seeds, encoded)
                (ids,) = take_rows([step.local_ids], encoded)
                memory = model.encode_layers(ids, seeds, graph.move)
            arrived = take_rows(memory_grads, batch)
            segments = graph.segments or [0] * len(memory)
            return [Output(*output) for output in zip(segments, memory, arrived, strict=True)]

        pipeline.run(encode)
    pipeline.finish()
    return [division.local_chunks[local[j]] for j in selected]


def draw_column_factors(step: Step, norms: Sequence[float]) -> list[float]:
    """Draws a factor for every chunk, document by document, from the norms [C] of the chunks'
    memory gradients. The factor is 1 in documents without gradients."""
    columns: list[float] = []
    for num_chunks, rng in zip(step.sample.documents, step.generators, strict=True):
        chunks = range(len(columns), len(columns) + num_chunks)
        has_gradient = not {*step.with_gradient}.isdisjoint(chunks)
        factors = step.estimator.columns([norms[c] for c in chunks], rng) if has_gradient else None
        columns += factors or [1.0] * num_chunks
    return columns


def backward(
    model: MemoryLM, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> None:
    """Backpropagates from `outputs`, and frees their graph. When the graph is complete the step
    takes the most RAM, so with chunk_batch 1, the setting for the least, the heap is trimmed
    first."""
    if model.chunk_batch == 1:
        trim_heap(model.device)
    torch.autograd.backward(outputs, gradients)


def row_weights(sample: Sample, matrix: Tensor) -> Tensor:
    """Selects the weights [N, C + 1] of the sample's rows from an estimator's weight matrix [C + 1,
    C + 1], whose row n is for a loss that reads the first n memories. For a document in chunks
    row t reads t memories, so the result is the matrix itself."""
    return matrix[[row.num_memories for row in sample.rows]]


def chunks_with_gradient(sample: Sample, weights: Tensor) -> list[int]:
    """Returns the chunks whose memory some scored row reads with a weight, of [N, C or more], that
    is not zero."""
    spans = [
        (row.memories.start, row.memories.stop) if len(row.scored) else (0, 0)
        for row in sample.rows
    ]
    first, stop = torch.tensor(spans).T[..., None]
    numbers = torch.arange(len(sample.chunks))
    read = (first <= numbers) & (numbers < stop)  # [N, C]
    weighted = weights[:, : len(sample.chunks)].cpu() != 0
    return (read & weighted).any(0).nonzero().flatten().tolist()


def row_batches(
    sample: Sample, group: Group, size: int, with_memory: bool
) -> Iterator[Sequence[int]]:
    """Yields the numbers of this process's rows in batches: those that score a token, and read
    memory or do not. Rows are dealt to the group one by one, because later rows read more."""
    numbers = [
        t
        for t, row in enumerate(sample.rows)
        if len(row.scored) and (row.num_memories > 0) == with_memory
    ]
    return batched(numbers[group.rank :: group.size], size)


def chunk_norms(memory_grads: LayerMemory) -> Tensor:
    """Computes the Euclidean norm of every chunk's memory gradient over all layers, [n] float64,
    on the last layer's device. The step waits for the devices only where the norms are read."""
    squares = [
        to_device(layer.double().pow(2).sum((1, 2)), memory_grads[-1].device)
        for layer in memory_grads
    ]
    return torch.stack(squares).sum(0).sqrt()


def scale_chunks(layer: Tensor, factors: Sequence[float]) -> Tensor:
    """Multiplies every chunk of a layer's gradients [n, m, D] by its factor."""
    return layer * torch.tensor(factors, dtype=torch.float64)[:, None, None].to(
        layer, non_blocking=True
    )
