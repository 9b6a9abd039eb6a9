"""The program that `measure.in_new_process` starts. It reads one case as JSON from its command line
and prints the case's time and peak memory as JSON."""

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


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Measures one pass over a document, after a warm-up on three chunks.

    case:    model, pass (a name of `passes.passes`), length (tokens), S, chunk_batch; optionally
             alive
    returns: seconds; bytes, the peak above the loaded weights; and if `alive` is set, the peak
             bytes of the tensors that are alive at once, measured in another pass
    """
    model = MODELS[case["model"]]()
    model.chunk_batch = case["chunk_batch"]
    document = random_document(model, case["length"])
    # Building the passes copies the model for the baseline. The copies are weights, so they are
    # made before the measurement.
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
    print(json.dumps(run_case(json.loads(sys.argv[1]))))
