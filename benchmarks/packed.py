"""Many documents in one pass of encoder and decoder, with one graph: what fills a GPU.

Documents of a batch have equally many chunks. Everything fits in memory at once here, so plain
autograd gives the exact gradient of all of them; `uiollms.gradient_step` gives the same, document
by document, with bounded memory (tests/benchmarks/test_packed.py holds them against each other).

Shapes: B documents, N chunks of each, l chunk_size, m num_memory, R rows of the decoder pass,
A of them copies, L layers, H key/value heads, K head size, D hidden size.
Source: UIO-LLMs sections 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from uiollms.kernels.devices import device_of, to_device
from uiollms.kernels.linear_cross_entropy import linear_losses
from uiollms.model.memory_lm import LayerMemory, MemoryLM
from uiollms.model.passes import empty_prefix
from uiollms.model.state import KVPrefix, join_slots


class Memories(NamedTuple):
    """memory: L x [B * C, m, D] of all chunks, document after document; keys, values: those that
    stand in front of a document's rows, L x [B, H, C * m, K]."""

    memory: LayerMemory
    keys: list[Tensor]
    values: list[Tensor]


def remember(model: MemoryLM, ids: Tensor) -> Memories:
    """Compress [B, C * l] token ids, complete chunks."""
    l = model.memory_config.chunk_size
    count = ids.shape[1] // l
    memory = model.encode_layers(ids.reshape(-1, l))
    keys, values = model.project(memory, list(range(count)) * len(ids))
    return Memories(memory, *([join_slots(kv, len(ids)) for kv in of] for of in (keys, values)))


def decode_documents(
    model: MemoryLM, ids: Tensor, memories: Memories | None, copied: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The rows of chunks 1 .. N-1 of [B, N * l] token ids behind the memories of their chunks 0 ..
    N-2 (none: the window alone) -> normed hidden states [B, (N - 1) * l, D]; and those of chunks
    that are copied from their own memory alone, [A, l, D], behind the `repeat_token` embedding.

    copied: which of the B * (N - 1) compressed chunks.
    """
    c, documents = model.memory_config, len(ids)
    rows = ids[:, c.chunk_size :].reshape(-1, c.chunk_size)
    per_document = len(rows) // documents
    if memories is None:
        hidden = model.decode(rows, empty_prefix(model), [0] * len(rows))
        return hidden.view(documents, -1, hidden.shape[-1]), hidden[:0]
    num_slots = [(t + 1) * c.num_memory for t in range(per_document)] * documents
    num_slots += [c.num_memory] * len(copied)
    keys, values = ([kv.repeat_interleave(per_document, dim=0) for kv in of] for of in memories[1:])
    repeat = None
    if copied:
        places = to_device(torch.tensor(copied), ids.device)
        chunks = ids[:, : -c.chunk_size].reshape(-1, c.chunk_size)[places]
        rows = torch.cat([rows, F.pad(chunks[:, :-1], (1, 0))])
        repeat = torch.arange(len(rows)) >= len(rows) - len(copied)
        own = model.project([layer[places] for layer in memories.memory], [0] * len(copied))
        width = keys[0].shape[2] - c.num_memory
        keys, values = (
            [
                torch.cat([kv, F.pad(mine, (0, 0, 0, width))])
                for kv, mine in zip(of, by_layer, strict=True)
            ]
            for of, by_layer in zip((keys, values), own, strict=True)
        )
    prefix = KVPrefix([[k] for k in keys], [[v] for v in values])
    hidden = model.decode(rows, prefix, num_slots, repeat=repeat)
    split = documents * per_document
    return hidden[:split].reshape(documents, -1, hidden.shape[-1]), hidden[split:]


def copy_chunks(model: MemoryLM, chunks: Tensor) -> Tensor:
    """Auto-encoding: [A, l] token ids, each chunk from its own memory -> hidden states [A, l,
    D]."""
    keys, values = model.project(model.encode_layers(chunks), [0] * len(chunks))
    prefix = KVPrefix([[k] for k in keys], [[v] for v in values])
    slots, repeat = [model.memory_config.num_memory] * len(chunks), torch.ones(len(chunks)).bool()
    return model.decode(F.pad(chunks[:, :-1], (1, 0)), prefix, slots, repeat=repeat)


@torch.no_grad()
def read_raw(model: MemoryLM, ids: Tensor) -> Tensor:
    """What the base makes of [B, N * l] token ids when it reads all of them: hidden states of
    chunks 1 .. N-1, [B, (N - 1) * l, D]."""
    return model.decode(ids, empty_prefix(model), [0] * len(ids))[
        :, model.memory_config.chunk_size :
    ]


def losses(
    model: MemoryLM,
    hidden: Tensor,
    targets: Tensor,
    teacher: Tensor | None = None,
    kl_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Hidden states [..., D] and targets [...] -> loss and NLL in nats, in the targets' shape."""
    device = device_of(model.base.lm_head)
    flat = [None if h is None else to_device(h.flatten(0, -2), device) for h in (hidden, teacher)]
    found = linear_losses(flat[0], model.base.lm_head, targets.flatten(), flat[1], kl_weight)
    return found[0].view(targets.shape), found[1].view(targets.shape)


class Losses(NamedTuple):
    """Weighted sums over scored tokens, in nats: of text and of the values asked for in
    documents with facts (KL to the raw-context teacher weighed in), text's NLL, and the mean NLL
    of copies."""

    text: Tensor
    text_nll: Tensor
    recall: Tensor
    copy: Tensor


def document_losses(
    model: MemoryLM,
    ids: Tensor,
    text_weights: Tensor,
    recall_weights: Tensor,
    copied: Sequence[int],
    kl_weight: float,
) -> Losses:
    """One graph for a batch: [B, N * l + 1] token ids, and the weights [B, (N - 1) * l] of the
    tokens behind chunk 0 (the `document` protocol) as text and as values that are asked for.
    Nothing but the numbers in these tensors differs from one batch to the next of its size."""
    l = model.memory_config.chunk_size
    read, targets = ids[:, :-1], ids[:, l + 1 :]
    memories = remember(model, read[:, :-l])
    hidden, copies = decode_documents(model, read, memories, copied)
    teacher = read_raw(model, read) if kl_weight else None
    loss, nll = losses(model, hidden, targets, teacher, kl_weight)
    copy = loss.new_zeros(())
    if copied:
        chunks = read[:, :-l].reshape(-1, l)[to_device(torch.tensor(copied), ids.device)]
        copy = losses(model, copies, chunks)[0].mean()
    text, recall = (loss * text_weights).sum(), (loss * recall_weights).sum()
    return Losses(text, (nll * text_weights).sum(), recall, copy)
