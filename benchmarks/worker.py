"""The program that `measure.in_new_process` starts. It reads one case as JSON from its command line
and prints the case's time and peak memory as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import most_alive, seconds_of
from benchmarks.models import MODELS, random_document
from benchmarks.passes import passes
from uiollms.kernels.allocator import keep_freed_memory
from uiollms.kernels.peak_memory import PeakMemory
from uiollms.model.memory_lm import MemoryLM


def run_case(case: dict[str, Any], model: MemoryLM | None = None) -> dict[str, Any]:
    """Measures one pass over a document.

    case:    model, device, pass (a name of `passes.passes`), length (tokens), S, chunk_batch;
             optionally alive
    model:   the model if it is there already
    returns: seconds; bytes, the peak above the loaded weights; and if `alive` is set, the peak
             bytes of the tensors that are alive at once. On a CPU bytes are of the resident set,
             and `alive` is measured in another pass. On a GPU bytes are what torch's allocator
             reserves, and both are measured in another pass than the seconds.
    """
    device = torch.device(case["device"])
    if model is None:
        model = MODELS[case["model"]](device)
    model.chunk_batch = case["chunk_batch"]
    model.zero_grad(set_to_none=True)
    document = random_document(model, case["length"])
    # Building the passes copies the model for the baseline. The copies are weights, so they are
    # made before the measurement.
    name, short = case["pass"], 3 * model.memory_config.chunk_size
    warm, call = (
        passes(model, document[:n], case["S"], only=name)[name] for n in (short, len(document))
    )
    warm()
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        result = allocated(call, device)
        model.zero_grad(set_to_none=True)
        return result | {"seconds": seconds_of(call, device)}
    with PeakMemory(device) as peak:
        seconds = seconds_of(call, device)
    result = {"seconds": seconds, "bytes": peak.bytes}
    if case.get("alive"):
        model.zero_grad(set_to_none=True)
        result["alive"] = most_alive(call)
    return result


def allocated(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Returns how far a call raises what the allocator of a GPU reserves (bytes), and what tensors
    take of it (alive)."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    reserved, alive = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    call()
    return {
        "bytes": torch.cuda.max_memory_reserved(device) - reserved,
        "alive": torch.cuda.max_memory_allocated(device) - alive,
    }


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(run_case(json.loads(sys.argv[1]))))
