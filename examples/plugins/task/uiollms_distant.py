"""The task `plugin:distant`: each chunk is predicted from the memories of distant chunks only."""

import random
from dataclasses import replace

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from uiollms import Document, Sample, TaskPlugin


class Distant(TaskPlugin):
    """Language modelling in which a chunk reads no memory of the `gap` chunks before it, so that
    only what memory carries over a distance helps. Tokens of chunks that read no memory are not
    scored.

        ids 0..13, chunk_size 4, gap 1 -> compresses [0 1 2 3] [4 5 6 7]
                                        | reads [8 9 10 11] and memory 0, scores 9 .. 12, 1/5 each
                                        | reads [12 13] and memories 0, 1, scores 13, 1/5
    """

    gap: int = Field(1, ge=0, description="number of chunks before a chunk that it does not read")

    def make_sample(
        self,
        document: Document,
        tokenizer: PreTrainedTokenizerBase,
        chunk_size: int,
        length: int,
        rng: random.Random,
    ) -> Sample:
        ids = tokenizer(document.text, return_tensors="pt").input_ids[0, :length]
        whole = Sample.document(ids, chunk_size)
        rows = [
            replace(row, num_memories=row.num_memories - self.gap)
            for row in whole.rows
            if row.num_memories > self.gap and len(row.scored)
        ]
        if not rows:
            return Sample(whole.chunks[:0], ())
        count = sum(len(row.scored) for row in rows)
        weighted = tuple(
            replace(row, token_weights=torch.full_like(row.token_weights, 1 / count))
            for row in rows
        )
        return Sample(whole.chunks[: rows[-1].num_memories], weighted)
