"""Documents for training: corpora mixed by their shares, endless, and able to go on where they
stopped."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from uiollms.data.documents import Corpus, Document
from uiollms.files.errors import ConfigError


class Draw(NamedTuple):
    """number: of the draw, 0 for the stream's first; corpus, place: which document it gave."""

    number: int
    corpus: int
    place: int


class Mixture(Iterator[Draw]):
    """An endless stream of documents: corpora drawn by their shares, each corpus shuffled anew
    every epoch. Drawing opens nothing, so every one of several processes draws all and opens its
    own. All of its state is `state_dict()`: a stream that is restored goes on with the same
    documents. Costs 8 bytes a document of memory; the state costs none."""

    def __init__(self, corpora: Sequence[Corpus], shares: Sequence[float], seed: int | str) -> None:
        self.corpora, self.shares = corpora, shares
        self.rng = random.Random(seed)
        self.order = [
            array("q") for _ in corpora
        ]  # what is left of each corpus's epoch, the next document last
        self.epochs: list[Any] = [None] * len(
            corpora
        )  # the generator's state that each epoch was shuffled from
        self.drawn = 0

    def __next__(self) -> Draw:
        corpus = self.rng.choices(range(len(self.corpora)), self.shares)[0]
        if not self.order[corpus]:
            self.epochs[corpus] = self.rng.getstate()
            self.order[corpus] = self.shuffled(corpus, self.rng)
        self.drawn += 1
        return Draw(self.drawn - 1, corpus, self.order[corpus].pop())

    def open(self, draw: Draw) -> Document:
        return self.corpora[draw.corpus][draw.place]

    def shuffled(self, number: int, rng: random.Random) -> array[int]:
        if not len(self.corpora[number]):
            raise ConfigError(f"train.corpus[{number}] holds no document")
        order = array("q", range(len(self.corpora[number])))
        rng.shuffle(order)
        return order

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers (JSON), of the same size for any corpus: an epoch's order is
        given by the generator's state it was shuffled from, and how much of it is left."""
        return {
            "rng": self.rng.getstate(),
            "epochs": list(self.epochs),
            "left": [len(order) for order in self.order],
            "sizes": [len(documents) for documents in self.corpora],
            "drawn": self.drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the corpora have changed since the state was taken."""
        sizes = [len(documents) for documents in self.corpora]
        if sizes != list(state["sizes"]):
            raise ConfigError(
                f"train.corpus: the run began with {list(state['sizes'])} documents, now there are "
                f"{sizes}; it can only go on "
                f"with the same data"
            )
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
    """What random.Random.setstate takes, from a state that may have been through JSON, which
    knows no tuples."""
    version, numbers, gauss = state
    return version, tuple(numbers), gauss
