"""The passes of encoder, decoder and teacher over all chunks and rows of a sample, batch by batch.

Shapes: N rows, N' scored tokens of a batch, C chunks, l chunk_size, n chunks of this process, T
tokens, T' tokens of a teacher text, m num_memory, M = C * m slots, L layers, H key/value heads, K
head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uiollms.data.limits import check_teacher
from uiollms.data.sample import Row, Sample
from uiollms.distributed.division import Division
from uiollms.distributed.groups import ALONE
from uiollms.kernels.devices import device_of, to_device, upload
from uiollms.kernels.indexing import batched, select_seeds, take_rows, write_rows
from uiollms.kernels.linear_cross_entropy import linear_losses
from uiollms.model.layers import AnyPrefix, layer_device
from uiollms.model.memory_lm import LayerMemory, MemoryLM, Move
from uiollms.model.state import KVPrefix, join_slots


def empty_prefix(model: MemoryLM) -> KVPrefix:
    """Returns a prefix without keys and values."""
    layers = range(len(model.base.model.layers))
    return KVPrefix([[] for _ in layers], [[] for _ in layers])


def encode_all(
    model: MemoryLM,
    chunks: Tensor,
    with_graph: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
) -> tuple[LayerMemory, LayerMemory]:
    """Encodes all chunks [C, l] of a document. Returns their memories, L detached tensors [C, m, D]
    (none for C = 0), and the memories of the chunks `with_graph` a second time, with their graph.
    `seeds`, one for each chunk, switch LoRA dropout on."""
    graph: LayerMemory = []
    if not len(chunks):
        return [], graph
    m, size = model.memory_config.num_memory, model.base.config.hidden_size
    # Allocated before the batches and filled in place, so that these long-lived tensors do not
    # fragment the memory that the batches free.
    layers = model.base.model.layers
    whole = [
        torch.empty(len(chunks), m, size, dtype=model.dtype, device=layer_device(layer))
        for layer in layers
    ]
    if with_graph:
        with torch.enable_grad():
            graph = model.encode_layers(
                *take_rows([chunks], with_graph), select_seeds(seeds, with_graph)
            )
        write_rows(whole, with_graph, [layer.detach() for layer in graph])
    rest = [c for c in range(len(chunks)) if c not in set(with_graph)]
    with torch.no_grad():
        for batch in batched(rest, model.chunks_per_batch):
            write_rows(
                whole,
                batch,
                model.encode_layers(*take_rows([chunks], batch), select_seeds(seeds, batch)),
            )
    return whole, graph


def projection_batch(model: MemoryLM) -> int:
    """Returns how many chunks are projected in one batch. They have a quarter as many slots as
    `chunk_batch` chunks have tokens, which needs little memory compared with the other passes. The
    slots of a single chunk would make narrow, slow matrix products."""
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
    """Projects the memories of this process's chunks, L x [n, m, D]. Returns the keys and values of
    all chunks, L x [1, H, M, K] each, as any later chunk reads them.

    division: which chunks are those of this process; without it, all are. seeds: one for each
    chunk of this process; they switch LoRA dropout on. chunk_numbers: the number of every chunk in
    its document, if the chunks belong to several documents.
    """
    if not memory:
        return [], []
    division = division or Division(ALONE, len(memory[0]), ())
    local_chunks = division.local_chunks
    local = empty_slots(model, len(local_chunks))
    batch_size = max(model.chunks_per_batch, projection_batch(model))
    for batch in batched(range(len(local_chunks)), batch_size):
        numbers = [local_chunks[i] for i in batch]
        if chunk_numbers is not None:
            numbers = [chunk_numbers[c] for c in numbers]
        keys, values = model.project(
            [layer[batch[0] : batch[-1] + 1] for layer in memory],
            numbers,
            select_seeds(seeds, batch),
        )
        write_rows(local, batch, [*keys, *values])
    joined = [join_slots(division.gather(part), 1) for part in local]
    return joined[: len(memory)], joined[len(memory) :]


@torch.no_grad()
def encode_and_project_all(model: MemoryLM, chunks: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Encodes and projects all chunks [C, l] of a document. Returns the keys and values of their
    memories, L x [1, H, M, K] each (none for C = 0), without holding all memories at a time."""
    if not len(chunks):
        return [], []
    whole = empty_slots(model, len(chunks))
    for batch in batched(range(len(chunks)), model.chunks_per_batch):
        keys, values = model.project(model.encode_layers(chunks[batch[0] : batch[-1] + 1]), batch)
        write_rows(whole, batch, [*keys, *values])
    joined = [join_slots(part, 1) for part in whole]
    return joined[: len(joined) // 2], joined[len(joined) // 2 :]


def empty_slots(model: MemoryLM, count: int) -> list[Tensor]:
    """Allocates tensors for the keys, then the values, of `count` chunks: 2L x [count, H, m, K].
    Their strides allow `join_slots` to return views."""
    layers, heads = model.base.model.layers, model.base.config.num_key_value_heads
    shape = heads, count, model.memory_config.num_memory, layers[0].self_attn.head_dim
    return [
        torch.empty(shape, dtype=model.dtype, device=layer_device(layer)).transpose(0, 1)
        for layer in [*layers, *layers]
    ]


@torch.no_grad()
def read_raw(model: MemoryLM, ids: Tensor) -> KVPrefix:
    """Returns the keys and values of a text [T], which the base reads raw."""
    if not len(ids):
        return empty_prefix(model)
    layers = range(len(model.base.model.layers))
    prefix = KVPrefix([[] for _ in layers], [[] for _ in layers], num_local=len(ids))
    model.decode(ids[None], prefix, [0])
    return KVPrefix([[prefix.local[i][0]] for i in layers], [[prefix.local[i][1]] for i in layers])


@torch.no_grad()
def teacher_hidden(model: MemoryLM, sample: Sample) -> list[Tensor]:
    """Returns the base's normed hidden states [T', D] of every teacher text, read raw. Raises
    ValueError if a text is longer than the base's positions."""
    check_teacher(model.limits, sample)
    return [model.decode(text[None], empty_prefix(model), [0])[0] for text in sample.teachers]


@dataclass(frozen=True)
class RowBatch:
    """Rows of a sample that are decoded together. Shorter rows are padded at their end, which no
    token sees.

    numbers: of the rows in the sample;
    ids: [B, T] int64, on the device of the token embedding;
    positions: [N'] int64, of the scored tokens among the B * T, on the device of the final norm;
    targets: [N'] int64, weights: [N'] float64, row_numbers: [N'] int64, the number of each scored
    token's row in the sample, all on the device of the LM head.
    """

    numbers: Sequence[int]
    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    row_numbers: Tensor


def prepare_rows(
    model: MemoryLM, sample: Sample, batches: Sequence[Sequence[int]]
) -> list[RowBatch]:
    """Prepares batches of the sample's rows, given by their numbers. Each device gets its tensors
    of all batches together (see `upload`)."""
    ids, positions, for_head = [], [], []
    for batch in batches:
        rows = [sample.rows[t] for t in batch]
        ids.append(pad_sequence([row.input_ids for row in rows], batch_first=True))
        scored, length = [row.scored for row in rows], ids[-1].shape[1]
        positions.append(torch.cat([i * length + part for i, part in enumerate(scored)]))
        counts = torch.tensor([len(part) for part in scored])
        for_head += [
            torch.cat([row.targets[part] for row, part in zip(rows, scored, strict=True)]),
            torch.cat([row.token_weights[part] for row, part in zip(rows, scored, strict=True)]),
            torch.tensor(batch).repeat_interleave(counts),
        ]
    for_head = upload(for_head, device_of(model.base.lm_head))
    return [
        RowBatch(*parts)
        for parts in zip(
            batches,
            upload(ids, model.device),
            upload(positions, device_of(model.base.model.norm)),
            for_head[::3],
            for_head[1::3],
            for_head[2::3],
            strict=True,
        )
    ]


def decode_scored(
    model: MemoryLM, sample: Sample, rows: RowBatch, prefix: AnyPrefix, move: Move = to_device
) -> Tensor:
    """Decodes a batch of the sample's rows, which read `prefix`. Returns the normed hidden states
    [N', D] of the scored tokens, row after row, on the LM head's device. move: see
    `MemoryLM.decode`."""
    chosen, m = [sample.rows[t] for t in rows.numbers], model.memory_config.num_memory
    num_slots = [row.num_memories * m for row in chosen]
    first_slots = [row.first_memory * m for row in chosen]
    repeats = [row.repeat for row in chosen]
    repeat = torch.tensor(repeats) if any(repeats) else None
    hidden = model.decode(
        rows.ids, prefix, num_slots, repeat=repeat, first_slots=first_slots, move=move
    )
    scored = hidden.flatten(0, 1).index_select(0, rows.positions)
    return to_device(scored, device_of(model.base.lm_head))


def scored_teacher_hidden(
    model: MemoryLM, teachers: Sequence[Tensor], rows: Sequence[Row]
) -> Tensor:
    """Returns the teacher's hidden states [N', D] at the scored tokens of the rows, on the LM
    head's device."""
    parts = [
        teachers[row.teacher[0]][to_device(row.scored + row.teacher[1], teachers[0].device)]
        for row in rows
    ]
    return to_device(torch.cat(parts), device_of(model.base.lm_head))


def decode_rows(
    model: MemoryLM,
    sample: Sample,
    rows: RowBatch,
    prefix: AnyPrefix,
    teachers: Sequence[Tensor] = (),
    move: Move = to_device,
) -> tuple[Tensor, Tensor]:
    """Decodes a batch of the sample's rows, which read `prefix`. Returns the loss and the NLL, in
    nats, of their scored tokens [N'], row after row. teachers: the result of `teacher_hidden`, if
    the sample is distilled. move: see `MemoryLM.decode`."""
    hidden = decode_scored(model, sample, rows, prefix, move)
    chosen = [sample.rows[t] for t in rows.numbers]
    teacher = scored_teacher_hidden(model, teachers, chosen) if teachers else None
    return linear_losses(hidden, model.base.lm_head, rows.targets, teacher, sample.kl_weight)
