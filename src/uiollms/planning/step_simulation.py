"""Runs one training step on simulated devices, at the configured shapes, and measures the memory
that it takes on each device.

To save time, only the last two batches of rows, which read the most memory, are decoded, and only
one full batch of chunks is encoded with a graph. Documents that fit one batch together are run
together. One draw of the estimator determines which chunks need gradients, for documents of one
batch the largest of several. The peaks of both phases are linear in the length, so those of
documents of more than MEASURED_BATCHES batches are extrapolated.

Shapes: C chunks in memory, m num_memory, D hidden size, H key/value heads, K head size.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

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
    compute_device,
    device_of,
    localised_map,
    move_modules,
    named_gpus,
    on_disk,
    resolve_map,
    this_machine,
)
from uiollms.distributed.launch import local_process
from uiollms.files.errors import ConfigError
from uiollms.kernels.quantized import NF4_BITS
from uiollms.model.layers import layer_device
from uiollms.model.lora import master_dtype
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.rope import num_positions
from uiollms.planning.flops import Flops
from uiollms.planning.pipeline_speed import estimate_speedup
from uiollms.planning.simulated_devices import SimulatedDevices, simulated
from uiollms.training.estimators import Estimator, all_pairs, configured_estimator
from uiollms.training.optimizer import make_optimizer, optimizer_step
from uiollms.training.step import chunks_with_gradient, gradient_step
from uiollms.weights.base_models import DTYPES, base_config, computes_bf16

# Batches of chunks. Longer documents are extrapolated from this number and two thirds of it.
MEASURED_BATCHES = 6
# Steps on documents of one batch differ in the chunks with a graph; the plan takes the largest of
# this many draws.
DRAWS = 16


class Need(NamedTuple):
    """Bytes on one device at the peak of a step.

    weights:      the frozen base
    trained:      LoRA and token embeddings, their gradients and optimizer state
    memories:     of all chunks
    kv:           keys and values of the memories
    kv_gradients: sums of the gradients of keys and values
    activations:  the rest, mostly graphs
    """

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
    """The training step of a config on simulated devices, for any number of chunks in memory and
    any chunk batch."""

    def __init__(
        self, config: EnvConfig, path: str | Path, machine: dict[torch.device, int] | None = None
    ) -> None:
        self.config, self.path = config, path
        self.memory = check_model(config, path)
        self.shape = base_config(config.model.model_name)
        self.capacity = self.memory.capacity(num_positions(self.shape))
        device_map = config.model.device_map
        named = {as_device(n): 0 for n in named_gpus(localised_map(device_map, local_process()))}
        self.machine = named | this_machine(device_map) if machine is None else machine
        automatic_gpu = (
            not isinstance(device_map, dict | int)
            and device_map != "cpu"
            and any(d.type == "cuda" for d in self.machine)
        )
        on_cpu = not named and not automatic_gpu
        # A GPU is assumed to compute in bfloat16, because this machine may lack it.
        auto = torch.float32 if on_cpu and not computes_bf16(CPU) else torch.bfloat16
        self.dtype = DTYPES.get(config.model.model_dtype, auto)
        self.measured: dict[tuple[int, int], dict[torch.device, Measured]] = {}

    def longest_document(self) -> int:
        """Tokens of the longest document of the run. One of a text corpus without truncation may
        fill the capacity."""
        sizes = self.capacity, self.memory.chunk_size
        return max(
            max_tokens(entry, *sizes) for corpora in self.config.train.corpora for entry in corpora
        )

    def packed(self, chunks: int, batch: int) -> list[int]:
        """The largest documents that one pass takes together (`data.stream.pack_documents`), as
        their numbers of chunks. The longest has `chunks` chunks. If several fit a batch of `batch`
        chunks, they fill it, as far as a step has so many documents."""
        whole, rest = divmod(max(chunks, batch), chunks)
        return ([chunks] * whole + [rest] * (rest > 0))[: self.config.train.accum_grad]

    def need(self, chunks: int, batch: int) -> Needs:
        """Bytes on every device of the map, where the longest document has `chunks` chunks in
        memory, for a chunk batch of `batch`. Documents that fit one batch together count
        together."""
        # Two thirds of it must be enough for all graphs and one more batch.
        far = max(MEASURED_BATCHES, -(-3 * (self.num_graphs + 1) // 2)) * batch
        near = far * 2 // 3
        if chunks <= far:
            measured = self.measure(chunks, batch)
        else:
            a, b = self.measure(near, batch), self.measure(far, batch)
            factor = (chunks - far) / (far - near)
            measured = {
                d: Measured(*(y + (y - x) * factor for x, y in zip(a[d], b[d], strict=True)))
                for d in a
            }
        # The number of chunks with a second sum is random and grows less than linearly. So it is
        # drawn for this length, not extrapolated.
        master_bytes = master_dtype(self.dtype, self.config.train.master_dtype).itemsize
        documents = self.packed(chunks, batch)
        weighted = sum(map(self.num_weighted, documents)) / sum(documents)
        sums = (1 + weighted) * master_bytes / self.dtype.itemsize
        return {
            device: m.need()._replace(kv_gradients=m.kv * sums) for device, m in measured.items()
        }

    def estimator(self) -> Estimator:
        train = self.config.train
        return configured_estimator(train)

    def draw_chunks(self, chunks: int) -> tuple[list[int], bool]:
        """The chunks that need gradients in one draw of the estimator, and whether all weights
        are one."""
        estimator = self.estimator()
        window = estimator.weight_matrix(chunks + 1, random.Random(0))
        return chunks_with_gradient(self.document(chunks), window), torch.equal(
            window, all_pairs(chunks + 1)
        )

    def largest_draw(self, chunks: int) -> int:
        """Of the first DRAWS seeds the one with which most chunks need gradients. If the document
        fits one batch, the step holds the graph of all of them."""

        def count(seed: int) -> int:
            matrix = self.estimator().weight_matrix(chunks + 1, random.Random(seed))
            return len(chunks_with_gradient(self.document(chunks), matrix))

        return max(range(DRAWS), key=count)

    def num_weighted(self, chunks: int) -> int:
        """The number of chunks that have a sum of weighted gradients besides the plain sum."""
        with_gradient, all_ones = self.draw_chunks(chunks)
        return 0 if all_ones else len(with_gradient)

    def measure(self, chunks: int, batch: int) -> dict[torch.device, Measured]:
        """`simulate`, once for every pair of arguments."""
        if (chunks, batch) not in self.measured:
            self.measured[chunks, batch] = self.simulate(chunks, batch)
        return self.measured[chunks, batch]

    def simulate(self, chunks: int, batch: int) -> dict[torch.device, Measured]:
        """Runs one step, clipping and update on simulated devices."""
        train = self.config.train
        base, device_map = self.resolve()
        disk_modules, disk_worker = on_disk(base, device_map), compute_device(device_map)
        device_map = {
            name: disk_worker if device == "disk" else device for name, device in device_map.items()
        }
        with SimulatedDevices() as simulation:
            move_modules(base, device_map)
            weights = Counter(simulation.live)
            model = MemoryLM(base, self.memory, train.master_dtype)
            model.chunk_batch, model.checkpointing = batch, train.checkpointing
            model.pipeline = train.pipeline
            model.train()
            parameters = list(model.trainable_parameters().values())
            optimizer = make_optimizer(model, train)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            trained = simulation.live - weights
            documents = self.packed(chunks, batch)
            if len(documents) == train.accum_grad:  # else an earlier pass has left its gradients
                optimizer.zero_grad()
            again = batch * self.num_graphs
            fixed = FixedBatchEstimator(simulation, again, *self.draw_chunks(chunks))
            simulation.reset_counts()
            # Documents of one batch are simulated with the config's estimator, because the step
            # may keep the graph of such short documents.
            gradient_step(
                model,
                [self.sample(count, batch) for count in documents],
                estimator=fixed if chunks > batch else self.estimator(),
                rng=[0 if chunks > batch else self.largest_draw(count) for count in documents],
                report_all=False,
            )
            optimizer_step(optimizer, train.max_lr, train.clip_grad)
            before, after = fixed.peak or simulation.peak, simulation.peak

            # Weights on disk are in memory one module at a time.
            sizes = [
                sum(p.nbytes for p in base.get_submodule(name).parameters(recurse=False))
                for name in disk_modules
            ]
            saved = Counter({as_device(disk_worker): sum(sizes) - max(sizes)} if sizes else {})
            if self.config.model.quantization:
                saved += quantization_savings(base, device_map)
            weighted = sum(map(self.num_weighted, documents))
            memory = self.memory_bytes(model, sum(documents), weighted)
            result = {}
            for device in sorted(set(map(as_device, device_map.values())), key=str):
                d, on_disk_bytes = simulated(device), saved[device]
                result[device] = Measured(
                    weights[d] - on_disk_bytes,
                    trained[d],
                    *memory.get(d, (0, 0, 0)),
                    before[d] - on_disk_bytes,
                    after[d] - on_disk_bytes,
                )
            return result

    def resolve(self) -> tuple[Any, dict[str, Any]]:
        """Returns the base on the meta device, and the device of its modules."""
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(self.shape, dtype=self.dtype)
        return base, resolve_map(base, self.config.model.device_map, self.path, self.machine)

    @cached_property
    def layer_devices(self) -> list[torch.device]:
        """The device of every layer; of one on disk, that to which it is loaded."""
        base, device_map = self.resolve()
        found = [device_of(f"model.layers.{i}", device_map) for i in range(len(base.model.layers))]
        worker = compute_device(device_map)
        return [as_device(worker if device == "disk" else device) for device in found]

    @property
    def num_graphs(self) -> int:
        """The largest number of batches whose graphs a device holds at the same time."""
        if not self.config.train.pipeline:
            return 1
        # Embedding and final norm may be on devices of their own.
        return 2 + len(list(groupby(self.layer_devices)))

    def document(self, chunks: int) -> Sample:
        """A document with `chunks` chunks in memory. Its last chunk is full if the base's
        positions allow it."""
        length = min((chunks + 1) * self.memory.chunk_size, self.capacity)
        ids = torch.zeros(length, dtype=torch.int64)
        return PROTOCOLS[self.config.train.loss](ids, self.memory.chunk_size)

    def sample(self, chunks: int, batch: int) -> Sample:
        """`document` with the last batches of its rows only: two, or more in a pipeline."""
        sample = self.document(chunks)
        rows = sample.rows[1:]
        left_out = max(0, -(-len(rows) // batch) - 1 - self.num_graphs)
        return replace(sample, rows=rows[left_out * batch :])

    def num_encoded_again(self, chunks: int) -> int:
        """The number of chunks that are encoded with a graph, for one draw of the estimator."""
        if self.estimator().reads_norms:
            return min(self.config.train.tbptt, chunks)
        return len(self.draw_chunks(chunks)[0])

    def flops(self, chunks: int) -> int:
        """Useful FLOPs of a step, for one draw of the estimator."""
        flops = Flops.of_shape(self.shape, self.memory)
        return flops.training(self.document(chunks), self.num_encoded_again(chunks))

    def pipeline_speedup(self, chunks: int, batch: int) -> float:
        """How much faster a step is expected to be with `train.pipeline` than without it."""
        encoded = -(-chunks // batch)
        again = -(-self.num_encoded_again(chunks) // batch)
        return estimate_speedup(self.layer_devices, encoded, encoded, again)

    def memory_bytes(
        self, model: MemoryLM, chunks: int, weighted: int
    ) -> dict[torch.device, tuple[int, int, int]]:
        """Device -> bytes of the memories, of their keys and values, and of the sums of the
        gradients of keys and values, of which `weighted` chunks have two."""
        width, slots = model.dtype.itemsize, self.memory.num_memory
        memory = chunks * slots * self.shape.hidden_size * width
        sums = (chunks + weighted) * model.master_dtype.itemsize
        found: dict[torch.device, tuple[int, int, int]] = {}
        for layer in model.base.model.layers:
            kv = 2 * slots * layer.self_attn.k_proj.out_features
            parts = memory, chunks * kv * width, sums * kv
            device = layer_device(layer)
            memories, pairs, gradients = found.get(device, (0, 0, 0))
            found[device] = memories + parts[0], pairs + parts[1], gradients + parts[2]
        return found


def quantization_savings(base: Any, device_map: dict[str, Any]) -> Counter[torch.device]:
    """Device -> bytes by which nf4 makes the base smaller. The largest matrix of a device is
    converted to the base's dtype for the time of a product, so it does not count."""
    savings: dict[torch.device, list[float]] = {}
    for name, module in base.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            saving = weight.nbytes - weight.numel() * NF4_BITS / 8
            device = as_device(device_of(name, device_map))
            savings.setdefault(device, []).append(saving)
    return Counter({device: round(sum(each) - max(each)) for device, each in savings.items()})


class FixedBatchEstimator(Estimator):
    """Replaces an estimator that gives the chunks `with_gradient` weights other than zero, and
    encodes the first `num_again` of them again. Stores the peak of the first phase in `peak`.

    all_ones: whether all weights are one
    """

    def __init__(
        self,
        simulation: SimulatedDevices,
        num_again: int,
        with_gradient: Sequence[int],
        all_ones: bool,
    ) -> None:
        self.simulation, self.all_ones = simulation, all_ones
        self.with_gradient, self.encoded_again = list(with_gradient), set(with_gradient[:num_again])
        self.peak: Counter[torch.device] = Counter()

    def weight_matrix(self, num_chunks: int, rng: random.Random) -> Tensor:
        if self.all_ones:
            return all_pairs(num_chunks)
        columns = torch.zeros(num_chunks, dtype=torch.float64)
        columns[self.with_gradient] = 0.5
        return all_pairs(num_chunks) * columns

    def columns(self, norms: Sequence[float], rng: random.Random) -> list[float]:
        # The step calls this method between its phases.
        self.peak = self.simulation.peak
        self.simulation.reset_counts()
        return [float(chunk in self.encoded_again) for chunk in range(len(norms))]


class Measured(NamedTuple):
    """Bytes on one device, as in `Need`.

    before: peak until the gradients of the memories are complete
    after:  peak from there on
    """

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


def max_tokens(entry: CorpusEntry, capacity: int, chunk_size: int) -> int:
    """An upper bound of the tokens of a corpus's documents, from its name and truncation."""
    try:
        corpus, arguments = find_corpus(entry.name, entry.corpus_options)
    except ConfigError:  # reading the corpus raises the error
        return min(capacity, entry.truncation or capacity)
    if entry.task == "auto encoding":  # a sample is one chunk
        return chunk_size
    # The name of a tokenised corpus contains the number of tokens: beacons sampled.8192.
    limits = [int(arguments[0] or capacity)] if corpus.needs_tokenizer else []
    if entry.truncation is None and (chunks := corpus.chunk_range(*arguments)[1]):
        limits.append(chunks * chunk_size)
    return min(capacity, entry.truncation or capacity, *limits)
