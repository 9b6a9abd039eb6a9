"""Goes on training the memory of one document, with all weights frozen.

The slots become parameters. A step draws passages of the document. The decoder reads all slots,
then a passage; the teacher, the base, reads the raw text around the passage, then the same passage.
The loss is KL(teacher || student), so the slots learn what the raw text would tell about the
passage.

Slots that learn passages by heart forget the others. So two of eight passages are never trained
on. One of them selects the slots: the result is the slots that predict these passages best, at
first the original ones. The other measures what was gained.

    refinement = Refinement(model, memory, Settings())
    for _ in range(100):
        refinement.step()
        refinement.select()
    refinement.memory().save("refined.mem")

Shapes: L layers, C chunks, l chunk_size, m num_memory, D hidden size, T tokens of a passage. Source
of the loss: context distillation (Snell et al. 2022, arXiv 2209.15189), with the keys and values of
a document as the student, as in Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from uiollms.data.sample import IGNORED, Row, Sample
from uiollms.distributed.division import Division
from uiollms.distributed.groups import ALONE
from uiollms.files.atomic import atomic_file
from uiollms.files.errors import ConfigError
from uiollms.kernels.indexing import batched
from uiollms.model.layers import layer_device
from uiollms.model.memory import Memory
from uiollms.model.memory_lm import LayerMemory, MemoryLM
from uiollms.model.passes import decode_rows, prepare_rows, project_all, read_raw
from uiollms.model.state import KVPrefix, SharedPrefix, supports_in_place
from uiollms.training.memory_gradients import MemoryGradients
from uiollms.training.optimizer import optimizer_step

HELD_OUT = 8  # of so many passages one is held out to select the slots, and one to measure them


@dataclass(frozen=True)
class Settings:
    """passage_size: tokens of a passage; num_passages: passages of a step; lr: learning rate of
    AdamW, for slots that are divided by the root mean square of their layer; seed: of the order of
    the passages."""

    passage_size: int = 128
    num_passages: int = 4
    lr: float = 0.001
    seed: int = 0


class Refinement:
    """The training of one memory. The weights of the model are not changed; gradients at them are
    cleared.

    Raises ConfigError, whose message begins with `name`, if another model made the memory, if it
    does not contain its text (files of version 0.1), if the text has fewer than HELD_OUT passages,
    or if slots and a passage need more positions than the base has.
    """

    def __init__(
        self,
        model: MemoryLM,
        memory: Memory,
        settings: Settings,
        name: str | Path = "the memory",
    ) -> None:
        memory.check(model, name)
        if memory.chunk_ids is None:
            raise ConfigError(f"{name}: does not contain its text; compress the text again")
        self.model, self.original, self.settings = model, memory, settings
        self.text = memory.chunk_ids.flatten()
        size = settings.passage_size
        positions = model.limits.positions
        if memory.num_slots + size > positions:
            raise ConfigError(
                f"{name}: {memory.num_slots} slots and a passage of {size} tokens need more than "
                f"the base's {positions} positions; take a smaller passage_size"
            )
        segments = range(0, len(self.text) - size + 1, size)
        if len(segments) < HELD_OUT:
            raise ConfigError(
                f"{name}: has {len(self.text)} tokens in full chunks, which are "
                f"{len(segments)} passages of {size}; at least {HELD_OUT} are needed; take a "
                "smaller passage_size"
            )
        self.held_out = list(segments[HELD_OUT - 1 :: HELD_OUT])
        self.selecting = list(segments[HELD_OUT // 2 - 1 :: HELD_OUT])
        never_trained = [*self.held_out, *self.selecting]
        self.starts = [
            start
            for start in range(len(self.text) - size + 1)
            if all(abs(start - other) >= size for other in never_trained)
        ]
        self.starts_of: dict[int, list[int]] = {}  # context -> the passages that it surrounds
        for start in self.starts:
            self.starts_of.setdefault(self.context(start), []).append(start)
        self.context_read: tuple[int, KVPrefix] | None = None
        self.rng, self.num_steps = random.Random(settings.seed), 0
        devices = [layer_device(layer) for layer in model.base.model.layers]
        slots = [
            layer.to(device, model.master_dtype)
            for layer, device in zip(memory.slots, devices, strict=True)
        ]
        self.scales = [layer.square().mean().sqrt() for layer in slots]
        self.parameters = [
            nn.Parameter(layer / scale) for layer, scale in zip(slots, self.scales, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        self.best: list[Tensor] = []  # parameters
        self.best_step, self.best_nll = 0, math.inf
        self.select()

    def slots(self) -> LayerMemory:
        """Returns the slots as they are now, L x [C, m, D] in the model's dtype."""
        return self.scaled(self.parameters)

    def best_slots(self) -> LayerMemory:
        """Returns the selected slots, L x [C, m, D] in the model's dtype."""
        return self.scaled(self.best)

    def scaled(self, parameters: Sequence[Tensor]) -> LayerMemory:
        return [
            (parameter.detach() * scale).to(self.model.dtype)
            for parameter, scale in zip(parameters, self.scales, strict=True)
        ]

    def select(self) -> float:
        """Selects the slots as they are now if they predict the selecting passages better than any
        before. Returns the mean NLL of these passages, in nats a token."""
        nll = self.nll(self.slots(), self.selecting)
        if nll < self.best_nll:
            self.best = [parameter.detach().clone() for parameter in self.parameters]
            self.best_step, self.best_nll = self.num_steps, nll
        return nll

    def memory(self) -> Memory:
        """Returns the memory of the selected slots, which is used as the original is."""
        slots = torch.stack([layer.cpu() for layer in self.best_slots()])
        return replace(self.original, slots=slots)

    def step(self) -> float:
        """Trains on new passages. Returns their mean KL(teacher || student) before the update, in
        nats a token."""
        first = self.rng.choice(self.starts)
        near = self.starts_of[self.context(first)]
        starts = [first, *self.rng.choices(near, k=self.settings.num_passages - 1)]
        loss, grads = distillation_gradients(
            self.model, self.passages(starts), self.slots(), self.teacher_hidden(starts)
        )
        for parameter, scale, grad in zip(self.parameters, self.scales, grads, strict=True):
            parameter.grad = scale * grad.to(parameter.dtype)
        optimizer_step(self.optimizer, self.settings.lr, clip_grad=1.0)
        self.num_steps += 1
        return loss

    def passages(self, starts: Sequence[int]) -> Sample:
        """Returns the passages of the text that begin at `starts`, as rows that read all slots. The
        loss is the mean KL over all passages and scored tokens. The first token of a passage is not
        scored."""
        size, count = self.settings.passage_size, len(starts)
        chunks = self.original.chunk_ids
        assert chunks is not None
        rows = []
        for i, start in enumerate(starts):
            ids = self.text[start : start + size]
            targets = torch.cat([ids[1:], ids.new_tensor([IGNORED])])
            weights = torch.full((size,), 1 / (count * (size - 1)), dtype=torch.float64)
            # Recent tokens are for rows that follow the text, so the start is not the text's end.
            rows.append(Row(ids, targets, weights, len(chunks), start=-1, teacher=(i, 0)))
        return Sample(chunks, tuple(rows), kl_weight=1.0)

    @property
    def context_size(self) -> int:
        """How many tokens the teacher reads before a passage: the whole text, or as many as the
        base has positions for."""
        positions = self.model.limits.positions - self.settings.passage_size
        return min(len(self.text), positions)

    def context(self, start: int) -> int:
        """Returns where the context of the passage at `start` begins. It contains the passage.
        Contexts of a text that is too long for one begin at multiples of a quarter of their size,
        so that few of them are read."""
        size = self.context_size
        first = max(0, start + self.settings.passage_size - size // 2)
        return min(first - first % max(1, size // 4), len(self.text) - size)

    @torch.no_grad()
    def teacher_hidden(self, starts: Sequence[int]) -> list[Tensor]:
        """Returns the base's normed hidden states [T, D] of the passages, after the raw context of
        the first one, whose keys and values stay for the next step."""
        first, size = self.context(starts[0]), self.settings.passage_size
        if self.context_read is None or self.context_read[0] != first:
            self.context_read = None  # before the next one needs memory
            ids = self.text[first : first + self.context_size]
            self.context_read = first, read_raw(self.model, ids)
        prefix = self.context_read[1]
        # One passage at a time, because every row of a batch would have a copy of the context.
        return [
            self.model.decode(
                self.text[None, start : start + size], prefix, [0], local_past=self.context_size
            )[0]
            for start in starts
        ]

    @torch.no_grad()
    def nll(self, slots: LayerMemory, starts: Sequence[int] | None = None) -> float:
        """Returns the mean NLL of the passages that begin at `starts`, in nats a token, after these
        slots, L x [C', m, D]. starts: by default those of the measuring passages."""
        passages = self.passages(self.held_out if starts is None else starts)
        model, sample = self.model, replace(passages, kl_weight=0)
        count = slots[0].shape[0]
        rows = tuple(replace(row, num_memories=count) for row in sample.rows)
        sample = replace(sample, chunks=sample.chunks.new_zeros(count, sample.chunks.shape[1]))
        sample = replace(sample, rows=rows)
        prefix = SharedPrefix(*project_all(model, slots), supports_in_place(model.base))
        batches = [*batched(range(len(rows)), model.chunks_per_batch)]
        found = [
            decode_rows(model, sample, batch, prefix)[1]
            for batch in prepare_rows(model, sample, batches)
        ]
        return torch.cat(found).double().mean().item()

    @torch.no_grad()
    def nll_of_recent(self) -> float:
        """Returns the mean NLL of the measuring passages, in nats a token, after as many raw tokens
        as the memory has slots. They are the tokens before the passage; the first passages of the
        text have fewer."""
        model, count = self.model, self.original.num_slots
        found = []
        for start in self.held_out:
            ids = self.text[max(0, start - count) : start]
            passage = self.text[None, start : start + self.settings.passage_size]
            hidden = model.decode(passage, read_raw(model, ids), [0], local_past=len(ids))
            targets = passage[0, 1:].to(hidden.device)
            found.append(F.cross_entropy(model.logits(hidden)[0, :-1].double(), targets))
        return torch.stack(found).mean().item()

    # ---- saving and resuming ---------------------------------------------------------------------

    def checksum(self) -> str:
        """Returns the SHA-256 of the original slots."""
        data = self.original.slots.contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()

    def save_state(self, path: str | Path) -> None:
        """Writes all that changes, so that `load_state` goes on to the same bits."""
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        tensors |= {f"best.{i}": tensor for i, tensor in enumerate(self.best)}
        for i, parameter in enumerate(self.parameters):
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{i}": tensor for key, tensor in state.items()}
        facts = dict(
            memory=self.checksum(),
            settings=asdict(self.settings),
            num_steps=self.num_steps,
            best_step=self.best_step,
            best_nll=self.best_nll,
            rng=self.rng.getstate(),
        )
        with atomic_file(Path(path)) as work:
            save_file(tensors, work, {"refinement": json.dumps(facts)})

    def load_state(self, path: str | Path) -> None:
        """Continues where `save_state` was called. Raises ConfigError if the file is damaged, or
        was written with other settings or for another memory."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["refinement"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            version, numbers, gauss = facts["rng"]
            made_for = facts["memory"]
            best_step, best_nll = int(facts["best_step"]), float(facts["best_nll"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: no state of a refinement ({error}); begin again without --resume"
            ) from None
        if facts["settings"] != asdict(self.settings):
            raise ConfigError(
                f"{path}: written with {facts['settings']}, not with {asdict(self.settings)}; use "
                "the same settings, or begin again without --resume"
            )
        if made_for != self.checksum():
            raise ConfigError(f"{path}: written for another memory; begin again without --resume")
        self.rng.setstate((version, tuple(numbers), gauss))
        self.num_steps = facts["num_steps"]
        self.best_step, self.best_nll = best_step, best_nll
        states: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            key, number = name.rsplit(".", 1)
            if key == "parameter":
                self.parameters[int(number)].data.copy_(tensor)
            elif key == "best":
                self.best[int(number)].copy_(tensor)
            else:
                states.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})


def distillation_gradients(
    model: MemoryLM, sample: Sample, slots: LayerMemory, teachers: Sequence[Tensor]
) -> tuple[float, LayerMemory]:
    """Returns the loss of a sample whose rows read these slots, L x [C, m, D], and its gradients at
    the slots. It is stages 2 and 3 of a training step (training/step.py), with frozen weights.
    teachers: the teacher's hidden states [T, D] of every row."""
    num_chunks, m = len(sample.chunks), model.memory_config.num_memory
    keys, values = project_all(model, slots)
    ones = torch.ones(len(sample.rows), num_chunks, dtype=torch.float64)
    everything = range(num_chunks)
    gradients = MemoryGradients(keys, values, ones, sample, m, everything, model.master_dtype)
    total = 0.0
    batches = [*batched(range(len(sample.rows)), model.chunk_batch)]
    for rows in prepare_rows(model, sample, batches):
        with torch.enable_grad():
            prefix = gradients.prefix(rows.numbers, supports_in_place(model.base))
            losses, _ = decode_rows(model, sample, rows, prefix, teachers)
            loss = (losses * rows.weights.to(losses)).sum()
            loss.backward()
        total += loss.item()
    division = Division(ALONE, num_chunks, everything)
    grads = gradients.backward_projection(model, slots, division, everything, None)
    model.zero_grad()  # of the decoder's LoRA, which stays as it is
    return total, grads
