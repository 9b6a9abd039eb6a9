"""Tests that documents in one step share their launches, and what counts as a launch."""

from __future__ import annotations

import pytest
import torch
from benchmarks.launches import LaunchCounter, count_launches

from uiollms.planning.simulated_devices import SimulatedDevices


@pytest.mark.parametrize("estimator", ["uio", "exact"])
def test_eight_documents_together_launch_less_than_half_as_much_a_token(estimator):
    """The documents have 2,304 tokens in nine chunks. Six layers stand for SmolLM2's 30, which all
    launch the same."""
    before = count_launches(1, 2304, 4, estimator, layers=6)
    after = count_launches(8, 2304, 64, estimator, layers=6)
    assert after.tokens == 8 * before.tokens
    assert after.per_token < before.per_token / 2


def test_views_memory_and_work_of_the_cpu_are_no_launches():
    with SimulatedDevices(), LaunchCounter() as counter:
        x = torch.ones(4, 6, device=torch.device("cuda", 0))
        y = (x.view(6, 4).t()[1:].detach() * 2).unsqueeze(0)
        torch.empty_like(y).copy_(y)
        x += 1
        torch.ones(3) * 2  # on the CPU
    assert counter.launches == {"ones": 1, "mul": 1, "copy_": 1, "add_": 1}
