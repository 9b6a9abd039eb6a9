"""Measures time and memory. Alternatives take turns within one run, the median of the turns is
reported, and a CPU's memory is measured in a new process."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch.profiler import profile

# Environment variables that change time or memory; a report contains those that are set.
ENVIRONMENT = (
    "GLIBC_TUNABLES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
CPU = torch.device("cpu")
Key = TypeVar("Key", bound=Hashable)


def interleaved(
    calls: Mapping[Key, Callable[[], object]],
    repeats: int,
    warm: Iterable[Callable[[], object]] | None = None,
    device: torch.device = CPU,
) -> dict[Key, list[float]]:
    """Times every call `repeats` times and returns the seconds of each turn. The calls take turns,
    so that other load and the CPU's temperature affect all of them alike. Before the first turn,
    each function of `warm` is called once; by default, these are the calls themselves."""
    for call in calls.values() if warm is None else warm:
        call()
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            seconds[key].append(seconds_of(call, device))
    return seconds


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds that a call takes. On a GPU this is the time between two events on its
    stream, with nothing queued before, so work that is still running when the call returns
    counts."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the turns of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def in_new_process(case: dict[str, Any]) -> dict[str, Any]:
    """Returns `benchmarks.worker.run_case(case)`, computed in a new process, whose allocator holds
    no freed memory. Raises RuntimeError if the process fails."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.worker",
        json.dumps(case),
        str(torch.get_num_threads()),
    ]
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def most_alive(call: Callable[[], object]) -> int:
    """Peak bytes of the tensors that are alive at once during a call, without those that were alive
    before. The number comes from torch's allocator, so it excludes memory that the C library holds
    between tensors."""
    with profile(profile_memory=True) as profiled:
        call()
    reports = [
        event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    alive = most = 0
    for report in sorted(reports, key=lambda event: event.start_ns()):
        alive += report.nbytes()
        most = max(most, alive)
    return most


def machine() -> dict[str, Any]:
    """Describes the machine: CPU, GPU, memory, library versions, and its load at the start."""
    model = next(
        (line.split(":")[1].strip() for line in cpu_info() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        **gpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "commit": commit(),
    }


def gpu() -> dict[str, Any]:
    """Describes the GPU that torch uses by default; empty without one."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": found.name,
        "gpu_memory_gib": round(found.total_memory / 2**30, 1),
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()
