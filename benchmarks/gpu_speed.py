"""Measures tokens per second and memory of a large random model on one GPU, and compares the memory
with the plan. Prints one JSON line per case.

    python -m benchmarks.gpu_speed --cases score:8192:4 uio:8192:4 exact:8192:4 base:8192:0

A case is PASS:LENGTH:CHUNK_BATCH[:S], with these passes:

    score          scoring of a document
    uio, exact     a training step with clipping and AdamW
    base           the frozen model reads the raw text, forward and backward to its input
    baseline       the straightforward algorithm of baseline.py, whose gradients are those of uio
    generate       64 tokens, generated greedily after LENGTH tokens of memories

Utilisation compares the useful FLOPs (uiollms/planning/flops.py) with the rate of a square matrix
product on the same card. Every case runs before it is timed, long documents only in part. The
memory is the allocator's peak in the timed run; on a CPU it is that of the tensors in one more run.
`plan_error` is what `--dry_run` predicts for the step divided by what tensors took, less one, and
`plan_error_reserved` the same for what the allocator reserved. The plans are computed in processes
beside the measurements.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.baseline import Baseline
from benchmarks.comparisons import continue_stream, random_state
from benchmarks.gemm import SQUARE, square_rate
from benchmarks.measure import most_alive, seconds_of
from benchmarks.models import MODELS, dtype_on, random_document
from benchmarks.passes import reservoir_draws
from benchmarks.plan import env_config, planned_bytes
from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import score
from uiollms.files.json_files import as_json
from uiollms.kernels.devices import disable_cudnn_attention
from uiollms.kernels.linear_cross_entropy import linear_nll
from uiollms.model.memory_lm import MemoryLM
from uiollms.planning.flops import Flops
from uiollms.training.estimators import make_estimator
from uiollms.training.optimizer import make_optimizer, optimizer_step
from uiollms.training.step import chunks_with_gradient, gradient_step

PASSES = ("score", "uio", "exact", "base", "baseline", "generate")
NEW_TOKENS = 64
# A document of more tokens is warmed up with its first tokens only.
MOST_WARM_UP = 16384
TOP = 15  # kernels of a profile that are listed
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


class Case(NamedTuple):
    """A case of the command line."""

    name: str
    kind: str
    length: int
    chunk_batch: int
    S: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises argparse.ArgumentTypeError, so that the command line names a wrong case."""
        kind, *numbers = text.split(":")
        if (
            kind not in PASSES
            or len(numbers) not in (2, 3)
            or not all(n.isdecimal() for n in numbers)
        ):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected PASS:LENGTH:CHUNK_BATCH[:S] with a pass of {', '.join(PASSES)}"
            )
        return cls(text, kind, *map(int, numbers), *([2] if len(numbers) == 2 else []))

    @property
    def is_step(self) -> bool:
        return self.kind in ("uio", "exact")

    def train_fields(self) -> dict[str, Any]:
        """The fields of the config's section `train` that the step uses."""
        return {"estimator": self.kind, "tbptt": self.S, "chunk_batch": self.chunk_batch}


class Prepared(NamedTuple):
    """A case that is ready to be measured.

    run:    the pass over the document
    warm:   the pass that is run before, over its first tokens
    flops:  useful FLOPs of `run`, 0 if they are not counted
    tokens: of the document, or generated tokens
    alive:  bytes of the tensors that exist before `run`
    """

    run: Callable[[], object]
    warm: Callable[[], object]
    flops: float
    tokens: int
    alive: int


def prepare(model: MemoryLM, case: Case) -> Prepared:
    ids = random_document(model, case.length)
    first = ids[:MOST_WARM_UP]
    sample = Sample.language_modeling(ids, model.memory_config.chunk_size)
    flops = Flops.of(model)
    alive = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if case.kind == "score":
        return Prepared(
            lambda: score(model, ids),
            lambda: score(model, first),
            flops.scoring(sample),
            case.length,
            alive,
        )
    if case.kind == "base":
        run = lambda: read_raw_and_backward(model, ids)  # noqa: E731
        return Prepared(run, run, 0, case.length, alive)
    if case.kind == "baseline":
        baseline, draws = Baseline(model), reservoir_draws(sample, case.S)
        run = lambda: baseline.train_step(sample, case.S, draws)  # noqa: E731
        return Prepared(run, run, 0, case.length, alive)
    if case.kind == "generate":
        state = random_state(model, case.length)
        run = lambda: continue_stream(model, state, NEW_TOKENS)  # noqa: E731
        slots = case.length // model.memory_config.chunk_size * model.memory_config.num_memory
        return Prepared(run, run, NEW_TOKENS * flops.generation(slots), NEW_TOKENS, alive)
    return prepare_step(model, case, sample, alive)


def prepare_step(model: MemoryLM, case: Case, sample: Sample, alive: int) -> Prepared:
    """A training step as in train.py. AdamW's moments exist before it."""
    train = env_config(case.train_fields()).train
    estimator = make_estimator(train.estimator, S=train.tbptt, compensate=train.compensate)
    optimizer = make_optimizer(model, train)
    short = Sample.language_modeling(
        random_document(model, min(case.length, MOST_WARM_UP)), model.memory_config.chunk_size
    )

    def step(sample: Sample) -> None:
        gradient_step(model, sample, estimator=estimator, rng=0, report_all=False)
        optimizer_step(optimizer, train.max_lr, train.clip_grad)

    window = estimator.weight_matrix(len(sample.rows), random.Random(0))
    flops = Flops.of(model).training(sample, len(chunks_with_gradient(sample, window)))
    moments = 2 * sum(parameter.nbytes for parameter in model.trainable_parameters().values())
    return Prepared(lambda: step(sample), lambda: step(short), flops, case.length, alive + moments)


def read_raw_and_backward(model: MemoryLM, ids: Tensor) -> None:
    """Runs the frozen base over the raw text, with full attention, and backward to its input."""
    embedded = model.base.model.embed_tokens(ids[None].to(model.device)).requires_grad_()
    hidden = model.base.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    linear_nll(hidden[0, :-1], model.base.lm_head, ids[1:].to(model.device)).mean().backward()


def measure(model: MemoryLM, case: Case, peak: float, plan: Future[int] | None) -> dict[str, Any]:
    """Measures a case. `peak`: FLOP/s of a square product. `plan`: bytes."""
    device = model.device
    model.chunk_batch = max(1, case.chunk_batch)
    model.train(case.kind != "generate")
    prepared = prepare(model, case)
    prepared.warm()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(prepared.run, device)
    found: dict[str, Any] = dict(case=case.name, seconds=seconds)
    found |= dict(tokens_a_second=prepared.tokens / seconds)
    if prepared.flops:
        found |= dict(tflops=prepared.flops / seconds / 1e12)
        found |= dict(utilisation=prepared.flops / seconds / peak)
    if device.type == "cuda":
        memory = dict(
            allocated=torch.cuda.max_memory_allocated(device),
            reserved=torch.cuda.max_memory_reserved(device),
        )
    else:
        memory = dict(allocated=prepared.alive + most_alive(prepared.run))
    found |= {f"{name}_gib": size / 2**30 for name, size in memory.items()}
    if plan is not None:
        planned = plan.result()
        found |= dict(planned_gib=planned / 2**30)
        found |= dict(plan_error=planned / memory["allocated"] - 1)
        if "reserved" in memory:
            found |= dict(plan_error_reserved=planned / memory["reserved"] - 1)
    return found


def profiled(model: MemoryLM, case: Case) -> dict[str, Any]:
    """Profiles a case: the kernels that take most of the time, with their seconds and their calls,
    the number of kernels launched, and the fraction of the time in which the GPU computes. On a
    CPU torch's operators take the place of the kernels."""
    device = model.device
    on_gpu = device.type == "cuda"
    model.chunk_batch = max(1, case.chunk_batch)
    prepared = prepare(model, case)
    prepared.warm()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=kinds) as found:
        seconds = seconds_of(prepared.run, device)
    events = found.key_averages()
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [
        (
            event.key,
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6,
            event.count,
        )
        for event in events
        if event.device_type == where and (on_gpu or event.key.startswith("aten::"))
    ]
    kernels.sort(key=lambda kernel: -kernel[1])
    launches = sum(event.count for event in events if event.key in LAUNCHES)
    return dict(
        profile=case.name,
        seconds=seconds,
        computing=sum(kernel[1] for kernel in kernels) / seconds,
        launches=launches if on_gpu else sum(kernel[2] for kernel in kernels),
        kernels=[f"{took:.4f} s in {count}: {name[:90]}" for name, took, count in kernels[:TOP]],
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=list(MODELS), default="llama7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", type=Case.parse, default=[])
    parser.add_argument("--profile", nargs="+", type=Case.parse, default=[], help="more cases")
    parser.add_argument("--seconds", type=float, default=1e9, help="no case begins after so many")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    device, started = torch.device(options.device), time.monotonic()
    disable_cudnn_attention()
    size, dtype = (SQUARE if device.type == "cuda" else 256), dtype_on(device)
    peak = square_rate(size, dtype, device)
    print(as_json(dict(gemm_tflops=peak / 1e12, size=size, dtype=str(dtype))), flush=True)
    model = MODELS[options.model](device)
    calls = [(measure, case) for case in options.cases]
    calls += [(profiled, case) for case in options.profile]
    # The process is spawned, because CUDA does not survive a fork.
    workers = max(1, min(4, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        plans = {
            case: pool.submit(
                planned_bytes,
                model.base.config,
                model.memory_config,
                model.dtype,
                device.type == "cuda",
                case.length,
                case.train_fields(),
            )
            for case in options.cases
            if case.is_step
        }
        for call, case in calls:
            if time.monotonic() - started > options.seconds:
                print(as_json(dict(case=case.name, left_out="no time")), flush=True)
                continue
            try:
                more = (peak, plans.get(case)) if call is measure else ()
                found = call(model, case, *more)
            except torch.OutOfMemoryError as error:
                found = dict(case=case.name, failed=str(error).split(". ")[0])
            print(as_json(found), flush=True)
            model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
