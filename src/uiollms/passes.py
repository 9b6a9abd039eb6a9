"""The passes of encoder and decoder over all chunks and rows of a sample, batch by batch, and the teacher's.

Shapes: N rows, C chunks, B rows of a batch, n chunks of this process, T tokens, m num_memory, M = C * m slots, L layers,
H key/value heads, K head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uiollms.base import Front, layer_device
from uiollms.devices import device_of, moved
from uiollms.distributed import ALONE, Division
from uiollms.fitness import check_ids
from uiollms.kv_gradients import batched, pick, projected_at_once, put
from uiollms.loss import linear_losses
from uiollms.memory import Prefix, join_slots
from uiollms.model import LayerMemory, MemoryLM
from uiollms.positions import num_positions, positions_said
from uiollms.tasks import IGNORED, Row, Sample


def check_sample(model: MemoryLM, sample: Sample) -> None:
    """Raises ValueError if a row and the memories that it reads need more positions than there are:
    for a document in chunks, one past the capacity. The same for a token without an embedding."""
    for ids in (sample.chunks, *(row.input_ids for row in sample.rows)):
        check_ids(ids, model.config.vocab_size)
    m, positions = model.memory_config.num_memory, num_positions(model.config)
    recent = model.memory_config.recent_tokens
    rows = sample.with_recent(recent).rows
    row = max(rows, key=lambda row: row.num_memories * m + len(row.input_ids))
    needed = row.num_memories * m + len(row.input_ids)
    if needed <= positions:
        return
    if [row.num_memories for row in sample.rows] == list(range(len(sample.rows))):
        model.check_length(sample.num_tokens)
    raise ValueError(
        f"{row.num_memories} memories of num_memory {m} slots and the {len(row.input_ids)} tokens "
        f"{f'({recent} of them recent_tokens) ' if row.recent else ''}"
        f"that read them need {needed} positions, past {positions_said(model.config)}; cut the "
        f"document with `truncation`, or compress harder (smaller num_memory)"
    )


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
    model: MemoryLM,
    memory: LayerMemory,
    division: Division | None = None,
    seeds: Sequence[int] | None = None,
    chunk_numbers: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Memories of this process's chunks (without a `division` all), L x [n, m, D] -> keys and values of all chunks', as they
    stand in front of any later chunk, L x [1, H, M, K]. chunk_numbers: the place of every chunk in its document, for
    several documents."""
    if not memory:
        return [], []
    division = division or Division(ALONE, len(memory[0]), ())
    own = empty_slots(model, len(division.own))
    for batch in batched(range(len(division.own)), max(model.chunks_at_once, projected_at_once(model))):
        own_numbers = [division.own[i] for i in batch]
        numbers = own_numbers if chunk_numbers is None else [chunk_numbers[c] for c in own_numbers]
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
    first_slots = [row.first_memory * model.memory_config.num_memory for row in rows]
    hidden = model.decode(ids, prefix, num_slots, repeat=repeat, first_slots=first_slots)
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
