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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uiollms.apart import attends_apart
from uiollms.base import Front, layer_device
from uiollms.devices import device_of, give_back, moved
from uiollms.distributed import ALONE, Division, Group
from uiollms.estimators import Estimator, make_estimator
from uiollms.fitness import check_ids
from uiollms.kv_gradients import KVGradients, at, batched, pick, projected_at_once, put
from uiollms.loss import linear_losses
from uiollms.memory import Prefix, join_slots
from uiollms.model import LayerMemory, MemoryLM
from uiollms.positions import num_positions, positions_said
from uiollms.tasks import IGNORED, Row, Sample


class StepResult(NamedTuple):
    """losses [N]: every row's share of the sample's loss; scored [N] int64: its scored tokens; reencoded: the chunks
    that went through the encoder with a graph; nll: the sum of the scored tokens' NLL, in nats, unweighted (a tensor:
    reading it waits for the device). In a group of several processes: of this one's rows and chunks, zero elsewhere."""

    losses: Tensor
    scored: Tensor
    reencoded: tuple[int, ...]
    nll: Tensor


def gradient_step(
    model: MemoryLM,
    sample: Sample,
    weights: Tensor | None = None,
    *,
    estimator: Estimator | str | None = None,
    rng: random.Random | int | None = None,
    scale: float = 1.0,
    report_all: bool = True,
    group: Group = ALONE,
    **settings: int | bool,
) -> StepResult:
    """Run the two-pass step on one sample and ADD the gradients of `scale` * loss into `.grad` of the trained
    parameters. The decoder's gradient is exact; the encoder's is weighted by `weights` [N, N] (row: the sample's row, column:
    memory) if given, else by a draw of `estimator` (an object, or a name with settings `S` and `compensate`; by default the
    exact gradient) with `rng`. Raises ValueError past the capacity.

    report_all: also compute the losses that nothing trained can change (rows that read no memory), for the report; without,
    they count as 0 losses of 0 tokens.
    group: the processes that share this sample, with equal weights and an `rng` in the same state.
    """
    check_sample(model, sample)
    rng = rng if isinstance(rng, random.Random) else random.Random(rng)
    if isinstance(estimator, str):
        estimator = make_estimator(estimator, **settings)  # type: ignore[arg-type]
    estimator = estimator or make_estimator("exact")
    if weights is None:
        weights = row_weights(sample, estimator.window(len(sample.chunks) + 1, rng))
    seeds = [rng.getrandbits(62) for _ in sample.chunks] if model.training and model.memory_config.lora_dropout else None

    # A document whose chunks fit one batch is not encoded twice: the graph of step 1 is kept for step 4.
    needed = set(chunks_with_gradient(sample, weights))
    division = Division(group, len(sample.chunks), sorted(needed))
    chunks, seeds = sample.chunks[division.own], pick(seeds, division.own)  # from here on those of this process
    wanted = [i for i, s in enumerate(division.own) if s in needed & division.owned]
    at_once = wanted if len(chunks) <= model.chunk_batch and not estimator.reads_norms else []
    memory, graph = encode_all(model, chunks, at_once, seeds)
    keys, values = project_all(model, memory, division, seeds)

    m, dtype = model.memory_config.num_memory, model.master_dtype
    sums = KVGradients(keys, values, weights, sample, m, sorted(needed), dtype)
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
        columns = estimator.columns(division.gather(norms).tolist(), rng)
        if columns is not None:
            factors = [columns[division.own[i]] for i in wanted]
            memory_grads = [scale_chunks(layer, factors) for layer in memory_grads]
            places = [j for j, factor in enumerate(factors) if factor != 0]
    for batch in [places] if at_once else batched(places, model.chunk_batch):
        if not at_once:
            picked = [wanted[j] for j in batch]
            with torch.enable_grad():
                graph = model.encode_layers(chunks[picked], pick(seeds, picked))
        backward(model, graph, [at(layer, batch) for layer in memory_grads])
    return StepResult(books.losses, books.scored, tuple(division.own[wanted[j]] for j in places), books.nll)


def backward(model: MemoryLM, outputs: Tensor | Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> None:
    """Backward from a graph that is whole, when memory is at its peak: where the least is asked for, what lies free between
    tensors goes first."""
    if model.chunk_batch == 1:
        give_back(model.device)
    torch.autograd.backward(outputs, gradients)


def check_sample(model: MemoryLM, sample: Sample) -> None:
    """Raises ValueError if a row and the memories that it reads need more positions than there are:
    for a document in chunks, one past the capacity. The same for a token without an embedding."""
    for ids in (sample.chunks, *(row.input_ids for row in sample.rows)):
        check_ids(ids, model.config.vocab_size)
    m, positions = model.memory_config.num_memory, num_positions(model.config)
    row = max(sample.rows, key=lambda row: row.num_memories * m + len(row.input_ids))
    needed = row.num_memories * m + len(row.input_ids)
    if needed <= positions:
        return
    if [row.num_memories for row in sample.rows] == list(range(len(sample.rows))):
        model.check_length(sample.num_tokens)
    raise ValueError(
        f"{row.num_memories} memories of num_memory {m} slots and the {len(row.input_ids)} tokens "
        f"that read them need {needed} positions, past {positions_said(model.config)}; cut the "
        f"document with `truncation`, or compress harder (smaller num_memory)"
    )


def row_weights(sample: Sample, window: Tensor) -> Tensor:
    """An estimator's window [C + 1, C + 1], whose row n is for a loss that reads the first n memories, handed to the
    sample's rows: [N, C + 1]. For a document in chunks row t reads t memories, and this is the window itself."""
    return window[[row.num_memories for row in sample.rows]]


def chunks_with_gradient(sample: Sample, weights: Tensor) -> list[int]:
    """The chunks whose memory some scored row reads with a weight that is not zero."""
    seen = torch.tensor([row.num_memories if len(row.scored) else 0 for row in sample.rows])
    read = torch.arange(len(sample.chunks)) < seen[:, None]  # [N, C]
    return (read & (weights[:, : len(sample.chunks)].cpu() != 0)).any(0).nonzero().flatten().tolist()


class Books:
    """Losses, scored tokens and NLL of a step, added up on the device without waiting for it."""

    def __init__(self, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
        self.sample = sample
        self.losses = torch.zeros(len(sample.rows), dtype=dtype, device=device)
        self.scored = torch.zeros(len(sample.rows), dtype=torch.int64)
        self.nll = torch.zeros((), dtype=dtype, device=device)

    def enter(self, batch: Sequence[int], loss: Tensor, nll: Tensor, row_of: Tensor) -> Tensor:
        """Book loss and NLL [N'] of a batch's scored tokens; return the batch's share of the sample's loss."""
        rows = [self.sample.rows[t] for t in batch]
        weighted = loss * torch.cat([row.token_weights[row.scored] for row in rows]).to(loss, non_blocking=True)
        numbers = torch.tensor(batch)[row_of]
        self.losses.index_add_(0, moved(numbers, self.losses.device), weighted.detach().to(self.losses))
        self.scored += torch.bincount(numbers, minlength=len(self.scored))
        self.nll += nll.detach().sum().to(self.nll)
        return weighted.sum()


def row_batches(sample: Sample, group: Group, size: int, with_memory: bool) -> Iterator[Sequence[int]]:
    """Numbers of this process's rows that score anything and that do, or do not, read memory, in batches. Rows go round the
    group one by one, because later rows read more."""
    numbers = [t for t, row in enumerate(sample.rows) if len(row.scored) and (row.num_memories > 0) == with_memory]
    return batched(numbers[group.rank :: group.size], size)


def empty_prefix(model: MemoryLM) -> Prefix:
    layers = range(len(model.base.model.layers))
    return Prefix([[] for _ in layers], [[] for _ in layers])


def encode_all(
    model: MemoryLM, chunks: Tensor, with_graph: Sequence[int] = (), seeds: Sequence[int] | None = None
) -> tuple[LayerMemory, LayerMemory]:
    """All chunks [C, l] of a document -> their memories, L detached tensors [C, m, D] (none for C = 0), and those of the
    chunks `with_graph` once more, with their graph."""
    graph: LayerMemory = []
    if not len(chunks):
        return [], graph
    m, size = model.memory_config.num_memory, model.config.hidden_size
    # Made first and filled in place: what a document keeps does not lie scattered among what its batches give back.
    layers = model.base.model.layers
    whole = [torch.empty(len(chunks), m, size, dtype=model.dtype, device=layer_device(layer)) for layer in layers]
    if with_graph:
        with torch.enable_grad():
            graph = model.encode_layers(chunks[list(with_graph)], pick(seeds, with_graph))
        put(whole, with_graph, [layer.detach() for layer in graph])
    rest = [c for c in range(len(chunks)) if c not in set(with_graph)]
    with torch.no_grad():
        for batch in batched(rest, model.chunks_at_once):
            put(whole, batch, model.encode_layers(chunks[list(batch)], pick(seeds, batch)))
    return whole, graph


@torch.no_grad()
def project_all(
    model: MemoryLM, memory: LayerMemory, division: Division | None = None, seeds: Sequence[int] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Memories of this process's chunks (without a `division` all), L x [n, m, D] -> keys and values of the whole document's in
    front of any later chunk, L x [1, H, M, K]."""
    if not memory:
        return [], []
    division = division or Division(ALONE, len(memory[0]), ())
    own = empty_slots(model, len(division.own))
    for batch in batched(range(len(division.own)), max(model.chunks_at_once, projected_at_once(model))):
        numbers = [division.own[i] for i in batch]
        keys, values = model.project([layer[batch[0] : batch[-1] + 1] for layer in memory], numbers, pick(seeds, batch))
        put(own, batch, [*keys, *values])
    joined = [join_slots(division.gather(part), 1) for part in own]
    return joined[: len(memory)], joined[len(memory) :]


@torch.no_grad()
def remember_all(model: MemoryLM, chunks: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """All chunks [C, l] of a document -> the keys and values of their memories, L x [1, H, M, K] (none for C = 0), where the
    memories themselves are not needed any more."""
    if not len(chunks):
        return [], []
    whole = empty_slots(model, len(chunks))
    for batch in batched(range(len(chunks)), model.chunks_at_once):
        keys, values = model.project(model.encode_layers(chunks[batch[0] : batch[-1] + 1]), batch)
        put(whole, batch, [*keys, *values])
    joined = [join_slots(part, 1) for part in whole]
    return joined[: len(joined) // 2], joined[len(joined) // 2 :]


def empty_slots(model: MemoryLM, count: int) -> list[Tensor]:
    """Room for the keys, then the values, of `count` chunks: 2L x [count, H, m, K], which `join_slots` need not copy."""
    layers, heads = model.base.model.layers, model.config.num_key_value_heads
    shape = heads, count, model.memory_config.num_memory, layers[0].self_attn.head_dim
    return [torch.empty(shape, dtype=model.dtype, device=layer_device(layer)).transpose(0, 1) for layer in [*layers, *layers]]


def check_teacher(model: MemoryLM, sample: Sample) -> None:
    """Raises ValueError if a teacher would read past the base's positions, or a token without an embedding."""
    positions = num_positions(model.config)
    for text in sample.teachers:
        check_ids(text, model.config.vocab_size)
        if len(text) > positions:
            raise ValueError(
                f"the teacher reads its context raw: {len(text)} tokens, the base has {positions} positions; set truncation"
            )


@torch.no_grad()
def teach(model: MemoryLM, sample: Sample) -> list[Tensor]:
    """The base's normed hidden states [T', D] over every raw teacher text. Raises ValueError past the base's positions."""
    check_teacher(model, sample)
    return [model.decode(text[None], empty_prefix(model), [0])[0] for text in sample.teachers]


def decode_scored(model: MemoryLM, sample: Sample, batch: Sequence[int], prefix: Front) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of the sample's rows behind `prefix` -> normed hidden states [N', D] of their scored positions, row after row,
    their targets [N'], both on the LM head's device, and the number within the batch of the row that each belongs to [N'].
    Shorter rows are padded at their end, where causality hides it."""
    rows = [sample.rows[t] for t in batch]
    ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    targets = pad_sequence([row.targets for row in rows], batch_first=True, padding_value=IGNORED)
    num_slots = [row.num_memories * model.memory_config.num_memory for row in rows]
    repeat = torch.tensor([row.repeat for row in rows]) if any(row.repeat for row in rows) else None
    hidden = model.decode(ids, prefix, num_slots, repeat=repeat)
    row_of, place = (targets != IGNORED).nonzero(as_tuple=True)
    picked = hidden[moved(row_of, hidden.device), moved(place, hidden.device)]
    device = device_of(model.base.lm_head)
    return moved(picked, device), moved(targets[row_of, place], device), row_of


def taught_at(model: MemoryLM, taught: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """The teacher's hidden states [N', D] at the rows' scored positions, on the LM head's device."""
    parts = [taught[row.teacher[0]][moved(row.scored + row.teacher[1], taught[0].device)] for row in rows]
    return moved(torch.cat(parts), device_of(model.base.lm_head))


def decode_rows(
    model: MemoryLM, sample: Sample, batch: Sequence[int], prefix: Front, taught: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of the sample's rows behind `prefix` -> loss and NLL of their scored tokens [N'], row after row, and the number
    within the batch of the row that each belongs to [N']."""
    hidden, targets, row_of = decode_scored(model, sample, batch, prefix)
    teacher = taught_at(model, taught, [sample.rows[t] for t in batch]) if taught else None
    return *linear_losses(hidden, model.base.lm_head, targets, teacher, sample.kl_weight), row_of


def chunk_norms(memory_grads: LayerMemory) -> Tensor:
    """The Euclidean norm of every chunk's memory gradient over all layers, [n] float64, on the last layer's device: a step
    waits for the devices only where these are read."""
    squares = [moved(layer.double().pow(2).sum((1, 2)), memory_grads[-1].device) for layer in memory_grads]
    return torch.stack(squares).sum(0).sqrt()


def scale_chunks(layer: Tensor, factors: Sequence[float]) -> Tensor:
    """[C, m, D] times a factor for every chunk."""
    return layer * torch.tensor(factors, dtype=torch.float64)[:, None, None].to(layer, non_blocking=True)
