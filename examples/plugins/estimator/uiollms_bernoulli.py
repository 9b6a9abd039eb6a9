"""The gradient estimator `plugin:bernoulli`: each memory is kept with a fixed probability."""

import random
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from uiollms import Estimator, EstimatorPlugin


class Bernoulli(EstimatorPlugin):
    """Keeps each memory, independently of the others, with probability `keep`. The gradients of a
    kept memory have the weight 1 / keep, so the estimator is unbiased. A step encodes the part
    `keep` of the chunks with a graph on average; `train.tbptt` has no effect."""

    keep: float = Field(0.5, gt=0, le=1, description="probability that a memory is kept")

    def make_estimator(self, S: int) -> Estimator:
        return KeptMemories(self.keep)


@dataclass(frozen=True)
class KeptMemories(Estimator):
    keep: float

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        kept = [rng.random() < self.keep for _ in range(num_chunks)]
        columns = torch.tensor(kept, dtype=torch.float64) / self.keep
        return columns.expand(num_chunks, -1).tril(-1)
