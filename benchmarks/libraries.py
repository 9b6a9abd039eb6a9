"""Compares this project's kernels with those of libraries, on the same tensors: the loss head, the
RMS norm, the gate of an MLP, and attention to a document's memory. Prints one JSON line per way.

    python -m benchmarks.libraries --device cuda              the shapes of Llama-2-7B
    python -m benchmarks.libraries --shapes smollm2           a CPU's, in float32

A line has the median seconds of forward and backward, divided by ours in the same run as well (the
ways take turns), the peak of the tensors that a way allocates, and the largest difference of its
output and of the gradient of its first input from float64, relative to the largest number of each.
Only the first inputs have gradients, as in training of frozen models. A way whose library is
missing, or which fails, is reported with the reason.

    liger   the package liger-kernel, on a GPU
    F...    torch.nn.functional; linear_cross_entropy came with torch 2.13
    FA4     torch's flash operators after activate_flash_attention_impl("FA4"), which needs the
            package flash-attn-4 and compute capability 9.0 or 10.0; `ours` is the same code with
            the kernels that torch contains
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import interleaved, most_alive
from benchmarks.models import dtype_on
from uiollms.files.json_files import as_json
from uiollms.kernels.linear_cross_entropy import linear_nll
from uiollms.kernels.memory_attention import MemoryLayout, memory_attention
from uiollms.model.attention import decoder_mask

EPSILON = 1e-6  # of the norms
LOGIT_ROWS = 512  # of logits, for torch's loss head


class Shapes(NamedTuple):
    """The sizes of a model and of one batch of rows.

    rows, length, slots: rows of a batch, tokens of each, memory slots that the first one reads
    step:                slots that each row reads more than the one before
    """

    rows: int
    length: int
    slots: int
    step: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocab: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def hidden(self) -> int:
        return self.heads * self.head


SHAPES = {
    "llama7b": Shapes(4, 1024, 1600, 32, 32, 32, 128, 11008, 32000),
    "smollm2": Shapes(4, 256, 512, 32, 9, 3, 64, 1536, 49152),
    "tiny": Shapes(2, 16, 8, 2, 4, 2, 16, 96, 307),
}
Function = Callable[..., Tensor]


class Way(NamedTuple):
    """One way to compute a task.

    make:    returns the function; raises ImportError or AttributeError without the library
    context: a context in which the function and its backward run
    """

    make: Callable[[], Function]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Task(NamedTuple):
    """Something that several ways compute. The first way is ours.

    inputs:    tensors and other arguments, the first `trained` of them with gradients
    reference: the slow twin, which computes in float64
    """

    inputs: tuple[Any, ...]
    trained: int
    reference: Function
    ways: dict[str, Way]


def make_tasks(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> dict[str, Task]:
    """Returns all tasks, with random inputs."""
    torch.manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, dtype=dtype, device=device)

    head = random(shapes.vocab, shapes.hidden, scale=shapes.hidden**-0.5)
    targets = torch.randint(shapes.vocab, (shapes.tokens,), device=device)
    gates = (random(shapes.tokens, shapes.intermediate) for _ in range(2))
    slots = shapes.slots + shapes.step * (shapes.rows - 1)
    own = (random(shapes.rows, n, shapes.length, shapes.head) for n in _heads(shapes))
    memory = (random(1, shapes.kv_heads, slots, shapes.head) for _ in range(2))
    num_slots = [shapes.slots + shapes.step * row for row in range(shapes.rows)]
    return {
        "loss head": Task(
            (random(shapes.tokens, shapes.hidden), head, targets), 1, plain_nll, LOSS_HEADS
        ),
        "RMS norm": Task(
            (random(shapes.tokens, shapes.hidden), random(shapes.hidden)), 1, plain_norm, NORMS
        ),
        "gate of the MLP": Task(tuple(gates), 2, plain_gate, GATES),
        "attention": Task((*own, *memory, num_slots), 5, masked_attention, ATTENTIONS),
    }


def _heads(shapes: Shapes) -> list[int]:
    return [shapes.heads, shapes.kv_heads, shapes.kv_heads]


# ---- the loss head -------------------------------------------------------------------------------


def plain_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N] NLL in nats in float32 or wider, from all logits at once."""
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="none")


def our_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    head = nn.Linear(1, 1, bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    return linear_nll(hidden, head, targets)


def torch_nll(rows: int | None) -> Function:
    """rows: of logits that exist at once; None: torch's choice"""
    method = "auto" if rows is None else None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=method)
    function = F.linear_cross_entropy
    return lambda hidden, weight, targets: function(
        hidden, weight, targets, reduction="none", options=options
    )


def liger_nll() -> Function:
    function = _liger("liger_fused_linear_cross_entropy")
    return lambda hidden, weight, targets: function(hidden, weight, targets, reduction="none")


LOSS_HEADS = {
    "ours": Way(lambda: our_nll),
    "F.cross_entropy": Way(lambda: plain_nll),
    "F.linear_cross_entropy": Way(partial(torch_nll, None)),
    f"F.linear_cross_entropy, {LOGIT_ROWS} rows": Way(partial(torch_nll, LOGIT_ROWS)),
    "liger": Way(liger_nll),
}

# ---- the norm and the gate -----------------------------------------------------------------------


def plain_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N, D] as transformers computes it."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight * normed.to(hidden.dtype)


def torch_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, EPSILON)


def liger_norm() -> Function:
    # In place, liger would write into the gradient that it is given, which the next turn needs.
    function = _liger("liger_rms_norm")
    return lambda hidden, weight: function(hidden, weight, EPSILON, in_place=False)


def plain_gate(gate: Tensor, up: Tensor) -> Tensor:
    """[N, I]"""
    return F.silu(gate) * up


def compiled(function: Function) -> Function:
    return torch.compile(function)


NORMS = {
    "ours": Way(lambda: plain_norm),
    "F.rms_norm": Way(lambda: torch_norm),
    "torch.compile": Way(lambda: compiled(plain_norm)),
    "liger": Way(liger_norm),
}
GATES = {
    "ours": Way(lambda: plain_gate),
    "torch.compile": Way(lambda: compiled(plain_gate)),
    "liger": Way(lambda: _liger("liger_swiglu")),
}


def _liger(name: str) -> Function:
    """A function of liger-kernel, which is imported only here, because it is optional."""
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


# ---- attention -----------------------------------------------------------------------------------


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    num_slots: list[int],
) -> Tensor:
    """[B, N, T, K] by one SDPA with a dense mask over joined keys and values."""
    rows, groups = len(query), query.shape[1] // key.shape[1]

    def join(memory: Tensor, own: Tensor) -> Tensor:
        joined = torch.cat([memory.expand(rows, -1, -1, -1), own], dim=2)
        return joined.repeat_interleave(groups, dim=1)

    mask = decoder_mask(num_slots, 0, query.shape[2], query.device)
    keys, values = join(memory_key, key), join(memory_value, value)
    return F.scaled_dot_product_attention(query, keys, values, mask)


def our_attention(*inputs: Any) -> Tensor:
    *tensors, num_slots = inputs
    query = tensors[0]
    layout = MemoryLayout(num_slots, [0] * len(query), query.shape[2], query.device)
    return memory_attention(*tensors, layout, query.shape[-1] ** -0.5).transpose(1, 2)


def check_fa4() -> Function:
    """Raises ImportError where the package of FA4 is missing."""
    importlib.import_module("flash_attn.cute.interface")
    return our_attention


@contextmanager
def fa4() -> Iterator[None]:
    """A context in which torch's flash operators are those of FA4."""
    torch.nn.attention.activate_flash_attention_impl("FA4")
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


ATTENTIONS = {
    "ours": Way(lambda: our_attention),
    "masked SDPA": Way(lambda: masked_attention),
    "FA4": Way(check_fa4, fa4),
}

# ---- the measurement -----------------------------------------------------------------------------


def run(function: Function, task: Task, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Runs forward, and backward from the gradient of the output. Returns the output and the
    gradient of the first input."""
    inputs = [
        tensor.detach().requires_grad_() if i < task.trained else tensor
        for i, tensor in enumerate(task.inputs)
    ]
    out = function(*inputs)
    torch.manual_seed(1)
    out.backward(grad.to(out.dtype))
    return out.detach(), inputs[0].grad


def compare(task: Task, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures all ways of a task and yields what was found for each."""
    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, Any]] = {}
    grad, *expected = exact_results(task)
    for name, way in task.ways.items():
        try:
            function = way.make()

            def call(function: Function = function, way: Way = way) -> tuple[Tensor, Tensor]:
                with way.context():
                    return run(function, task, grad)

            errors = [relative_error(a, b) for a, b in zip(call(), expected, strict=True)]
            found[name] = dict(error=errors[0], gradient_error=errors[1])
            found[name]["peak_mib"] = peak_bytes(call, device) / 2**20
            calls[name] = call
        # A library may fail in any way, and the others still have to be measured.
        except Exception as error:
            found[name] = dict(left_out=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    seconds = interleaved(calls, repeats, (), device)
    for name, result in found.items():
        if name in seconds:
            ratios = [a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)]
            result |= dict(seconds=statistics.median(seconds[name]))
            result |= {"time / ours": statistics.median(ratios)}
        yield dict(way=name) | result


def exact_results(task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """A random gradient of the output in the dtype of the inputs, and the results of the slow twin
    for the same numbers in float64."""
    wide = [
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in task.inputs
    ]
    with torch.no_grad():
        shape = task.reference(*wide).shape
    grad = torch.randn(shape, dtype=task.inputs[0].dtype, device=task.inputs[0].device)
    return grad, *run(task.reference, task._replace(inputs=tuple(wide)), grad)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference divided by the largest number expected."""
    return ((found.double() - expected).abs().max() / expected.double().abs().max()).item()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that a call has alive at once."""
    if device.type != "cuda":
        return most_alive(call)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.libraries",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", choices=list(SHAPES), default="llama7b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tasks", nargs="+", help="names of tasks; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype) if options.dtype else dtype_on(device)
    tasks = make_tasks(SHAPES[options.shapes], dtype, device)
    for name, task in tasks.items():
        if options.tasks and name not in options.tasks:
            continue
        for found in compare(task, options.repeats, device):
            print(as_json(dict(task=name, dtype=str(dtype)) | found), flush=True)


if __name__ == "__main__":
    main()
