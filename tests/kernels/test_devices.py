"""Tests of the C library's treatment of freed tensors, in separate processes, of cuDNN's attention
and of cached transfers to a device."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from uiollms.cli.common import reporting_errors
from uiollms.kernels import devices
from uiollms.kernels.allocator import keep_freed_memory, trim_heap
from uiollms.kernels.devices import cache_transfers, to_device, upload

glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)

PROGRAM = """
import sys, psutil, torch
from uiollms.kernels.allocator import (trim_heap, keep_freed_memory)

def print_resident_memory():
    print(psutil.Process().memory_info().rss / 2**20)

if "keep" in sys.argv:
    keep_freed_memory()
tensors = [torch.ones(2**21) for _ in range(20)]  # 8 MiB each
print_resident_memory()
del tensors[:-1:2]
if "trim" in sys.argv:
    trim_heap(torch.device("cpu"))
print_resident_memory()
"""


def change_of_memory(*arguments: str, **environment: str) -> float:
    """Returns by how many MiB the resident memory grows when ten of twenty tensors are freed."""
    command, env = [sys.executable, "-c", PROGRAM, *arguments], os.environ | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    before, after = [float(line) for line in done.stdout.split()]
    return after - before


@glibc
def test_the_process_keeps_freed_memory():
    """Every second one of twenty tensors of 8 MiB is freed. The tolerance of 4 MiB is less than one
    tensor."""
    # By default glibc maps each tensor separately and unmaps it when it is freed.
    assert change_of_memory() == pytest.approx(-80, abs=4)
    assert change_of_memory("keep") == pytest.approx(0, abs=4)


@glibc
@pytest.mark.parametrize(
    "name, value",
    [
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536"),
    ],
)
def test_a_threshold_in_the_environment_takes_precedence(name, value):
    assert change_of_memory("keep", **{name: value}) == pytest.approx(-80, abs=4)


@glibc
def test_trim_heap_returns_kept_memory_to_the_system():
    """The tolerance of 7 MiB is less than one tensor. It is wider than above because holes that the
    imports left are returned too."""
    assert change_of_memory("keep", "trim") == pytest.approx(-80, abs=7)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
    trim_heap(torch.device("cpu"))


def test_commands_do_without_cudnns_attention():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert reporting_errors(lambda: int(torch.backends.cuda.cudnn_sdp_enabled())) == 0
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_tensors_with_the_same_numbers_are_transferred_once():
    meta, cache = torch.device("meta"), {}
    with cache_transfers(cache):
        first = to_device(torch.tensor([1, 2]), meta)
        assert to_device(torch.tensor([1, 2]), meta) is first
        for other in (torch.tensor([1, 3]), torch.tensor([[1, 2]]), torch.tensor([1, 2]).int()):
            assert to_device(other, meta) is not first
        assert len(cache) == 4
    assert to_device(torch.tensor([1, 2]), meta) is not first


def test_tensors_of_one_dtype_are_copied_together(monkeypatch):
    """The device is pretended: what would be copied to it stays on the CPU and is recorded."""
    copied = []

    def record(tensor, device):
        copied.append((tensor.dtype, tensor.numel(), device))
        return tensor

    monkeypatch.setattr(devices, "to_device", record)
    gpu = torch.device("cuda", 1)
    tensors = [
        torch.arange(6).view(2, 3),
        torch.rand(4, dtype=torch.float64),
        torch.tensor(7),
        torch.empty(0, 5, dtype=torch.int64),
        torch.arange(10, 20)[::2],  # not contiguous
        torch.rand(1, 2, dtype=torch.float64),
    ]
    found = upload(tensors, gpu)
    assert copied == [(torch.int64, 6 + 1 + 0 + 5, gpu), (torch.float64, 4 + 2, gpu)]
    for tensor, other in zip(tensors, found, strict=True):
        assert torch.equal(tensor, other) and tensor.shape == other.shape
    assert upload([], gpu) == []


def test_on_a_cpu_nothing_is_copied():
    tensors = [torch.arange(3), torch.rand(2)]
    assert all(a is b for a, b in zip(upload(tensors, torch.device("cpu")), tensors, strict=True))
