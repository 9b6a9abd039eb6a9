"""A document of any corpus -> the sample that training takes a step on and evaluation scores.

Shapes: T tokens of a document.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.config import ConfigError
from uiollms.data import Document, NewsDocument, TokenDocument
from uiollms.model import MemoryLM
from uiollms.tasks import PROTOCOLS, Sample


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> Tensor:
    """[T] int64, with the tokenizer's own first tokens (BOS) if `special`; its warning about length is off, memory is there
    for that."""
    return torch.tensor(tokenizer(text, verbose=False, add_special_tokens=special).input_ids, dtype=torch.int64)


@dataclass(frozen=True)
class SampleMaker:
    """Documents -> samples, each by its own task. protocol: who is scored in plain text, "paper" or "document"."""

    model: MemoryLM
    tokenizer: PreTrainedTokenizerBase
    protocol: str = "paper"

    def make(self, document: Document, truncation: int | None, rng: random.Random, crop: str = "start") -> Sample:
        """At most `truncation` tokens of a document (None: the capacity), plain text from its start or, with `crop` "random",
        from a random place. `rng` draws that place, the probe of memory utilization and where a news story is hidden. Raises
        ConfigError, naming the document, where it does not fit."""
        try:
            return self._build(document, truncation, rng, crop)
        except ValueError as error:
            raise ConfigError(f"{document.source}: {error}") from None

    def _build(self, document: Document, truncation: int | None, rng: random.Random, crop: str) -> Sample:
        most = truncation or self.model.capacity
        chunk_size = self.model.memory_config.chunk_size
        if isinstance(document, TokenDocument):
            ids, labels = (torch.tensor(side[:most]) for side in (document.input_ids, document.labels))
            sample = Sample.beacon(ids, labels, chunk_size)
            return sample.distilled(document.kl_weight) if document.kl_weight else sample
        if isinstance(document, NewsDocument):
            return self._ask_news(document, most, rng)
        ids = tokenize(self.tokenizer, document.text)
        if document.task == "question answering":
            response = tokenize(self.tokenizer, document.response or "", special=False)
            return Sample.question_answering(ids, response, chunk_size, document.train_prompt, most)
        if document.task == "memory utilization":
            probe = torch.tensor([rng.randrange(self.model.config.vocab_size) for _ in range(chunk_size)])
            ids = ids[: min(most, self.model.config.max_position_embeddings - chunk_size)]
            enough = len(ids) >= chunk_size
            return Sample.memory_utilization(ids, probe, chunk_size) if enough else Sample.document(ids, chunk_size)
        if document.task in ("auto encoding", "longdata copy"):
            ids = ids[: min(most, self.model.capacity - chunk_size)]  # the copies stand behind all memories
            return Sample.copy(ids, chunk_size) if len(ids) >= chunk_size else Sample.document(ids, chunk_size)
        return PROTOCOLS[self.protocol](self._cut(ids, truncation, rng, crop), chunk_size)

    def _ask_news(self, document: NewsDocument, most: int, rng: random.Random) -> Sample:
        """The story hidden at a random place of its distractor text, together a whole number of chunks within `most` tokens
        (and, where a teacher reads them raw, within the base's positions); every question and the summary asked of it."""
        chunk_size = self.model.memory_config.chunk_size
        if document.kl_weight:
            most = min(most, self.model.config.max_position_embeddings - chunk_size)
        most = most // chunk_size * chunk_size
        story = tokenize(self.tokenizer, document.text)[:most]
        around = tokenize(self.tokenizer, document.distractor, special=False)
        whole = (len(story) + len(around)) // chunk_size * chunk_size
        around = around[: max(0, min(most, whole) - len(story))]
        place = rng.randint(0, len(around))
        context = torch.cat([around[:place], story, around[place:]])
        asked = [(f"Question: {question}\nAnswer:", answer) for question, answer in document.questions]
        asked += [("Summary of the story:", document.summary)] if document.summary.strip() else []
        tokens = [tuple(tokenize(self.tokenizer, side, special=False) for side in (q, f" {a}")) for q, a in asked]
        fitting = [(q, a[: chunk_size - 1]) for q, a in tokens]
        return Sample.questions(context, fitting, chunk_size, document.kl_weight)

    def _cut(self, ids: Tensor, truncation: int | None, rng: random.Random, crop: str) -> Tensor:
        """At most `truncation` tokens, from the start or from a random place; without one, at most the capacity."""
        length = min(truncation or len(ids), self.model.capacity)
        start = rng.randint(0, len(ids) - length) if crop == "random" and len(ids) > length else 0
        return ids[start : start + length]


def teaches_memory(sample: Sample) -> bool:
    """Whether memory can matter to the sample's loss: some scored row reads any."""
    return any(row.num_memories and len(row.scored) for row in sample.rows)
