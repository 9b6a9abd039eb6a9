"""The endless stream of training samples, and documents packed into batches of chunks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import CorpusEntry
from uiollms.config.sections import EnvConfig
from uiollms.data import Mixture, open_corpus
from uiollms.data.builder import SampleBuilder, teaches_memory
from uiollms.data.limits import Limited
from uiollms.data.mixture import Draw
from uiollms.data.sample import Sample
from uiollms.distributed.groups import ALONE, Group
from uiollms.files.errors import ConfigError


@dataclass(frozen=True)
class TrainingSample:
    """A document for the training step.

    source: where the document was read, for messages; rng: the random numbers of the document's
    reservoirs and LoRA dropout. They belong to the document as its text does, so that neither the
    number of processes nor a restart changes them.
    """

    source: str
    sample: Sample
    rng: random.Random


def pack_documents(
    documents: Sequence[TrainingSample], chunk_batch: int
) -> Iterator[list[TrainingSample]]:
    """Groups documents, in their order, so that the chunks of a group fit one batch of
    `chunk_batch` chunks. The encoder and the decoder run a group at once. A document with more
    chunks than a batch forms a group of its own."""
    group: list[TrainingSample] = []
    chunks = 0
    for document in documents:
        count = len(document.sample.chunks)
        if group and chunks + count > chunk_batch:
            yield group
            group, chunks = [], 0
        group.append(document)
        chunks += count
    if group:
        yield group


class SampleStream:
    """The endless streams of training samples, one for each stage of the run. They are the same in
    every process.

    A document from which memory can learn nothing is skipped and counted: a blank document, plain
    text that fits one chunk, or an answer within the first chunk. `weigh` returns a sample with
    the token weights of `token_weighting` "context"; only corpora with that setting need it.
    """

    def __init__(
        self,
        config: EnvConfig,
        tokenizer: PreTrainedTokenizerBase,
        model: Limited,
        weigh: Callable[[Sample], Sample] | None = None,
    ) -> None:
        train = config.train
        builder = SampleBuilder(model, tokenizer, train.loss, weigh)
        self.streams = [
            Stream(builder, entries, train.seed, stage)
            for stage, entries in enumerate(train.corpora)
        ]

    def take(self, count: int, group: Group = ALONE, stage: int = 0) -> list[TrainingSample]:
        """Returns the next `count` samples of a stage's stream, see `Stream.take`."""
        return self.streams[stage].take(count, group)

    @property
    def skipped(self) -> int:
        """The number of skipped documents in all stages."""
        return sum(stream.skipped for stream in self.streams)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data as plain lists and numbers (JSON). The state of the first stage
        is at the top level; "later" lists the states of further stages, if there are any."""
        first, *later = [stream.state_dict() for stream in self.streams]
        return first | ({"later": later} if later else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a position. Raises ConfigError if the corpora have changed since then."""
        states = [state, *state.get("later", ())]
        for stream, stream_state in zip(self.streams, states, strict=True):
            stream.load_state_dict(stream_state)


class Stream:
    """The endless stream of samples of one stage, whose number is `stage`."""

    MOST_SKIPPED = 10_000  # consecutive documents; after that the corpora count as unusable

    def __init__(
        self, builder: SampleBuilder, entries: Sequence[CorpusEntry], seed: int, stage: int = 0
    ) -> None:
        self.builder, self.entries = builder, entries
        corpora = [
            open_corpus(entry.name, builder.tokenizer, entry.corpus_options) for entry in entries
        ]
        self.seed = f"{seed} stage {stage}" if stage else str(seed)
        partitions = [entry.partition for entry in entries]
        self.mixture = Mixture(corpora, partitions, self.seed if stage else seed)
        self.skipped = 0

    def take(self, count: int, group: Group = ALONE) -> list[TrainingSample]:
        """Draws the next `count` samples. Returns all of them, or in a group of several processes
        every `group.size`-th sample from number `group.rank` on.

        Each process opens only the documents that it returns. The processes exchange which
        documents are skipped, so that all of them continue from the same position. Raises
        ConfigError after MOST_SKIPPED consecutive skipped documents.
        """
        taken: list[Draw] = []
        opened: dict[int, TrainingSample | None] = {}
        consecutive = 0  # skipped documents
        while len(taken) < count:
            draws = [next(self.mixture) for _ in range(count - len(taken))]
            for draw in draws[group.rank :: group.size]:
                opened[draw.number] = self.open(draw)
            usable = group.sum(*(opened.get(draw.number) is not None for draw in draws))
            for draw, is_usable in zip(draws, usable, strict=True):
                taken += [draw] if is_usable else []
                consecutive = 0 if is_usable else consecutive + 1
                self.skipped += not is_usable
                if consecutive == self.MOST_SKIPPED:
                    raise ConfigError(
                        f"train.corpus: {consecutive} documents in a row are blank or fit one "
                        f"chunk of {self.builder.model.limits.memory.chunk_size} tokens; memory "
                        f"needs longer ones; the last is {self.mixture.open(draw).source}"
                    )
        # `taken` may assign this process another document than the one that it has opened.
        local = taken[group.rank :: group.size]
        samples = [opened.get(draw.number) or self.open(draw) for draw in local]
        return [sample for sample in samples if sample]

    def open(self, draw: Draw) -> TrainingSample | None:
        """Builds the sample of a draw, the same in every process and at any time. Returns None if
        memory can learn nothing from the document."""
        document = self.mixture.open(draw)
        if document.is_empty:
            return None
        entry = self.entries[draw.corpus]
        sample = self.builder.train(document, entry, self.generator("sample", draw))
        if not teaches_memory(sample):
            return None
        return TrainingSample(document.source, sample, self.generator("step", draw))

    def generator(self, use: str, draw: Draw) -> random.Random:
        return random.Random(f"{self.seed} {use} {draw.number}")

    def state_dict(self) -> dict[str, Any]:
        """The position in the data as plain lists and numbers (JSON)."""
        return {"mixture": self.mixture.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a position. Raises ConfigError if the corpora have changed since then."""
        self.mixture.load_state_dict(state["mixture"])
        self.skipped = state["skipped"]
