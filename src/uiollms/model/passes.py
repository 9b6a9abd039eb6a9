"""The passes of encoder and decoder over all chunks and rows of a sample, batch by batch, and
the teacher's.

Shapes: N rows, C chunks, B rows of a batch, n chunks of this process, T tokens, m num_memory, M
= C * m slots, L layers, H key/value heads, K head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uiollms.data.limits import check_teacher
from uiollms.data.sample import IGNORED, Row, Sample
from uiollms.distributed.division import Division
from uiollms.distributed.groups import ALONE
from uiollms.kernels.devices import device_of, to_device
from uiollms.kernels.indexing import batched, select_seeds, write_rows
from uiollms.kernels.linear_cross_entropy import linear_losses
from uiollms.model.layers import AnyPrefix, layer_device
from uiollms.model.memory_lm import LayerMemory, MemoryLM
from uiollms.model.state import KVPrefix, join_slots


def empty_prefix(model: MemoryLM) -> KVPrefix:
    layers = range(len(model.base.model.layers))
    return KVPrefix([[] for _ in layers], [[] for _ in layers])


def encode_all(
    model: MemoryLM,
    chunks: Tensor,
    with_graph: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
) -> tuple[LayerMemory, LayerMemory]:
    """All chunks [C, l] of a document -> their memories, L detached tensors [C, m, D] (none for
    C = 0), and those of the chunks `with_graph` once more, with their graph."""
    graph: LayerMemory = []
    if not len(chunks):
        return [], graph
    m, size = model.memory_config.num_memory, model.config.hidden_size
    # Made first and filled in place: what a document keeps does not lie scattered among what its
    # batches give back.
    layers = model.base.model.layers
    whole = [
        torch.empty(len(chunks), m, size, dtype=model.dtype, device=layer_device(layer))
        for layer in layers
    ]
    if with_graph:
        with torch.enable_grad():
            graph = model.encode_layers(chunks[list(with_graph)], select_seeds(seeds, with_graph))
        write_rows(whole, with_graph, [layer.detach() for layer in graph])
    rest = [c for c in range(len(chunks)) if c not in set(with_graph)]
    with torch.no_grad():
        for batch in batched(rest, model.chunks_per_batch):
            write_rows(
                whole, batch, model.encode_layers(chunks[list(batch)], select_seeds(seeds, batch))
            )
    return whole, graph


def projection_batch(model: MemoryLM) -> int:
    """Chunks whose memories are projected in one batch: a quarter as many slots as `chunk_batch`
    chunks have tokens, which is little beside what the other passes hold. The slots of a chunk
    alone would make narrow, slow products."""
    config = model.memory_config
    return model.chunk_batch * max(1, config.chunk_size // (4 * config.num_memory))


@torch.no_grad()
def project_all(
    model: MemoryLM,
    memory: LayerMemory,
    division: Division | None = None,
    seeds: Sequence[int] | None = None,
    chunk_numbers: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Memories of this process's chunks (without a `division` all), L x [n, m, D] -> keys and
    values of all chunks', as they stand in front of any later chunk, L x [1, H, M, K].
    chunk_numbers: the place of every chunk in its document, for several documents."""
    if not memory:
        return [], []
    division = division or Division(ALONE, len(memory[0]), ())
    own = empty_slots(model, len(division.local_chunks))
    for batch in batched(
        range(len(division.local_chunks)), max(model.chunks_per_batch, projection_batch(model))
    ):
        own_numbers = [division.local_chunks[i] for i in batch]
        numbers = own_numbers if chunk_numbers is None else [chunk_numbers[c] for c in own_numbers]
        keys, values = model.project(
            [layer[batch[0] : batch[-1] + 1] for layer in memory],
            numbers,
            select_seeds(seeds, batch),
        )
        write_rows(own, batch, [*keys, *values])
    joined = [join_slots(division.gather(part), 1) for part in own]
    return joined[: len(memory)], joined[len(memory) :]


@torch.no_grad()
def encode_and_project_all(model: MemoryLM, chunks: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """All chunks [C, l] of a document -> the keys and values of their memories, L x [1, H, M, K]
    (none for C = 0), where the memories themselves are not needed any more."""
    if not len(chunks):
        return [], []
    whole = empty_slots(model, len(chunks))
    for batch in batched(range(len(chunks)), model.chunks_per_batch):
        keys, values = model.project(model.encode_layers(chunks[batch[0] : batch[-1] + 1]), batch)
        write_rows(whole, batch, [*keys, *values])
    joined = [join_slots(part, 1) for part in whole]
    return joined[: len(joined) // 2], joined[len(joined) // 2 :]


def empty_slots(model: MemoryLM, count: int) -> list[Tensor]:
    """Room for the keys, then the values, of `count` chunks: 2L x [count, H, m, K], which
    `join_slots` need not copy."""
    layers, heads = model.base.model.layers, model.config.num_key_value_heads
    shape = heads, count, model.memory_config.num_memory, layers[0].self_attn.head_dim
    return [
        torch.empty(shape, dtype=model.dtype, device=layer_device(layer)).transpose(0, 1)
        for layer in [*layers, *layers]
    ]


@torch.no_grad()
def teacher_hidden(model: MemoryLM, sample: Sample) -> list[Tensor]:
    """The base's normed hidden states [T', D] over every raw teacher text. Raises ValueError
    past the base's positions."""
    check_teacher(model.limits, sample)
    return [model.decode(text[None], empty_prefix(model), [0])[0] for text in sample.teachers]


def decode_scored(
    model: MemoryLM, sample: Sample, batch: Sequence[int], prefix: AnyPrefix
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of the sample's rows behind `prefix` -> normed hidden states [N', D] of their
    scored positions, row after row, their targets [N'], both on the LM head's device, and the
    number within the batch of the row that each belongs to [N']. Shorter rows are padded at
    their end, where causality hides it."""
    rows = [sample.rows[t] for t in batch]
    ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    targets = pad_sequence([row.targets for row in rows], batch_first=True, padding_value=IGNORED)
    num_slots = [row.num_memories * model.memory_config.num_memory for row in rows]
    repeat = torch.tensor([row.repeat for row in rows]) if any(row.repeat for row in rows) else None
    first_slots = [row.first_memory * model.memory_config.num_memory for row in rows]
    hidden = model.decode(ids, prefix, num_slots, repeat=repeat, first_slots=first_slots)
    row_of, place = (targets != IGNORED).nonzero(as_tuple=True)
    picked = hidden[to_device(row_of, hidden.device), to_device(place, hidden.device)]
    device = device_of(model.base.lm_head)
    return to_device(picked, device), to_device(targets[row_of, place], device), row_of


def teacher_hidden_at(model: MemoryLM, teachers: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """The teacher's hidden states [N', D] at the rows' scored positions, on the LM head's
    device."""
    parts = [
        teachers[row.teacher[0]][to_device(row.scored + row.teacher[1], teachers[0].device)]
        for row in rows
    ]
    return to_device(torch.cat(parts), device_of(model.base.lm_head))


def decode_rows(
    model: MemoryLM,
    sample: Sample,
    batch: Sequence[int],
    prefix: AnyPrefix,
    teachers: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of the sample's rows behind `prefix` -> loss and NLL of their scored tokens [N'],
    row after row, and the number within the batch of the row that each belongs to [N']."""
    hidden, targets, row_of = decode_scored(model, sample, batch, prefix)
    teacher = (
        teacher_hidden_at(model, teachers, [sample.rows[t] for t in batch]) if teachers else None
    )
    return *linear_losses(hidden, model.base.lm_head, targets, teacher, sample.kl_weight), row_of
