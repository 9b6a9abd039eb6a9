"""Scores held-out text with memory and with its controls, many documents in one pass. Every chunk
but the first is scored in these modes:

    window     the chunk reads no memory (the no-memory mode)
    shuffled   the chunk reads as many memories, of the next document
    own        the chunk reads the memories of its document
    recent     the chunk reads as many raw tokens before it as memory has slots
    raw        the chunk reads all tokens before it

In every mode the chunk also reads its recent tokens (`recent_tokens`), which `recent` and `raw`
have anyway: `recent` reads so many more.

Shapes: B documents, N chunks of each, T = N * l tokens of a document, l chunk_size, m num_memory, w
recent_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import packed
from benchmarks.recall_data import Corpus
from uiollms.evaluation.statistics import difference
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import empty_prefix

MODES = ("window", "shuffled", "own", "recent", "raw")


class Size(NamedTuple):
    """Sizes into which documents are cut."""

    chunk_size: int
    num_memory: int
    num_chunks: int


@torch.no_grad()
def evaluate(
    model: MemoryLM, testing: Mapping[str, Corpus], sizes: Sequence[Size], count: int
) -> Iterator[dict[str, Any]]:
    """Yields one result for each size and corpus.

    Each mode has the mean NLL over the tokens of all chunks but the first. `bound` (shuffled -
    own), `below_window` and `below_recent` have 95 % intervals, from documents drawn with
    replacement. `last` has the same numbers for the last chunk alone. `copied_right` is the
    fraction of right tokens when a chunk is predicted from its memory and its true tokens
    before."""
    model.eval()
    trained = model.memory_config
    for size in sizes:
        sizes_ = dict(chunk_size=size.chunk_size, num_memory=size.num_memory)
        model.memory_config = trained.model_copy(update=sizes_)
        for name, corpus in testing.items():
            length = size.chunk_size * size.num_chunks
            ids = corpus.first(count, length + 1).to(model.device)
            if len(ids) > 1:
                yield dict(corpus=name, **size._asdict(), **document_nlls(model, ids))
    model.memory_config = trained


def document_nlls(model: MemoryLM, ids: Tensor) -> dict[str, Any]:
    """The numbers of `evaluate` for [B, T + 1] token ids."""
    l = model.memory_config.chunk_size
    by_mode: dict[str, list[Tensor]] = {mode: [] for mode in MODES}
    right: list[Tensor] = []
    for i in range(0, len(ids), 8):
        part = ids[i : i + 8]
        other = ids[torch.arange(i + 1, i + 1 + len(part)) % len(ids)]
        read, targets = part[:, :-1], part[:, l + 1 :]
        memories = packed.encode_documents(model, read[:, :-l])
        hidden = {
            "window": packed.decode_documents(model, read, None)[0],
            "own": packed.decode_documents(model, read, memories)[0],
            "recent": read_recent(model, read),
            "raw": packed.read_raw(model, read),
        }
        borrowed = packed.encode_documents(model, other[:, : read.shape[1] - l])
        hidden["shuffled"] = packed.decode_documents(model, read, borrowed)[0]
        for mode, states in hidden.items():
            by_mode[mode].append(packed.losses(model, states, targets)[1])
        chunks = read[:, :l]
        found = model.logits(packed.copy_chunks(model, chunks)).argmax(-1)
        right.append((found == chunks).float().mean(1))
    whole = {
        mode: torch.cat(parts).double().cpu() for mode, parts in by_mode.items()
    }  # [B, (N - 1) * l]
    found = compared({mode: nll.mean(1) for mode, nll in whole.items()})
    found["last"] = compared({mode: nll[:, -l:].mean(1) for mode, nll in whole.items()})
    return dict(documents=len(ids), **found, copied_right=float(torch.cat(right).mean()))


def compared(nll: Mapping[str, Tensor]) -> dict[str, Any]:
    """The mean over documents of NLLs [B] by mode, and the gains of memory over its controls."""
    found: dict[str, Any] = {mode: float(of.mean()) for mode, of in nll.items()}
    by_document = {mode: dict(enumerate(of.split(1))) for mode, of in nll.items()}
    for name, mode in dict(bound="shuffled", below_window="window", below_recent="recent").items():
        gain = difference(by_document[mode], by_document["own"])
        if gain:
            found[name], found[f"{name}_interval"] = gain.value, list(gain.interval_95)
    return found


def read_recent(model: MemoryLM, ids: Tensor) -> Tensor:
    """Hidden states [B, (N - 1) * l, D] of chunks 1 to N - 1 of [B, N * l] token ids when each
    reads, instead of memory, as many raw tokens before its recent ones as memory has slots."""
    l, m = model.memory_config.chunk_size, model.memory_config.num_memory
    w = model.memory_config.recent_tokens
    rows = []
    for t in range(1, ids.shape[1] // l):
        start = max(0, t * (l - m) - w)
        read = ids[:, start : (t + 1) * l]  # t * m + w tokens, then the chunk
        rows.append(model.decode(read, empty_prefix(model), [0] * len(ids))[:, -l:])
    return torch.cat(rows, dim=1)
