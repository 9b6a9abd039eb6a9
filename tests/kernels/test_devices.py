"""What the C library does with memory that tensors give back, in processes of their own."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from uiollms.cli.common import reporting_errors
from uiollms.kernels.allocator import keep_freed_memory, trim_heap
from uiollms.kernels.devices import cache_transfers, to_device

glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)

PROGRAM = """
import sys, psutil, torch
from uiollms.kernels.allocator import (trim_heap, keep_freed_memory)

def resident():
    print(psutil.Process().memory_info().rss / 2**20)

if "keep" in sys.argv:
    keep_freed_memory()
tensors = [torch.ones(2**21) for _ in range(20)]  # 8 MiB each
resident()
del tensors[:-1:2]
if "give" in sys.argv:
    trim_heap(torch.device("cpu"))
resident()
"""


def resident(*arguments: str, **environment: str) -> float:
    """MiB with ten of twenty tensors, above those with all."""
    command, env = [sys.executable, "-c", PROGRAM, *arguments], os.environ | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = [float(line) for line in done.stdout.split()]
    return found[1] - found[0]


@glibc
def test_freed_memory_is_kept():
    """Every second one of twenty tensors of 8 MiB goes. 4 MiB: less than any of them."""
    assert resident() == pytest.approx(-80, abs=4)  # each was mapped by itself
    assert resident("keep") == pytest.approx(0, abs=4)


@glibc
@pytest.mark.parametrize(
    "name, value",
    [
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536"),
    ],
)
def test_a_threshold_in_the_environment_counts(name, value):
    assert resident("keep", **{name: value}) == pytest.approx(-80, abs=4)


@glibc
def test_kept_memory_is_given_back_when_asked():
    """7 MiB, still less than a tensor: holes that the imports have left are given back too."""
    assert resident("keep", "give") == pytest.approx(-80, abs=7)


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


def test_what_is_moved_once_is_the_same_tensor_for_the_same_numbers():
    meta, kept = torch.device("meta"), {}
    with cache_transfers(kept):
        first = to_device(torch.tensor([1, 2]), meta)
        assert to_device(torch.tensor([1, 2]), meta) is first
        for other in (torch.tensor([1, 3]), torch.tensor([[1, 2]]), torch.tensor([1, 2]).int()):
            assert to_device(other, meta) is not first
        assert len(kept) == 4
    assert to_device(torch.tensor([1, 2]), meta) is not first
