"""A mixture of corpora: an endless, resumable stream of documents for training."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from uiollms.data.documents import Corpus, Document
from uiollms.files.errors import ConfigError


class Draw(NamedTuple):
    """One drawn document. number: counts the draws of the stream from 0; corpus: number of the
    corpus; document: number of the document in its corpus."""

    number: int
    corpus: int
    document: int


class Mixture(Iterator[Draw]):
    """An endless stream of documents. Corpora are drawn with probabilities in proportion to
    `shares`, and each corpus is shuffled anew in every epoch.

    Drawing opens no document, so each of several processes draws all documents and opens only some
    of them. `state_dict()` is the whole state: a restored stream continues with the same documents.
    A corpus with a `block_size` (data/readers/hub_stream.py) is read in blocks of consecutive
    documents, each of which is shuffled; any other corpus is one block. The stream needs 8 bytes of
    memory per document of a block; the size of the state does not depend on them.
    """

    def __init__(self, corpora: Sequence[Corpus], shares: Sequence[float], seed: int | str) -> None:
        self.corpora, self.shares = corpora, shares
        self.rng = random.Random(seed)
        # The remaining documents of each corpus's block; the next one is last.
        self.order = [array("q") for _ in corpora]
        # The state of the generator from which each block was shuffled, and the block's number.
        self.epochs: list[Any] = [None] * len(corpora)
        self.blocks = [-1] * len(corpora)
        self.drawn = 0

    def __next__(self) -> Draw:
        corpus = self.rng.choices(range(len(self.corpora)), self.shares)[0]
        if not self.order[corpus]:
            self.epochs[corpus] = self.rng.getstate()
            self.blocks[corpus] += 1
            self.order[corpus] = self.shuffled(corpus, self.rng)
        self.drawn += 1
        return Draw(self.drawn - 1, corpus, self.order[corpus].pop())

    def open(self, draw: Draw) -> Document:
        return self.corpora[draw.corpus][draw.document]

    def shuffled(self, number: int, rng: random.Random) -> array[int]:
        """Shuffles the current block of a corpus. The first block of the next epoch follows the
        last one."""
        size = len(self.corpora[number])
        if not size:
            raise ConfigError(f"train.corpus[{number}] contains no document")
        length = getattr(self.corpora[number], "block_size", size)
        start = self.blocks[number] % -(-size // length) * length
        order = array("q", range(start, min(start + length, size)))
        rng.shuffle(order)
        return order

    def state_dict(self) -> dict[str, Any]:
        """The state as plain lists and numbers (JSON). Its size does not depend on the corpora: the
        state of the generator and the number of remaining documents determine a block's order."""
        return {
            "rng": self.rng.getstate(),
            "epochs": list(self.epochs),
            "blocks": list(self.blocks),
            "left": [len(order) for order in self.order],
            "sizes": [len(documents) for documents in self.corpora],
            "drawn": self.drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state. Raises ConfigError if the corpora have changed since then."""
        sizes = [len(documents) for documents in self.corpora]
        if sizes != list(state["sizes"]):
            raise ConfigError(
                f"train.corpus: the run began with {list(state['sizes'])} documents, now there are "
                f"{sizes}; it can only go on "
                "with the same data"
            )
        # Checkpoints of older versions have no blocks; all of their corpora were one block.
        self.blocks = list(state.get("blocks", [0] * len(sizes)))
        shuffler = random.Random()
        for number, (epoch, left) in enumerate(zip(state["epochs"], state["left"], strict=True)):
            self.order[number] = array("q")
            if epoch is not None:
                shuffler.setstate(generator_state(epoch))
                self.order[number] = self.shuffled(number, shuffler)[:left]
        self.epochs = list(state["epochs"])
        self.rng.setstate(generator_state(state["rng"]))
        self.drawn = state["drawn"]


def generator_state(state: Any) -> tuple[Any, ...]:
    """Converts a state that was read from JSON, which has no tuples, for random.Random.setstate."""
    version, numbers, gauss = state
    return version, tuple(numbers), gauss
