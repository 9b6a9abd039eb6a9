"""One memory figure, in the process that `measure.in_new_process` starts: a case as JSON in, its
result as JSON out."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from benchmarks.measure import most_alive
from benchmarks.models import MODELS, random_document
from benchmarks.passes import passes
from uiollms.kernels.allocator import keep_freed_memory
from uiollms.study.cost import PeakMemory


def run_alone(case: dict[str, Any]) -> dict[str, Any]:
    """case: model, pass (a name of `passes.passes`), length, S, chunk_batch -> seconds and peak
    bytes above the loaded weights, of one pass after a warm-up on three chunks; with `alive`
    set, of another pass also the bytes of the tensors alive at once."""
    model = MODELS[case["model"]]()
    model.chunk_batch = case["chunk_batch"]
    document = random_document(model, case["length"])
    # the baseline's copies are weights too, and are loaded before the measurement
    lengths = 3 * model.memory_config.chunk_size, len(document)
    calls = {n: passes(model, document[:n], case["S"], only=case["pass"]) for n in lengths}
    for length, call in calls.items():
        start = time.perf_counter()
        with PeakMemory(model.device) as peak:
            call[case["pass"]]()
        seconds = time.perf_counter() - start
        if length != len(document) or case.get("alive"):
            model.zero_grad(set_to_none=True)
    result = {"seconds": seconds, "bytes": peak.bytes}
    return result | {"alive": most_alive(call[case["pass"]])} if case.get("alive") else result


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(run_alone(json.loads(sys.argv[1]))))
