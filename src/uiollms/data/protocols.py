"""Protocols: which tokens of a plain text an evaluation scores, and what is read before each.

`Sample` has ours and the paper's. The others are those with which papers on long contexts report
perplexities, so that the same model and the same documents have a number under each of them. What
is meant by "before" depends on the mode of the evaluation (evaluation/scoring.py).

    beacon      Activation Beacon (Zhang et al. 2024, arXiv 2401.03462). All tokens but the
                document's first; the mean over documents of their mean NLLs.
    sliding.L   LongLoRA (Chen et al. 2023, arXiv 2309.12307), after Press et al. 2021 (arXiv
                2108.12409). Windows of L tokens at a stride of 256.
    last.N      CEPE (Yen et al. 2024, arXiv 2402.16617) with N = 256. The document's last tokens.
    segment.N   AutoCompressors (Chevalier et al. 2023, arXiv 2305.14788) with N = 2048. The last
                segment, read raw after the compressed rest.

These are descriptions of what is scored, not copies of the papers' programs: their documents,
tokenizers and lengths are in the papers.

Shapes: T tokens of a document, C complete chunks, l chunk_size.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from uiollms.config.protocols import STRIDE, parse_protocol
from uiollms.data.sample import IGNORED, PROTOCOLS, Sample, flatten_ids


def protocol_samples(protocol: str, input_ids: Tensor, chunk_size: int) -> tuple[Sample, ...]:
    """The samples of a document [T] under a protocol of a config: one for each window of `sliding`,
    else one. Raises ValueError for an unknown protocol, and for a document that `segment` cannot
    score."""
    kind, tokens = parse_protocol(protocol)
    if kind == "sliding":
        return sliding_samples(input_ids, chunk_size, tokens)
    if kind == "last":
        return (last_sample(input_ids, chunk_size, tokens),)
    if kind == "segment":
        return (segment_sample(input_ids, chunk_size, tokens),)
    return (PROTOCOLS[protocol](input_ids, chunk_size),)


def fewest_tokens(protocol: str, chunk_size: int) -> int:
    """The length of the shortest document that has a scored token under a protocol; under `later`
    and `segment` the token reads memory."""
    kind, tokens = parse_protocol(protocol)
    return {"later": chunk_size + 2, "segment": chunk_size + max(2, tokens)}.get(kind, 2)


def sliding_samples(
    input_ids: Tensor, chunk_size: int, length: int, stride: int = STRIDE
) -> tuple[Sample, ...]:
    """Windows of `length` tokens, each of which is a document of its own: its chunks begin at its
    start, and only they leave memories. A window's tokens that no window before it contains are
    scored, in the first window all but the first token. The last window ends with the document and
    may be shorter.

        ids 0..9, chunk_size 2, length 6, stride 3
        -> reads 0 .. 5, scores 1 2 3 4 5
         | reads 3 .. 8, scores 6 7 with the memory of [3 4], and 8 with those of [3 4] and [5 6]
         | reads 6 .. 9, scores 9 with the memory of [6 7]
    """
    ids = flatten_ids(input_ids)
    samples, scored = [], 1
    for start in range(0, len(ids), stride):
        window = ids[start : start + length]
        labels = window.clone()
        labels[: scored - start] = IGNORED
        samples.append(replace(Sample.beacon(window, labels, chunk_size), start=start))
        scored = start + len(window)
        if scored == len(ids):
            break
    return tuple(samples)


def last_sample(input_ids: Tensor, chunk_size: int, count: int) -> Sample:
    """The last `count` tokens of a document, after all tokens before them. If the document has no
    more than `count` tokens, its first is not scored.

        ids 0..9, chunk_size 4, count 3
        -> reads [0 1 2 3] scores nothing
         | reads [4 5 6 7] scores 7, 1/3
         | reads [8 9] scores 8 (predicted in the row before) and 9, 1/3 each
    """
    labels = flatten_ids(input_ids).clone()
    labels[: max(0, len(labels) - count)] = IGNORED
    return Sample.beacon(input_ids, labels, chunk_size)


def segment_sample(input_ids: Tensor, chunk_size: int, count: int) -> Sample:
    """The last `count` tokens of a document as one row, which reads the memories of all complete
    chunks before it. Tokens between these chunks and the segment are read raw and not scored, nor
    is the segment's first token. Raises ValueError if no complete chunk comes before.

        ids 0..9, chunk_size 4, count 4
        -> compresses [0 1 2 3]
         | reads [4 5 6 7 8 9] scores 7 8 9, 1/3 each
    """
    ids = flatten_ids(input_ids)
    start = max(0, len(ids) - count) // chunk_size * chunk_size
    if not start or count < 2:
        raise ValueError(
            f"segment.{count} scores the last {count} tokens (at least 2) after the memory of a "
            f"complete chunk of {chunk_size}; the document has {len(ids)} tokens"
        )
    labels = ids.clone()
    labels[: len(ids) - count + 1] = IGNORED
    row = Sample.beacon(ids[start:], labels[start:], len(ids) - start).rows[0]
    row = replace(row, num_memories=start // chunk_size, start=start)
    return Sample(ids[:start].view(-1, chunk_size), (row,))
