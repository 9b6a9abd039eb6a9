"""One training step on simulated devices, at the configured shapes, and what it takes on each.

To save time only the last two batches of rows, which read the most memory, are decoded, and one
full batch of chunks is encoded with a graph (which chunks need gradients: one draw of the
estimator); past MEASURED batches the peaks of both phases, linear in the length, are extended.

Shapes: C chunks in memory, m num_memory, D hidden size, H key/value heads, K head size.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from uiollms.build import check_model
from uiollms.config.corpora import CorpusEntry
from uiollms.config.sections import EnvConfig
from uiollms.data import find_corpus
from uiollms.data.sample import PROTOCOLS, Sample
from uiollms.distributed.device_map import (
    CPU,
    as_device,
    on_disk,
    resolved,
    send,
    this_machine,
    worker,
)
from uiollms.files.errors import ConfigError
from uiollms.model.layers import layer_device
from uiollms.model.lora import master_dtype
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.positions import num_positions
from uiollms.planning.flops import Flops
from uiollms.planning.simulated_devices import SimulatedDevices, simulated
from uiollms.training.estimators import Estimator, all_pairs, make_estimator
from uiollms.training.optimizer import make_optimizer
from uiollms.training.step import chunks_with_gradient, gradient_step
from uiollms.weights.base_models import DTYPES, base_config, computes_bf16

MEASURED = 6  # batches of chunks; longer documents are extended from this many and two thirds of it


class Need(NamedTuple):
    """Bytes on one device at the peak of a step. trained: LoRA and tokens, their gradients and
    optimizer state; memories: of all chunks; kv: their keys and values; kv_gradients: the sums
    of step 2; activations: the rest, graphs above all."""

    weights: float
    trained: float
    memories: float
    kv: float
    kv_gradients: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


Needs = dict[torch.device, Need]


class StepSimulation:
    """A config's training step on pretended devices, for any number of chunks in memory and any
    chunk batch."""

    def __init__(
        self, config: EnvConfig, path: str | Path, machine: dict[torch.device, int] | None = None
    ) -> None:
        self.config, self.path = config, path
        self.memory = check_model(config, path)
        self.shape = base_config(config.model.model_name)
        self.capacity = self.memory.capacity(num_positions(self.shape))
        places = config.model.device_map
        named = places.values() if isinstance(places, dict) else [places]
        absent = {as_device(place): 0 for place in named if isinstance(place, int)}
        self.machine = absent | this_machine() if machine is None else machine
        word_means_gpu = (
            not isinstance(places, dict | int)
            and places != "cpu"
            and any(d.type == "cuda" for d in self.machine)
        )
        on_cpu = not absent and not word_means_gpu
        name = (
            config.model.model_dtype
        )  # `auto` on a GPU is taken for bfloat16: the GPU may not be here to be asked
        auto = torch.float32 if on_cpu and not computes_bf16(CPU) else torch.bfloat16
        self.dtype = DTYPES.get(name, auto)
        self.measured: dict[tuple[int, int], dict[torch.device, Measured]] = {}

    def longest_document(self) -> int:
        """Tokens; a corpus of texts without truncation may fill the capacity."""
        sizes = self.capacity, self.memory.chunk_size
        return max(
            tokens_at_most(entry, *sizes) for of in self.config.train.corpora for entry in of
        )

    def need(self, chunks: int, batch: int) -> Needs:
        """Bytes on every device of the map, for a document with so many chunks in memory."""
        near, far = MEASURED * batch * 2 // 3, MEASURED * batch
        if chunks <= far:
            measured = self.measure(chunks, batch)
        else:
            a, b, further = (
                self.measure(near, batch),
                self.measure(far, batch),
                (chunks - far) / (far - near),
            )
            measured = {
                d: Measured(*(y + (y - x) * further for x, y in zip(a[d], b[d], strict=True)))
                for d in a
            }
        # How many chunks have a second sum grows less than linearly, by chance: of the length
        # itself, not extended.
        wide = master_dtype(self.dtype, self.config.train.master_dtype).itemsize
        sums = (1 + self.weighted(chunks) / chunks) * wide / self.dtype.itemsize
        return {
            device: m.need()._replace(kv_gradients=m.kv * sums) for device, m in measured.items()
        }

    def draw(self, chunks: int) -> tuple[list[int], bool]:
        """The chunks that need gradients in one draw of the estimator, and whether all weights
        are one."""
        train = self.config.train
        estimator = make_estimator(train.estimator, S=train.tbptt, compensate=train.compensate)
        window = estimator.weight_matrix(chunks + 1, random.Random(0))
        return chunks_with_gradient(self.document(chunks), window), torch.equal(
            window, all_pairs(chunks + 1)
        )

    def weighted(self, chunks: int) -> int:
        """Chunks that have a sum of weighted gradients beside the sum of all."""
        needed, all_ones = self.draw(chunks)
        return 0 if all_ones else len(needed)

    def measure(self, chunks: int, batch: int) -> dict[torch.device, Measured]:
        if (chunks, batch) not in self.measured:
            self.measured[chunks, batch] = self.rehearse(chunks, batch)
        return self.measured[chunks, batch]

    def rehearse(self, chunks: int, batch: int) -> dict[torch.device, Measured]:
        """One step, clipping and update on pretended devices."""
        train = self.config.train
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(self.shape, dtype=self.dtype)
        places = resolved(base, self.config.model.device_map, self.path, self.machine)
        resting, working = on_disk(base, places), worker(places)
        with SimulatedDevices() as world:
            send(
                base,
                {name: working if place == "disk" else place for name, place in places.items()},
            )
            weights = Counter(world.live)
            model = MemoryLM(base, self.memory, train.master_dtype)
            model.chunk_batch, model.checkpointing = batch, train.checkpointing
            model.train()
            parameters = list(model.trainable_parameters().values())
            optimizer = make_optimizer(model, train)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            trained = world.live - weights
            optimizer.zero_grad()

            sample = self.sample(chunks, batch)
            estimator = make_estimator(train.estimator, S=train.tbptt, compensate=train.compensate)
            stand_in = FixedBatchEstimator(world, batch, *self.draw(chunks))
            world.watch_from_here()
            # A document of one batch is short enough for the estimator itself, which may keep that
            # batch's graph.
            gradient_step(
                model,
                sample,
                estimator=stand_in if chunks > batch else estimator,
                rng=0,
                report_all=False,
            )
            torch.nn.utils.clip_grad_norm_(parameters, train.clip_grad or math.inf)
            optimizer.step()
            before, after = stand_in.peak or world.peak, world.peak

            # Weights on disk are in memory one module at a time.
            sizes = [
                sum(p.nbytes for p in base.get_submodule(name).parameters(recurse=False))
                for name in resting
            ]
            saved = Counter({as_device(working): sum(sizes) - max(sizes)} if sizes else {})
            memory = self.memory_bytes(model, chunks, self.weighted(chunks))
            devices = {
                as_device(working if place == "disk" else place) for place in places.values()
            }
            result = {}
            for device in sorted(devices, key=str):
                d, less = simulated(device), saved[device]
                kept = memory.get(d, (0, 0, 0))
                result[device] = Measured(
                    weights[d] - less, trained[d], *kept, before[d] - less, after[d] - less
                )
            return result

    def document(self, chunks: int) -> Sample:
        """A document with so many chunks in memory; its last chunk is full if positions allow."""
        length = min((chunks + 1) * self.memory.chunk_size, self.capacity)
        ids = torch.zeros(length, dtype=torch.int64)
        return PROTOCOLS[self.config.train.loss](ids, self.memory.chunk_size)

    def sample(self, chunks: int, batch: int) -> Sample:
        """The same with only the last two batches of its rows."""
        sample = self.document(chunks)
        rows = sample.rows[1:]
        return replace(sample, rows=rows[max(0, -(-len(rows) // batch) - 2) * batch :])

    def flops(self, chunks: int) -> int:
        """Useful FLOPs of a step, for one draw of the estimator."""
        sample, train = self.document(chunks), self.config.train
        estimator = make_estimator(train.estimator, S=train.tbptt, compensate=train.compensate)
        backwards = min(train.tbptt, chunks) if estimator.reads_norms else len(self.draw(chunks)[0])
        return Flops.of_shape(self.shape, self.memory).training(sample, backwards)

    def memory_bytes(
        self, model: MemoryLM, chunks: int, weighted: int
    ) -> dict[torch.device, tuple[int, int, int]]:
        """Memories, their keys and values, and the sums of those' gradients (two of `weighted`
        chunks), by device."""
        width, each = model.dtype.itemsize, self.memory.num_memory
        memory = chunks * each * self.shape.hidden_size * width
        sums = (chunks + weighted) * model.master_dtype.itemsize
        found: dict[torch.device, tuple[int, int, int]] = {}
        for layer in model.base.model.layers:
            kv = 2 * each * layer.self_attn.k_proj.out_features
            parts = memory, chunks * kv * width, sums * kv
            device = layer_device(layer)
            memories, pairs, gradients = found.get(device, (0, 0, 0))
            found[device] = memories + parts[0], pairs + parts[1], gradients + parts[2]
        return found


class FixedBatchEstimator(Estimator):
    """Stands in for any estimator that gives the chunks `needed` weights that are not zero: of
    them one full batch is encoded again. Notes the peak when it is asked which."""

    def __init__(
        self, world: SimulatedDevices, batch: int, needed: Sequence[int], all_ones: bool
    ) -> None:
        self.world, self.all_ones = world, all_ones
        self.needed, self.chosen = list(needed), set(needed[:batch])
        self.peak: Counter[torch.device] = Counter()

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        if self.all_ones:
            return all_pairs(num_chunks)
        columns = torch.zeros(num_chunks, dtype=torch.float64)
        columns[self.needed] = 0.5
        return all_pairs(num_chunks) * columns

    def columns(self, norms: Sequence[float], rng: random.Random) -> list[float]:
        self.peak = self.world.peak
        self.world.watch_from_here()
        return [float(chunk in self.chosen) for chunk in range(len(norms))]


class Measured(NamedTuple):
    """Bytes on one device; `before` and `after`: peaks until the memories' gradients are known,
    and from there on."""

    weights: float
    trained: float
    memories: float
    kv: float
    kv_gradients: float
    before: float
    after: float

    def need(self) -> Need:
        parts = self[:5]
        return Need(*parts, max(self.before, self.after) - sum(parts))


def tokens_at_most(entry: CorpusEntry, capacity: int, chunk_size: int) -> int:
    """Tokens of a corpus's longest document, as far as its name and truncation say."""
    try:
        corpus, arguments = find_corpus(entry.name)
    except ConfigError:  # whoever reads the corpus refuses it
        return min(capacity, entry.truncation or capacity)
    if entry.task == "auto encoding":  # one chunk of a document, as the decoder's only row
        return chunk_size
    named = [int(arguments[0] or capacity)] if corpus.tokenized else []  # beacons sampled.8192
    if entry.truncation is None and (chunks := corpus.chunks(*arguments)[1]):
        named.append(chunks * chunk_size)
    return min(capacity, entry.truncation or capacity, *named)
