"""Tests the expected speed-up of devices that work at the same time."""

import pytest
import torch

from uiollms.planning.pipeline_speed import estimate_speedup

GPUS = [torch.device("cuda", i) for i in range(8)]


@pytest.mark.parametrize("count, expected", [(1, 1), (2, 1.923), (4, 3.571), (8, 6.25)])
def test_equal_parts(count, expected):
    """25 batches on p devices are 25 p / (25 + p - 1) times as fast."""
    layers = [gpu for gpu in GPUS[:count] for _ in range(32 // count)]
    for batches in ((0, 25, 0), (25, 0, 0), (0, 0, 25), (25, 25, 25)):
        assert estimate_speedup(layers, *batches) == pytest.approx(expected, abs=1e-3)


def test_the_fullest_device_limits_the_speed():
    """24 of 32 layers on one device: at most 32 / 24 times as fast."""
    layers = [GPUS[0]] * 24 + [GPUS[1]] * 8
    assert estimate_speedup(layers, 0, 1000, 0) == pytest.approx(32 / 24, abs=1e-2)


def test_one_batch_gains_nothing():
    assert estimate_speedup(GPUS, 1, 1, 1) == 1
