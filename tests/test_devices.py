"""What the C library does with memory that tensors give back, in processes of their own."""

import ctypes
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")

PROGRAM = """
import sys, psutil, torch
from uiollms.devices import give_back_holes, keep_freed_memory

def resident():
    print(psutil.Process().memory_info().rss / 2**20)

if "keep" in sys.argv:
    keep_freed_memory()
tensors = [torch.ones(2**21) for _ in range(20)]  # 8 MiB each
resident()
del tensors[:-1:2]
resident()
give_back_holes(torch.device("cpu"))
resident()
del tensors
give_back_holes(torch.device("cpu"))
resident()
"""


def resident(*arguments: str) -> list[float]:
    """MiB above the end, with twenty tensors, with ten, after holes were given back, and at the end."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    found = [float(line) for line in done.stdout.split()]
    return [each - found[0] for each in found]


@glibc
def test_freed_memory_is_kept_and_holes_are_given_back():
    """Every second one of twenty tensors of 8 MiB goes, then all. 4 MiB: less than any of them."""
    assert resident() == pytest.approx([0, -80, -80, -160], abs=4)  # each was mapped by itself
    assert resident("keep") == pytest.approx([0, 0, -80, -80], abs=4)  # the heap's end stays


def test_another_c_library_and_a_gpu_are_left_alone(monkeypatch):
    import torch

    from uiollms import devices

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    devices.keep_freed_memory()
    devices.give_back_holes(torch.device("cpu"))
    monkeypatch.setattr(ctypes, "CDLL", None)  # not even asked
    devices.give_back_holes(torch.device("cuda"))
