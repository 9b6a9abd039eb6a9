"""Measures tokens per second and memory of a large random model on one GPU. Prints one JSON line
per case.

    python -m benchmarks.gpu_speed --cases score:8192:4 uio:8192:4 exact:8192:4 base:8192:0

A case is PASS:LENGTH:CHUNK_BATCH[:S]. The passes are score, uio, exact and base. In base, the
frozen model reads the raw text, forward and backward to its input. Utilisation compares the useful
FLOPs (uiollms/planning/flops.py) with the rate of a square matrix product on the same card. Every
case runs once before it is timed. The memory is the allocator's peak in the timed run.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.models import random_document, trained
from uiollms import MemoryConfig, MemoryLM
from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import score
from uiollms.files.json_files import as_json
from uiollms.kernels.devices import disable_cudnn_attention
from uiollms.kernels.linear_cross_entropy import linear_nll
from uiollms.planning.flops import Flops
from uiollms.training.step import chunks_with_gradient, gradient_step
from uiollms.weights.base_models import KNOWN_SHAPES


def random_model(name: str, device: torch.device) -> MemoryLM:
    """Builds a model with random weights on the device. `llama7b` has the shape of Llama-2-7B and
    the 32x compressor. `tiny` is for a trial run."""
    if name == "llama7b":
        config = KNOWN_SHAPES["meta-llama/Llama-2-7b-chat-hf"]
        memory = MemoryConfig(chunk_size=1024, num_memory=32, lora_rank=128, lora_alpha=512)
    else:
        shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=128)
        config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
        memory = MemoryConfig(chunk_size=64, num_memory=4, lora_rank=4, lora_alpha=8)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return trained(MemoryLM(base, memory).to(device))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(model: MemoryLM, kind: str, ids: Tensor, S: int) -> tuple[Callable[[], object], float]:
    """The function that a case calls, and its useful FLOPs (0 if they are not counted)."""
    sample = Sample.language_modeling(ids, model.memory_config.chunk_size)
    flops = Flops.of(model)
    if kind == "score":
        return lambda: score(model, ids), flops.scoring(sample)
    if kind == "base":
        return lambda: read_raw_and_backward(model, ids), 0

    from uiollms.training.estimators import Exact, make_estimator

    estimator = Exact() if kind == "exact" else make_estimator(kind, S=S)
    window = estimator.weight_matrix(len(sample.rows), random.Random(0))
    needed = len(chunks_with_gradient(sample, window))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        gradient_step(model, sample, weights=window, report_all=False)

    return step, flops.training(sample, needed)


def read_raw_and_backward(model: MemoryLM, ids: Tensor) -> None:
    """Runs the frozen base over the raw text, with full attention, and backward to its input."""
    embedded = model.base.model.embed_tokens(ids[None].to(model.device)).requires_grad_()
    hidden = model.base.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    linear_nll(hidden[0, :-1], model.base.lm_head, ids[1:].to(model.device)).mean().backward()


def gemm_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOP/s of a square product of random numbers: the median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds[3:])[5]


def measure(model: MemoryLM, case: str, peak: float) -> dict[str, Any]:
    kind, length, chunk_batch, *rest = case.split(":")
    device = model.device
    ids = random_document(model, int(length))
    model.chunk_batch = max(1, int(chunk_batch))
    call, flops = prepare(model, kind, ids, int(rest[0]) if rest else 2)
    call()
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    synchronise(device)
    seconds = time.perf_counter() - start
    found = dict(case=case, seconds=seconds, tokens_a_second=len(ids) / seconds)
    found |= dict(tflops=flops / seconds / 1e12, utilisation=flops / seconds / peak)
    if device.type == "cuda":
        found["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=["llama7b", "tiny"], default="llama7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="no case begins after so many")
    options = parser.parse_args(arguments)
    device, started = torch.device(options.device), time.monotonic()
    disable_cudnn_attention()
    size = 8192 if device.type == "cuda" else 256
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak = gemm_rate(device, size, dtype)
    print(as_json(dict(gemm_tflops=peak / 1e12, size=size, dtype=str(dtype))), flush=True)
    model = random_model(options.model, device)
    model.train()
    for case in options.cases:
        if time.monotonic() - started > options.seconds:
            print(as_json(dict(case=case, left_out="no time")), flush=True)
            continue
        try:
            found = measure(model, case, peak)
        except torch.OutOfMemoryError as error:
            found = dict(case=case, failed=str(error).split(". ")[0])
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        print(as_json(found), flush=True)


if __name__ == "__main__":
    main()
