"""The passes of encoder, decoder and teacher over all chunks and rows of a sample, batch by batch.

Shapes: N rows, N' scored tokens of a batch, C chunks, l chunk_size, n chunks of this process, T
tokens, T' tokens of a teacher text, m num_memory, M = C * m slots, L layers, H key/value heads, K
head size, D hidden size.
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
    m, size = model.memory_config.num_memory, model.config.hidden_size
    # Allocated before the batches and filled in place, so that these long-lived tensors do not
    # fragment the memory that the batches free.
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
    layers, heads = model.base.model.layers, model.config.num_key_value_heads
    shape = heads, count, model.memory_config.num_memory, layers[0].self_attn.head_dim
    return [
        torch.empty(shape, dtype=model.dtype, device=layer_device(layer)).transpose(0, 1)
        for layer in [*layers, *layers]
    ]


@torch.no_grad()
def teacher_hidden(model: MemoryLM, sample: Sample) -> list[Tensor]:
    """Returns the base's normed hidden states [T', D] of every teacher text, read raw. Raises
    ValueError if a text is longer than the base's positions."""
    check_teacher(model.limits, sample)
    return [model.decode(text[None], empty_prefix(model), [0])[0] for text in sample.teachers]


def decode_scored(
    model: MemoryLM, sample: Sample, batch: Sequence[int], prefix: AnyPrefix
) -> tuple[Tensor, Tensor, Tensor]:
    """Decodes the sample's rows `batch`, which read `prefix`. Shorter rows are padded at their end,
    which no token sees.

    Returns the normed hidden states [N', D] of the scored tokens, row after row, and their targets
    [N'], both on the LM head's device, and the index in the batch of each token's row [N'].
    """
    rows = [sample.rows[t] for t in batch]
    ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    targets = pad_sequence([row.targets for row in rows], batch_first=True, padding_value=IGNORED)
    num_slots = [row.num_memories * model.memory_config.num_memory for row in rows]
    repeat = torch.tensor([row.repeat for row in rows]) if any(row.repeat for row in rows) else None
    first_slots = [row.first_memory * model.memory_config.num_memory for row in rows]
    hidden = model.decode(ids, prefix, num_slots, repeat=repeat, first_slots=first_slots)
    row_of, column = (targets != IGNORED).nonzero(as_tuple=True)
    scored = hidden[to_device(row_of, hidden.device), to_device(column, hidden.device)]
    device = device_of(model.base.lm_head)
    return to_device(scored, device), to_device(targets[row_of, column], device), row_of


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
    batch: Sequence[int],
    prefix: AnyPrefix,
    teachers: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Decodes the sample's rows `batch`, which read `prefix`. Returns the loss and the NLL, in
    nats, of their scored tokens [N'], row after row, and the index in the batch of each token's
    row [N']. teachers: the result of `teacher_hidden`, if the sample is distilled."""
    hidden, targets, row_of = decode_scored(model, sample, batch, prefix)
    teacher = (
        scored_teacher_hidden(model, teachers, [sample.rows[t] for t in batch])
        if teachers
        else None
    )
    return *linear_losses(hidden, model.base.lm_head, targets, teacher, sample.kl_weight), row_of
