"""What surrounds the training step: samples from documents, the optimizer, norms of gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import CorpusEntry
from uiollms.config.sections import EnvConfig, TrainSection
from uiollms.data import Mixture, open_corpus
from uiollms.data.builder import SampleBuilder, teaches_memory
from uiollms.data.mixture import Draw
from uiollms.data.sample import Sample
from uiollms.distributed.groups import ALONE, Group
from uiollms.files.errors import ConfigError
from uiollms.model.memory_lm import MemoryLM
from uiollms.training.weighting import weigh_tokens


def make_optimizer(model: MemoryLM, config: TrainSection) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.trainable_parameters().values(),
        lr=config.max_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def gradient_norms(model: MemoryLM) -> dict[str, float]:
    """Euclidean norms of the gradients, by what is trained: encoder_lora, decoder_lora,
    token_embeddings (both together)."""
    parts: dict[str, list[torch.Tensor]] = {
        "encoder_lora": [],
        "decoder_lora": [],
        "token_embeddings": [],
    }
    for name, parameter in model.trainable_parameters().items():
        role, kind = name.split(".")[:2]
        if parameter.grad is not None:
            parts[f"{role}_lora" if kind == "layers" else "token_embeddings"].append(parameter.grad)
    return {part: get_total_norm(gradients).item() for part, gradients in parts.items()}


@dataclass(frozen=True)
class TrainingSample:
    """A document for the training step. rng: of its reservoirs and LoRA dropout, as much its own
    as its text, so that neither the number of processes nor a restart changes them."""

    source: str
    sample: Sample
    rng: random.Random


def pack_documents(
    documents: Sequence[TrainingSample], chunk_batch: int
) -> Iterator[list[TrainingSample]]:
    """Documents in their order, those together whose chunks fit one batch: they go through
    encoder and decoder at once."""
    together: list[TrainingSample] = []
    chunks = 0
    for document in documents:
        count = len(document.sample.chunks)
        if together and chunks + count > chunk_batch:
            yield together
            together, chunks = [], 0
        together.append(document)
        chunks += count
    if together:
        yield together


class SampleStream:
    """The endless streams of training samples, one for every stage of the run, the same in every
    process. A document that no memory can help with (blank, plain text that fits one chunk, an
    answer within the first) trains nothing: it is skipped and counted."""

    def __init__(
        self, config: EnvConfig, tokenizer: PreTrainedTokenizerBase, model: MemoryLM
    ) -> None:
        train = config.train
        maker = SampleBuilder(model, tokenizer, train.loss, partial(weigh_tokens, model))
        self.streams = [Stream(maker, of, train.seed, i) for i, of in enumerate(train.corpora)]

    def take(self, count: int, group: Group = ALONE, stage: int = 0) -> list[TrainingSample]:
        """The next `count` samples of a stage's stream: see `Stream.take`."""
        return self.streams[stage].take(count, group)

    @property
    def skipped(self) -> int:
        return sum(stream.skipped for stream in self.streams)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, in plain lists and numbers (JSON): of the first stage, and of
        those behind it, if there are any."""
        first, *later = [stream.state_dict() for stream in self.streams]
        return first | ({"later": later} if later else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the corpora have changed since the state was taken."""
        for stream, own in zip(self.streams, [state, *state.get("later", ())], strict=True):
            stream.load_state_dict(own)


class Stream:
    """The samples of one stage. number: of the stage."""

    MOST_SKIPPED = 10_000  # in a row, before the corpora count as unusable

    def __init__(
        self, maker: SampleBuilder, entries: Sequence[CorpusEntry], seed: int, number: int = 0
    ) -> None:
        self.maker, self.entries = maker, entries
        corpora = [open_corpus(entry.name, maker.tokenizer) for entry in entries]
        self.seed = f"{seed} stage {number}" if number else str(seed)
        shares = [entry.partition for entry in entries]
        self.mixture = Mixture(corpora, shares, self.seed if number else seed)
        self.skipped = 0

    def take(self, count: int, group: Group = ALONE) -> list[TrainingSample]:
        """The next `count` samples, or of those every `group.size`-th from number `group.rank`.
        Each process opens its own, and they tell each other which are skipped, so all go on from
        the same place. Raises ConfigError if all are."""
        taken: list[Draw] = []
        opened: dict[int, TrainingSample | None] = {}
        in_a_row = 0
        while len(taken) < count:
            draws = [next(self.mixture) for _ in range(count - len(taken))]
            for draw in draws[group.rank :: group.size]:
                opened[draw.number] = self.open(draw)
            holders = group.sum(*(opened.get(draw.number) is not None for draw in draws))
            for draw, used in zip(draws, holders, strict=True):
                taken += [draw] if used else []
                in_a_row = 0 if used else in_a_row + 1
                self.skipped += not used
                if in_a_row == self.MOST_SKIPPED:
                    raise ConfigError(
                        f"train.corpus: {in_a_row} documents in a row are blank or fit one chunk "
                        "of "
                        f"{self.maker.model.limits.memory.chunk_size} tokens; memory needs longer "
                        "ones; the last is "
                        f"{self.mixture.open(draw).source}"
                    )
        mine = [
            opened.get(draw.number) or self.open(draw) for draw in taken[group.rank :: group.size]
        ]
        return [drawn for drawn in mine if drawn]

    def open(self, draw: Draw) -> TrainingSample | None:
        """The sample of a draw, None where it trains nothing; the same in every process and at
        any time."""
        document = self.mixture.open(draw)
        if document.is_empty:
            return None
        entry = self.entries[draw.corpus]
        sample = self.maker.train(document, entry, self.generator("sample", draw))
        if not teaches_memory(sample):
            return None
        return TrainingSample(document.source, sample, self.generator("step", draw))

    def generator(self, use: str, draw: Draw) -> random.Random:
        return random.Random(f"{self.seed} {use} {draw.number}")

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, in plain lists and numbers (JSON)."""
        return {"mixture": self.mixture.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the corpora have changed since the state was taken."""
        self.mixture.load_state_dict(state["mixture"])
        self.skipped = state["skipped"]
