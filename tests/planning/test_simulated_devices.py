"""Tests device maps without a GPU: training steps and evaluation run on simulated devices, also
for 32x.json at its full size."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import MEMORY, make_base, make_model, random_ids
from transformers import AutoModelForCausalLM

import uiollms
from uiollms import MemoryLM, Sample
from uiollms.config.load import load_env_config, load_memory_config
from uiollms.config.sections import MemoryConfig
from uiollms.distributed.device_map import CPU, move_modules, resolve_map
from uiollms.model.layers import layer_device
from uiollms.model.passes import encode_all, project_all
from uiollms.planning.simulated_devices import HOST, SimulatedDevices, SimulationError
from uiollms.training.pipeline import SegmentedGraph
from uiollms.training.step import MemoryGradients
from uiollms.weights.base_models import KNOWN_SHAPES

ROOT = Path(__file__).parents[2]
GPUS = [torch.device("cuda", i) for i in range(2)]
TWO = dict.fromkeys([*GPUS, CPU], 2**40)


def model_on_devices(
    devices: SimulatedDevices, base, device_map, memory: MemoryConfig, path="e.json"
) -> MemoryLM:
    move_modules(base, resolve_map(base, device_map, path, TWO))
    model = MemoryLM(base, memory)
    model.chunk_batch = 2
    devices.reset_counts()
    return model.train()


def assert_tensors_are_on_the_device_of_their_layer(
    devices: SimulatedDevices, model: MemoryLM, sample: Sample
) -> None:
    memory, _ = encode_all(model, sample.chunks)
    keys, values = project_all(model, memory)
    size, all_chunks = model.memory_config.num_memory, range(len(memory[0]))
    halves = torch.full((9, 9), 0.5)
    sums = MemoryGradients(keys, values, halves, sample, size, all_chunks, model.master_dtype)
    layers = len(memory)
    for i, layer in enumerate(model.base.model.layers):
        device = layer_device(layer)
        tensors = [
            memory[i],
            keys[i],
            values[i],
            sums.total[i],
            sums.total[layers + i],
            sums.weighted[i],
        ]
        assert {devices.device_of(t) for t in tensors} == {device}
        lora = [p for role in (model.encoder, model.decoder) for p in role.layers[i].parameters()]
        assert {devices.device_of(p) for p in lora} == {device}
    for name, parameter in model.trainable_parameters().items():
        # No loss depends on these parameters.
        idle = f"encoder.layers.{layers - 1}." in name or name == "decoder.repeat_token"
        assert (parameter.grad is None) == idle, name
        if parameter.grad is not None:
            assert devices.device_of(parameter.grad) == devices.device_of(parameter), name


@pytest.fixture(scope="module")
def llama():
    """The simulation of two GPUs, and the model of 32x.json on them."""
    config = load_env_config(ROOT / "32x.json")
    with torch.device("meta"):
        shape = KNOWN_SHAPES[config.model.model_name]
        base = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    memory = load_memory_config(ROOT / config.model.config)
    with SimulatedDevices() as devices:
        model = model_on_devices(devices, base, config.model.device_map, memory, "32x.json")
    return devices, model


@pytest.mark.parametrize(
    "estimator, reads", [("exact", 0), ("tbptt", 0), ("uio", 0), ("importance", 1)]
)
def test_32x_trains_on_two_gpus(llama, estimator, reads):
    """Within a document only `importance` waits for a GPU, once, because it reads norms. It also
    encodes chunks again, while the others keep the graph of such a short document."""
    devices, model = llama
    with devices:
        found = [layer_device(layer) for layer in model.base.model.layers]
        assert found == [GPUS[0]] * 16 + [GPUS[1]] * 16
        model.zero_grad()
        sample = Sample.language_modeling(random_ids(2 * 1024 + 300), 1024)
        devices.reset_counts()
        result = uiollms.gradient_step(model, sample, estimator=estimator, S=1, rng=0)
        assert devices.syncs == ({"tolist on cuda:1": 1} if reads else {})
        assert result.reencoded and devices.device_of(result.nll) == GPUS[1]
        if estimator == "uio":
            assert_tensors_are_on_the_device_of_their_layer(devices, model, sample)


@pytest.mark.parametrize("mode", ["memory", "window", "raw"])
def test_32x_evaluates_on_two_gpus(llama, mode):
    """The NLLs are copied to the CPU once, at the end of the document."""
    devices, model = llama
    with devices:
        devices.reset_counts()
        found = uiollms.score(model, random_ids(2 * 1024 + 300), mode=mode)
        assert devices.syncs == {"copy from cuda:1 to cpu:0": 1}
        assert len(found.nll) == 2 * 1023 + 299


SPLIT = {"model": 0, "model.layers.1": 1, "model.layers.2": 1, "lm_head": 1}


@pytest.fixture
def tiny():
    with torch.device("meta"):
        base = make_base(seed=0)
    with SimulatedDevices() as devices:
        yield devices, model_on_devices(devices, base, SPLIT, MEMORY)


@pytest.mark.parametrize(
    "sample",
    [
        Sample.document(random_ids(45), 8),
        Sample.document(random_ids(45), 8).distilled(0.5),
        Sample.copy(random_ids(24), 8),
        Sample.memory_utilization(random_ids(24), random_ids(6), 8),
        Sample.questions(
            random_ids(24),
            [(random_ids(3), random_ids(2)), (random_ids(2), random_ids(4))],
            8,
            kl_weight=0.9,
        ),
    ],
    ids=["document", "distilled", "copy", "utilization", "questions"],
)
def test_every_kind_of_sample_follows_the_map_and_never_waits(tiny, sample):
    devices, model = tiny
    uiollms.gradient_step(model, sample, estimator="uio", S=1, rng=0)
    assert not devices.syncs


@pytest.mark.parametrize("estimator", ["exact", "uio", "tbptt"])
def test_devices_take_turns_with_batches_and_never_wait(tiny, monkeypatch, estimator):
    """With a pipeline of two devices, the first goes forward with the next batch before the second
    goes backward, so it holds two graphs and the second one."""
    devices, _ = tiny
    with torch.device("meta"):
        base = make_base(seed=0)
    model = model_on_devices(devices, base, SPLIT | {"model.norm": 1}, MEMORY)
    model.pipeline, model.chunk_batch = True, 1
    events, begin, back = [], SegmentedGraph.begin_segment, SegmentedGraph.backward

    def begin_segment(graph, hidden, device):
        events.append(f"forward to {devices.device_of(hidden)}")
        return begin(graph, hidden, device)

    def backward(graph, segment):
        events.append(f"backward {segment}")
        assert {devices.device_of(o.tensor) for o in graph.outputs if o.segment == segment} <= {
            GPUS[segment]
        }
        back(graph, segment)

    monkeypatch.setattr(SegmentedGraph, "begin_segment", begin_segment)
    monkeypatch.setattr(SegmentedGraph, "backward", backward)
    settings = {} if estimator == "exact" else dict(S=2)
    uiollms.gradient_step(
        model, Sample.document(random_ids(45), 8), estimator=estimator, rng=0, **settings
    )
    turns = ["forward to cuda:0", "backward 1", "backward 0"]
    # The first forward pass has no backward pass before it; the second device is one batch ahead.
    decoded = 5  # rows that read memory, one a batch
    expected = turns[:1] + turns[:2] + (decoded - 2) * [turns[2], *turns[:2]]
    expected += ["backward 0", "backward 1", "backward 0"]
    assert events[: len(expected)] == expected
    assert not devices.syncs


def test_dropout_runs_on_the_devices_of_the_map(tiny):
    _, model = tiny
    for role in (model.encoder, model.decoder):
        for lora in (m for m in role.modules() if hasattr(m, "dropout")):
            lora.dropout = 0.5
    model.memory_config = MEMORY.model_copy(update=dict(lora_dropout=0.5))
    uiollms.gradient_step(model, Sample.document(random_ids(30), 8), rng=0)


def test_layers_on_the_cpu_between_gpus_run(tiny):
    """Only copies from a GPU wait, and no operation mixes devices."""
    devices, _ = tiny
    with torch.device("meta"):
        base = make_base()
    device_map = {"model": 0, "model.layers.1": "cpu", "lm_head": "cpu"}
    model = model_on_devices(devices, base, device_map, MEMORY)
    sample = Sample.document(random_ids(45), 8)
    uiollms.gradient_step(model, sample, estimator="uio", S=1, rng=0)
    assert devices.syncs
    assert set(devices.syncs) <= {"copy from cuda:0 to cpu:0", "copy from cpu:0 to cuda:0"}
    assert_tensors_are_on_the_device_of_their_layer(devices, model, sample)


# ---- errors that are detected --------------------------------------------------------------------


@pytest.mark.parametrize(
    "forgotten",
    [
        "uiollms.model.layers.to_device",
        "uiollms.model.memory_lm.to_device",
        "uiollms.kernels.devices.to_device",
        "uiollms.model.attention.to_device",
    ],
)
def test_a_forgotten_transfer_is_detected(tiny, monkeypatch, forgotten):
    """Masks and rotary tables (layers), hidden states (memory_lm), token ids and targets (devices)
    or positions (attention) stay on another device."""
    _, model = tiny
    monkeypatch.setattr(forgotten, lambda tensor, device: tensor)
    with pytest.raises(SimulationError, match="mixes tensors of"):
        uiollms.gradient_step(model, Sample.document(random_ids(45), 8), rng=0)


def test_a_wait_inside_a_document_is_counted(tiny, monkeypatch):
    devices, model = tiny
    sample = Sample.document(random_ids(45), 8)

    def blocking(tensor, device):
        return tensor.to(device)

    monkeypatch.setattr("uiollms.model.positions.to_device", blocking)
    uiollms.gradient_step(model, sample, rng=0)
    assert devices.syncs["copy from cpu to cuda:0"] > 3


def count_uploads(
    layers: int, documents: int, chunk_batch: int, monkeypatch, estimator: str = "exact"
) -> Counter[str]:
    """Counts the copies from the CPU to the GPU in a step on documents of six chunks, by the dtype
    of the copied tensor."""
    with torch.device("meta"):
        base = make_base(num_hidden_layers=layers)
    uploads: Counter[str] = Counter()
    with SimulatedDevices() as devices:
        model = model_on_devices(devices, base, 0, MEMORY)
        model.chunk_batch = chunk_batch
        move = devices.move

        def count(tensor, device, *others):
            uploads[str(tensor.dtype)] += not tensor.is_meta
            return move(tensor, device, *others)

        monkeypatch.setattr(devices, "move", count)
        samples = [Sample.document(random_ids(6 * 8 + 3, seed=i), 8) for i in range(documents)]
        options = dict(estimator=estimator, rng=list(range(documents)), report_all=False)
        settings = {} if estimator == "exact" else dict(S=2)
        uiollms.gradient_step(model, samples, **options, **settings)
    return uploads


@pytest.mark.parametrize("estimator", ["exact", "uio", "tbptt"])
def test_the_uploads_of_a_step_do_not_grow_with_the_layers(monkeypatch, estimator):
    few, many = (count_uploads(layers, 2, 3, monkeypatch, estimator) for layers in (2, 5))
    assert few == many and few.total() > 5


def test_token_ids_are_uploaded_once_a_step(monkeypatch):
    """Six rows read memory. For one batch more, the positions and slots of its rows and the
    numbers of the chunks of its passes are copied, four tensors at most. The token weights are
    the only tensors of float64."""
    one, three, six = (count_uploads(2, 1, batch, monkeypatch) for batch in (6, 2, 1))
    assert one["torch.float64"] == three["torch.float64"] == six["torch.float64"] == 1
    assert one["torch.int64"] <= 9
    assert three["torch.int64"] <= one["torch.int64"] + 2 * 5
    assert six["torch.int64"] <= one["torch.int64"] + 5 * 4


def test_operations_that_real_devices_refuse_raise_errors():
    with SimulatedDevices() as devices:
        a, b = (torch.ones(3, 4, device=gpu) for gpu in GPUS)
        found = (a.device, b.to(a).device, (a * 2).device, a.to("cpu").device)
        assert found == (GPUS[0], GPUS[0], GPUS[0], HOST)
        # A 0-dimensional tensor may be on the CPU, as in torch.
        assert (a + torch.tensor(2.0)).device == GPUS[0]
        for wrong in (lambda: a + b, lambda: a @ torch.ones(4, 2), lambda: torch.cat([a, b])):
            with pytest.raises(SimulationError, match="mixes tensors of"):
                wrong()
        devices.reset_counts()
        a[torch.tensor([0, 1])]
        a.sum().item()
        a.copy_(torch.ones(3, 4))
        assert devices.syncs == {
            "index on cuda:0 from the CPU": 1,
            "item on cuda:0": 1,
            "copy from cpu:0 to cuda:0": 1,
        }
        with pytest.raises(SimulationError, match="would wait for the device"):
            a.nonzero()


def test_gradients_return_to_the_device_of_their_tensor():
    with SimulatedDevices() as devices:
        x = torch.ones(5, device=GPUS[0], requires_grad=True)
        (x.to(GPUS[1], torch.float64) * 2).sum().backward()
        assert devices.device_of(x.grad) == GPUS[0] and x.grad.dtype == torch.float32


def test_bytes_of_living_tensors_are_counted():
    with SimulatedDevices() as devices:
        a = torch.zeros(256, device=GPUS[0])
        view = a[:4]
        assert devices.live[GPUS[0]] == 1024
        b = a * 2
        del a, b
        assert (devices.live[GPUS[0]], devices.peak[GPUS[0]]) == (1024, 2048)
        del view
        assert devices.live[GPUS[0]] == 0


def test_the_simulation_leaves_no_cached_tensors(tiny):
    """Masks and positions cached by device are deleted, so a real model works afterwards."""
    real, ids = make_model(), random_ids(45)
    with SimulatedDevices():
        pass
    assert torch.isfinite(uiollms.score(real, ids).nll).all()
