"""Tests of the measurements on a GPU, without one: on the CPU, on simulated devices, and with
stand-ins for CUDA's events."""

import argparse
import json
import random

import pytest
import torch
from benchmarks import comparisons, gpu_speed, measure
from benchmarks.baseline import Baseline
from benchmarks.models import llama_shape, tiny, trained
from conftest import random_ids
from transformers import AutoModelForCausalLM

from uiollms import MemoryLM, Sample
from uiollms.distributed.device_map import move_modules
from uiollms.planning.simulated_devices import SimulatedDevices

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def test_every_pass_of_the_speed_part_runs_and_the_plan_is_right(capsys):
    """The plan counts every tensor of a step but the document's ids, masks and weights, which on a
    CPU are on the same device, and are 2 % of the tensors of this tiny model."""
    cases = [f"{kind}:256:2" for kind in gpu_speed.PASSES] + ["exact:256:4"]
    gpu_speed.main(["--device", "cpu", "--model", "tiny", "--cases", *cases, "--profile", cases[1]])
    first, *lines, profile = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["gemm_tflops"] > 0 and [line["case"] for line in lines] == cases
    assert all(line["tokens_a_second"] > 0 and line["allocated_gib"] > 0 for line in lines)
    errors = {line["case"]: line["plan_error"] for line in lines if "plan_error" in line}
    assert set(errors) == {"uio:256:2", "exact:256:2", "exact:256:4"}
    assert max(map(abs, errors.values())) < 0.03
    assert profile["launches"] > 1000 and len(profile["kernels"]) == gpu_speed.TOP
    assert 0 < profile["computing"] < 1


def test_no_case_begins_after_the_seconds(capsys):
    gpu_speed.main("--device cpu --model tiny --cases score:64:2 --seconds 0".split())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["left_out"] == "no time"


@pytest.mark.parametrize("text", ["uio", "uio:8192", "uoi:8192:4", "uio:8192:4:2:1", "uio:8192:-4"])
def test_a_wrong_case_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected PASS:LENGTH:CHUNK_BATCH"):
        gpu_speed.Case.parse(text)


def test_the_passes_run_on_a_gpu_without_mixing_devices(monkeypatch):
    """On a simulated GPU an operation that mixes devices raises an error. It has no events."""
    calls = []
    monkeypatch.setattr(comparisons, "seconds_of", lambda call, device: calls.append(call()))
    shape = llama_shape(32, 2, 3, 48, 61)
    memory = tiny(CPU).memory_config
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    with SimulatedDevices() as devices:
        move_modules(base, {"": GPU})
        model = trained(MemoryLM(base, memory))
        assert devices.device_of(model.base.lm_head.weight) == GPU
        sample = Sample.language_modeling(random_ids(70), memory.chunk_size)
        baseline = Baseline(model)
        loss = baseline.train_step(sample, 2, [random.Random(0).randint(0, c) for c in (2, 3, 4)])
        assert devices.device_of(loss) == GPU
        assert {devices.device_of(gradient) for gradient in baseline.gradients().values()} == {GPU}
        assert devices.device_of(baseline.score(sample)) == GPU
        gpu_speed.read_raw_and_backward(model, random_ids(70))
        state = comparisons.random_state(model, 64)
        assert devices.device_of(state.memory_keys[0]) == GPU
        comparisons.continue_stream(model, state, 3)
        comparisons.continue_base(model, 64, 3)
        assert len(calls) == 2


def test_seconds_on_a_gpu_are_those_between_its_events(monkeypatch):
    """The stand-in has the methods of torch.cuda.Event and a clock that the work moves on."""
    done, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            done.append("record")
            self.at = clock[0]

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return end.at - self.at

    def call():
        done.append("call")
        clock[0] += 1500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("synchronize"))
    seconds = measure.interleaved({"a": call}, 2, device=GPU)
    assert seconds == {"a": [1.5, 1.5]}
    assert done == ["call", *["synchronize", "record", "call", "record", "wait"] * 2]
