"""Runs many documents in one pass of encoder and decoder, with one graph, which uses a GPU fully.

All documents of a batch have the same number of chunks. The whole graph fits in memory here, so
autograd computes the exact gradient of all documents. `uiollms.gradient_step` computes the same
gradient with bounded memory (tests/benchmarks/test_packed.py compares them).

Shapes: B documents, N chunks of each, l chunk_size, m num_memory, w recent_tokens, R rows of the
decoder pass, A of them copies, L layers, H key/value heads, K head size, D hidden size.
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
    """Compressed chunks of a batch of documents, with C chunks each.

    memory:       L tensors [B * C, m, D], document after document
    keys, values: L tensors [B, H, C * m, K], which the rows of a document read
    """

    memory: LayerMemory
    keys: list[Tensor]
    values: list[Tensor]


def encode_documents(model: MemoryLM, ids: Tensor) -> Memories:
    """Compresses [B, C * l] token ids, which are complete chunks."""
    l = model.memory_config.chunk_size
    count = ids.shape[1] // l
    memory = model.encode_layers(ids.reshape(-1, l))
    keys, values = model.project(memory, list(range(count)) * len(ids))
    return Memories(memory, *([join_slots(kv, len(ids)) for kv in of] for of in (keys, values)))


def decode_documents(
    model: MemoryLM, ids: Tensor, memories: Memories | None, copied: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Decodes chunks 1 to N - 1 of [B, N * l] token ids, each after its w recent tokens, and, in
    the same pass, copies of chunks.

    memories: of chunks 0 to N - 2, or None for the no-memory mode
    copied:   numbers of the compressed chunks, 0 to B * (N - 1) - 1, that are copied. A copy starts
              with the `repeat_token` embedding and reads the memory of its chunk alone.
    returns:  normed hidden states of the chunks [B, (N - 1) * l, D] and of the copies [A, l, D]
    """
    c, documents = model.memory_config, len(ids)
    l, w = c.chunk_size, c.recent_tokens
    rows = ids[:, l - w :].unfold(1, w + l, l).reshape(-1, w + l)
    per_document = len(rows) // documents
    if memories is None:
        hidden = model.decode(rows, empty_prefix(model), [0] * len(rows))[:, w:]
        return hidden.reshape(documents, -1, hidden.shape[-1]), hidden[:0]
    num_slots = [(t + 1) * c.num_memory for t in range(per_document)] * documents
    num_slots += [c.num_memory] * len(copied)
    keys, values = ([kv.repeat_interleave(per_document, dim=0) for kv in of] for of in memories[1:])
    repeat = None
    if copied:
        selected = to_device(torch.tensor(copied), ids.device)
        chunks = ids[:, :-l].reshape(-1, l)[selected]
        rows = torch.cat([rows, F.pad(chunks[:, :-1], (1, w))])
        repeat = torch.arange(len(rows)) >= len(rows) - len(copied)
        copy_kv = model.project([layer[selected] for layer in memories.memory], [0] * len(copied))
        width = keys[0].shape[2] - c.num_memory
        keys, values = (
            [
                torch.cat([kv, F.pad(single, (0, 0, 0, width))])
                for kv, single in zip(of, by_layer, strict=True)
            ]
            for of, by_layer in zip((keys, values), copy_kv, strict=True)
        )
    prefix = KVPrefix([[k] for k in keys], [[v] for v in values])
    hidden = model.decode(rows, prefix, num_slots, repeat=repeat)
    split = documents * per_document
    texts, copies = hidden[:split, w:], hidden[split:, :l]
    return texts.reshape(documents, -1, hidden.shape[-1]), copies


def copy_chunks(model: MemoryLM, chunks: Tensor) -> Tensor:
    """Hidden states [A, l, D] of auto-encoding [A, l] token ids: each chunk is predicted from its
    memory alone."""
    keys, values = model.project(model.encode_layers(chunks), [0] * len(chunks))
    prefix = KVPrefix([[k] for k in keys], [[v] for v in values])
    slots, repeat = [model.memory_config.num_memory] * len(chunks), torch.ones(len(chunks)).bool()
    return model.decode(F.pad(chunks[:, :-1], (1, 0)), prefix, slots, repeat=repeat)


@torch.no_grad()
def read_raw(model: MemoryLM, ids: Tensor) -> Tensor:
    """Hidden states [B, (N - 1) * l, D] of chunks 1 to N - 1 when the base reads all of the
    [B, N * l] token ids, without memory."""
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
    """Loss and NLL in nats, in the shape of the targets [...], from hidden states [..., D]."""
    device = device_of(model.base.lm_head)
    flat = [None if h is None else to_device(h.flatten(0, -2), device) for h in (hidden, teacher)]
    found = linear_losses(flat[0], model.base.lm_head, targets.flatten(), flat[1], kl_weight)
    return found[0].view(targets.shape), found[1].view(targets.shape)


class Losses(NamedTuple):
    """Losses of a batch, in nats.

    text, recall: weighted sums of the loss, which includes the KL to the raw-context teacher, over
                  the tokens of text and over the values that questions ask for
    text_nll:     weighted sum of the NLL over the tokens of text
    copy:         mean NLL of the copies
    """

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
    """Computes the losses of a batch in one graph, from [B, N * l + 1] token ids and the weights
    [B, (N - 1) * l] of the tokens after chunk 0 (the `document` protocol), as text and as values
    that questions ask for. Batches of one size differ in the contents of these tensors only, so
    that the graph can be recorded."""
    l = model.memory_config.chunk_size
    read, targets = ids[:, :-1], ids[:, l + 1 :]
    memories = encode_documents(model, read[:, :-l])
    hidden, copies = decode_documents(model, read, memories, copied)
    teacher = read_raw(model, read) if kl_weight else None
    loss, nll = losses(model, hidden, targets, teacher, kl_weight)
    copy = loss.new_zeros(())
    if copied:
        chunks = read[:, :-l].reshape(-1, l)[to_device(torch.tensor(copied), ids.device)]
        copy = losses(model, copies, chunks)[0].mean()
    text, recall = (loss * text_weights).sum(), (loss * recall_weights).sum()
    return Losses(text, (nll * text_weights).sum(), recall, copy)
