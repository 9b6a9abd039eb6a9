"""Measures peak memory, of the process on a CPU and of torch on a GPU."""

from __future__ import annotations

import gc
import threading

import psutil
import torch

from uiollms.kernels.allocator import trim_heap


class PeakMemory:
    """Measures how far memory rises within a context: `with PeakMemory(device) as peak: ...`, then
    `peak.bytes`. On a CPU this is the resident set, sampled every millisecond, after freed memory
    was returned to the system."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        trim_heap(self.device)
        self.process, self.done = psutil.Process(), threading.Event()
        self.start = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
            return
        self.done.set()
        self.thread.join()
        self.bytes = max(self.peak, self.process.memory_info().rss) - self.start
