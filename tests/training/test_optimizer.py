"""Tests of which form of AdamW a model gets, and that a run may go on with another form."""

from __future__ import annotations

import pytest
import torch
from conftest import MEMORY, make_base, make_model, random_ids, relative_error

import uiollms
from uiollms import MemoryLM, Sample
from uiollms.config.load import load_env_config
from uiollms.distributed.device_map import CPU, move_modules, resolve_map
from uiollms.planning.simulated_devices import SimulatedDevices
from uiollms.runs.state import TrainingState, load_optimizer, optimizer_tensors
from uiollms.training.optimizer import make_optimizer, optimizer_step

GPUS = [torch.device("cuda", i) for i in range(2)]


@pytest.fixture
def train(workspace):
    return load_env_config("env.json").train


@pytest.mark.parametrize(
    "device_map, fused",
    [
        (0, True),
        ({"model": 0, "model.layers.1": 1, "lm_head": 1}, True),
        ({"model": 0, "model.layers.1": "cpu", "lm_head": 0}, None),
    ],
)
def test_parameters_on_gpus_are_updated_by_the_fused_form(train, device_map, fused):
    """The step runs on simulated devices. No update makes the CPU wait for a GPU."""
    with torch.device("meta"):
        base = make_base()
    with SimulatedDevices() as devices:
        machine = dict.fromkeys([*GPUS, CPU], 2**40)
        move_modules(base, resolve_map(base, device_map, "e.json", machine))
        model = MemoryLM(base, MEMORY).train()
        optimizer = make_optimizer(model, train)
        assert optimizer.defaults["fused"] is fused
        uiollms.gradient_step(model, Sample.document(random_ids(30), 8), rng=0)
        devices.reset_counts()
        optimizer_step(optimizer, 1e-3, 1.0)
        assert not devices.syncs or fused is None
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        assert {devices.device_of(moment) for moment in moments} >= {GPUS[0]}


def test_on_a_cpu_the_form_is_that_of_torch(train):
    assert make_optimizer(make_model(), train).defaults["fused"] is None


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_with_the_other_form(train, first):
    """Two steps, of which the second uses a state that the other form has saved, give the weights
    of two steps of one form. torch has the fused form for CPUs too. Both compute in float32, with
    other roundings of 1e-7 in an update of 1e-3."""

    def run(*forms: bool) -> dict[str, torch.Tensor]:
        model = make_model(dtype=torch.float32)
        saved: dict[str, torch.Tensor] = {}
        for step, fused in enumerate(forms):
            optimizer = torch.optim.AdamW(model.trainable_parameters().values(), fused=fused)
            state = TrainingState(model, None, optimizer, None)  # type: ignore[arg-type]
            if saved:
                load_optimizer(state, saved)
            uiollms.gradient_step(model, Sample.document(random_ids(30, seed=step), 8), rng=0)
            optimizer_step(optimizer, 1e-3, 1.0)
            saved = optimizer_tensors(state)
            assert {tensor.device.type for tensor in saved.values()} == {"cpu"}
        assert all(float(t) == 2 for name, t in saved.items() if name.endswith(".step"))
        return model.memory_state_dict()

    found, expected = run(first, not first), run(first, first)
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < 1e-6, name
