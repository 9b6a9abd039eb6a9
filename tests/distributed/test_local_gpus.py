"""Several processes on one machine use different GPUs. The machine's GPUs are pretended: stand-ins
for torch.cuda's functions record which GPU each call is about."""

import json
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import make_base
from processes import TRAIN
from test_commands import call
from test_distributed import launched

import uiollms.runs.checks
from uiollms.config.load import load_env_config
from uiollms.distributed.device_map import (
    CPU,
    check_local_gpus,
    compute_device,
    first_device,
    local_gpus,
    move_modules,
    resolve_map,
    this_machine,
)
from uiollms.distributed.groups import World, open_world
from uiollms.distributed.launch import local_process
from uiollms.distributed.watch import watching
from uiollms.files.errors import ConfigError
from uiollms.kernels.devices import gpus_of
from uiollms.planning.planner import choose_chunk_batch, make_plan
from uiollms.planning.simulated_devices import SimulatedDevices
from uiollms.planning.step_simulation import StepSimulation
from uiollms.runs.environment import device_name
from uiollms.runs.metrics import machine_use
from uiollms.runs.state import TrainingState
from uiollms.weights.model_folder import device_for_dtype

GIB = 2**30
TWO_CARDS = {"model": 0, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
WORDS = ("auto", "balanced", "sequential")


class PretendedGPUs:
    """`count` GPUs of 10 GiB that compute in bfloat16. `touched` lists the GPUs that calls were
    about, and `current` is torch's current device."""

    def __init__(self, count: int) -> None:
        self.count, self.touched, self.current = count, [], 0

    def touch(self, device=None) -> int:
        if device is None:
            number = self.current
        else:
            number = device if isinstance(device, int) else torch.device(device).index
        number = self.current if number is None else number
        assert number < self.count
        self.touched.append(number)
        return number

    def set_device(self, device) -> None:
        self.current = self.touch(device)

    def memory(self, device=None) -> tuple[int, int]:
        self.touch(device)
        return 10 * GIB, 16 * GIB

    def properties(self, device=None):
        number = self.touch(device)
        return type("Properties", (), dict(major=9, minor=0, name=f"pretended {number}"))

    def patch(self, patcher) -> None:
        for name, function in {
            "is_available": lambda: self.count > 0,
            "is_initialized": lambda: True,
            "device_count": lambda: self.count,
            "mem_get_info": self.memory,
            "get_device_properties": self.properties,
            "get_device_name": lambda device=None: self.properties(device).name,
            "current_device": self.touch,
            "is_bf16_supported": lambda including_emulation=True: self.touch() >= 0,
            "set_device": self.set_device,
            "max_memory_allocated": lambda device=None: self.touch(device) * GIB,
            "get_rng_state": lambda device="cuda": torch.tensor([self.touch(device)]).byte(),
            "set_rng_state": lambda state, device="cuda": self.touch(device),
        }.items():
            patcher.setattr(torch.cuda, name, function)


@pytest.fixture
def eight(monkeypatch) -> PretendedGPUs:
    gpus = PretendedGPUs(8)
    gpus.patch(monkeypatch)
    return gpus


def set_process(monkeypatch, rank: int, size: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))


def gpus_in(resolved) -> set:
    return {place for place in resolved.values() if isinstance(place, int)}


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, (0, 1)),
        (dict(LOCAL_RANK="3", LOCAL_WORLD_SIZE="8", WORLD_SIZE="32"), (3, 8)),
        (dict(LOCAL_RANK="3", WORLD_SIZE="8"), (3, 8)),  # of unknown machines: all are on this one
        (dict(LOCAL_RANK="0"), (0, 1)),
        (dict(LOCAL_RANK="2"), (2, 3)),
        (dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", WORLD_SIZE="4"), (0, 1)),
        (dict(LOCAL_WORLD_SIZE="2"), (0, 2)),
        (dict(WORLD_SIZE="4"), (0, 1)),
        (dict(LOCAL_RANK="-1", WORLD_SIZE="4"), (0, 1)),  # some launchers set -1 for none
        (dict(LOCAL_RANK="", LOCAL_WORLD_SIZE=""), (0, 1)),
    ],
)
def test_the_process_on_its_machine(variables, expected):
    assert local_process(variables) == expected


def test_a_local_rank_that_is_no_number():
    with pytest.raises(ConfigError, match="environment variable LOCAL_RANK: expected a whole"):
        local_process({"LOCAL_RANK": "first"})


@pytest.mark.parametrize("rank", [0, 3, 7])
@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_the_process_s_own_gpu(monkeypatch, eight, word, rank):
    set_process(monkeypatch, rank, 8)
    machine = this_machine(word)
    resolved = resolve_map(make_base(), word, "e.json", machine)
    assert set(resolved.values()) == {rank}
    assert [gpu.index for gpu, free in machine.items() if gpu != CPU and free] == [rank]
    assert first_device(word) == torch.device("cuda", rank)
    assert set(eight.touched) == {rank}


def test_a_word_puts_what_its_gpu_cannot_hold_on_the_cpu(monkeypatch, eight):
    set_process(monkeypatch, 2, 4)
    base = make_base(num_hidden_layers=8)
    size = sum(p.nbytes for p in base.parameters())
    machine = {torch.device("cuda", i): size // 2 for i in range(8)} | {CPU: 2**40}
    resolved = resolve_map(base, "auto", "e.json", machine)
    assert set(resolved.values()) == {2, "cpu"}


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize(
    "device_map, base_numbers",
    [
        (0, [0]),
        ({"": 0}, [0]),
        (TWO_CARDS, [0, 1]),
        ({"model": 1, "lm_head": 0, "teacher": 5, "decoder.repeat_token": 6}, [0, 1]),
        ({"model": 0, "model.layers.1": "disk", "model.layers.2": "cpu", "lm_head": 0}, [0]),
    ],
)
def test_numbers_count_from_the_local_rank(monkeypatch, eight, device_map, base_numbers, rank):
    set_process(monkeypatch, rank, 4)
    expected = {rank * len(base_numbers) + number for number in base_numbers}
    machine = this_machine(device_map)
    resolved = resolve_map(make_base(), device_map, "e.json", machine)
    assert gpus_in(resolved) == expected
    assert set(local_gpus(device_map)) == expected and set(eight.touched) == expected
    assert first_device(device_map) == torch.device("cuda", min(expected))
    assert compute_device(resolved) in expected  # of modules on disk


def test_every_module_of_a_map_of_two_gpus(monkeypatch, eight):
    set_process(monkeypatch, 3, 4)
    resolved = resolve_map(make_base(), TWO_CARDS, "e.json", this_machine(TWO_CARDS))
    assert resolved == {
        "model.rotary_emb": 6,
        "model": 6,
        "model.layers.2": 7,
        "model.norm": 7,
        "lm_head": 7,
    }


def test_one_process_uses_the_whole_machine(eight):
    """As without a launcher, and with torchrun --nproc_per_node 1."""
    assert local_gpus("auto") == list(range(8)) and local_gpus(5) == [5]
    machine = this_machine()
    assert [machine[torch.device("cuda", i)] for i in range(8)] == [10 * GIB] * 8
    assert resolve_map(make_base(), 5, "e.json", machine)["model.rotary_emb"] == 5
    assert first_device("auto") == torch.device("cuda", 0) and first_device("cpu") == CPU


def test_processes_divide_the_main_memory(monkeypatch, eight):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), dict(available=80 * GIB)))
    assert this_machine("cpu")[CPU] == 80 * GIB
    set_process(monkeypatch, 1, 4)
    assert this_machine("cpu")[CPU] == 20 * GIB
    assert not eight.touched


@pytest.mark.parametrize(
    "device_map, size, message",
    [
        (
            "auto",
            9,
            r"e.json: model.device_map: the 9 processes of this machine need the GPUs up to 8 "
            r'\(one for each with "auto"\), and it has 8; start at most 8 on this machine, or use '
            r'"cpu"; .* set LOCAL_RANK=0 and LOCAL_WORLD_SIZE=1',
        ),
        (0, 9, r"need the GPUs up to 8 \(1 for each\).* start at most 8 on this machine"),
        (TWO_CARDS, 5, r"need the GPUs up to 9 \(2 for each\).* start at most 4 on this machine"),
        ({"model": 8, "lm_head": 9}, 2, r"the GPUs up to 11 .* name fewer GPUs, or use \"cpu\""),
        (
            {"model": 0, "lm_head": 2},
            2,
            r"names the GPUs 0, 2; of the 2 processes on this machine, number r adds r \* 2 to "
            r"them, so that 0 and 1 would share GPU 2; name neighbouring GPUs, such as 0, 1",
        ),
    ],
)
def test_too_few_gpus(monkeypatch, eight, device_map, size, message):
    set_process(monkeypatch, 1, size)
    with pytest.raises(ConfigError, match=message):
        check_local_gpus(device_map, "e.json", 8)
    with pytest.raises(ConfigError, match=message):
        resolve_map(make_base(), device_map, "e.json", this_machine(device_map))


def test_maps_that_several_processes_can_use(monkeypatch, eight):
    set_process(monkeypatch, 1, 4)
    for device_map in ("cpu", "auto", 0, 4, TWO_CARDS, {"": "cpu"}):
        check_local_gpus(device_map, "e.json", 8)
    check_local_gpus({"model": 0, "lm_head": 3}, "e.json", 10)  # {0, 3}, {2, 5}, {4, 7}, {6, 9}
    check_local_gpus("auto", "e.json", 0)  # a machine without GPUs computes on the CPU


def test_too_few_gpus_end_training_before_a_model_is_loaded(workspace, monkeypatch, capsys):
    PretendedGPUs(2).patch(monkeypatch)
    set_process(monkeypatch, 0, 4)
    monkeypatch.setattr(uiollms.build, "load_causal_lm", None)
    for device_map in ('"auto"', "0", json.dumps(TWO_CARDS)):
        assert call(*TRAIN, f"--set=model.device_map={device_map}") == 2
        error = capsys.readouterr().err
        assert error.startswith("env.json: model.device_map: the 4 processes of this machine need")
        assert error.count("\n") == 1


def test_the_api_takes_numbers_of_the_machine(monkeypatch, eight):
    """As transformers does: programs pass their local rank."""
    set_process(monkeypatch, 3, 4)
    assert device_for_dtype("auto") == torch.device("cuda", 3)
    for device_map in (2, {"": 2}, {"model": 2, "lm_head": 2}, "cuda:2", torch.device("cuda", 2)):
        assert device_for_dtype(device_map) == torch.device("cuda", 2)
    assert device_for_dtype(None) == device_for_dtype("cpu") == CPU


# ---- commands touch no other GPU -----------------------------------------------------------------


@pytest.mark.parametrize("device_map, own", [('"auto"', [3]), ("0", [3]), (TWO_CARDS, [6, 7])])
def test_checks_plans_and_measurements_touch_own_gpus_only(
    workspace, monkeypatch, eight, device_map, own
):
    set_process(monkeypatch, 3, 4)
    text = device_map if isinstance(device_map, str) else json.dumps(device_map)
    changes = [f"model.device_map={text}", "model.model_dtype=auto", "train.chunk_batch=auto"]
    config = load_env_config("env.json", changes)
    assert uiollms.runs.checks.check_training(config, "env.json")
    assert choose_chunk_batch(config, "env.json").train.chunk_batch == 4
    plan = make_plan(config, "env.json")
    assert sorted(device.index for device in plan.need) == own and plan.fits
    assert set(plan.available.values()) == {10 * GIB}
    simulation = StepSimulation(config, "env.json")
    assert simulation.dtype == torch.bfloat16
    with SimulatedDevices():
        base = make_base(dtype=torch.float32).to("meta")
        move_modules(
            base, resolve_map(base, config.model.device_map, "e", this_machine(device_map))
        )
        gpus = gpus_of(base)
        samples = type("Samples", (), dict(state_dict=dict))
        state = TrainingState(base, None, None, samples)
        state.take_snapshot()
    assert [gpu.index for gpu in gpus] == own
    assert [generator.item() for generator in state.snapshot.cuda] == own
    assert machine_use(600, 2.0, gpus)["gpu_gib"] == own[-1]
    assert device_name(gpus) == f"pretended {own[0]}"
    assert set(eight.touched) <= set(own) and eight.touched


def test_a_world_works_on_own_gpus(workspace, tmp_path):
    """Two processes with two GPUs each. gloo takes the place of NCCL, which a CPU lacks, and the
    world's messages go through the CPU."""

    def child(rank: int) -> int:
        gpus = PretendedGPUs(4)
        with pytest.MonkeyPatch.context() as patcher:
            gpus.patch(patcher)
            init = dist.init_process_group
            patcher.setattr(dist, "init_process_group", lambda backend, **given: init(**given))
            patcher.setattr(World, "barrier", lambda self: None)
            config = load_env_config("env.json", [f"model.device_map={json.dumps(TWO_CARDS)}"])
            with watching(True) as watch, open_world(config, watch) as world:
                found = dict(rank=world.rank, device=str(world.device), current=gpus.current)
        Path(f"world-{rank}.json").write_text(json.dumps(found | dict(touched=gpus.touched)))
        return 0

    assert launched(2, child, said="said") == [0, 0], Path("said-0").read_text()
    for rank in range(2):
        found = json.loads(Path(f"world-{rank}.json").read_text())
        assert found["device"] == f"cuda:{2 * rank}" and found["current"] == 2 * rank
        assert found["rank"] == rank and set(found["touched"]) == {2 * rank}


def test_processes_agree_on_chunk_batch_auto(workspace):
    """They find different amounts of free memory. With different batches the processes that divide
    documents would pack different documents into a step, and wait for each other."""
    flags = ("--set=train.chunk_batch=auto", "--set=train.chunk_parallel=true")
    flags += ("--set=train.accum_grad=6", "--set=train.train_iters=12", "--set=train.tasks=[]")
    for i in range(4, 9):
        Path(f"book{i}.txt").write_text("Short documents fit one batch.")

    def child(rank: int) -> int:
        free = 2**18 if rank else 2**40
        available = type("Memory", (), dict(available=free))
        with pytest.MonkeyPatch.context() as patcher:
            patcher.setattr(psutil, "virtual_memory", lambda: available)
            return call(*TRAIN, *flags)

    assert launched(2, child, said="said", seconds=40) == [0, 0], Path("said-0").read_text()
    assert json.loads(Path("out/config.json").read_text())["train"]["chunk_batch"] == 1
