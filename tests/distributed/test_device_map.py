"""Device maps: every accepted form, every error by name, and layers whose weights rest on disk."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from conftest import MEMORY, gradients, make_base, make_model, random_ids
from test_commands import call

import uiollms
from uiollms import MemoryLM, Sample
from uiollms.distributed.device_map import CPU, device_of, on_disk, place_modules, resolve_map
from uiollms.distributed.offload import _OffloadedForward
from uiollms.files.errors import ConfigError
from uiollms.training.estimators import ESTIMATORS

GPUS = [torch.device("cuda", i) for i in range(2)]
TWO = {GPUS[0]: 2**40, GPUS[1]: 2**40, CPU: 2**40}
SPLIT = {
    "model.embed_tokens": 0,
    "model.layers.0": 0,
    "model.layers.1": 1,
    "model.layers.2": 1,
    "model.norm": 1,
    "lm_head": 1,
}
NAMES = ["model.rotary_emb", *SPLIT]


def places(device_map, machine=TWO) -> list:
    found = resolve_map(make_base(), device_map, "e.json", machine)
    return [device_of(name, found) for name in NAMES]


@pytest.mark.parametrize(
    "device_map, expected",
    [
        ("cpu", ["cpu"] * 7),
        (1, [1] * 7),
        ({"": 1}, [1] * 7),
        (SPLIT, [0, 0, 0, 1, 1, 1, 1]),
        (
            {"model": 0, "model.layers": "cpu", "model.layers.1": "disk", "lm_head": 1},
            [0, 0, "cpu", "disk", "cpu", 0, 1],
        ),
        (
            {
                "encoder.encoder.base_model.model.model": 1,
                "decoder.decoder.base_model.model.lm_head": 0,
                "teacher": "cpu",
            },
            [1] * 6 + [0],
        ),
    ],
)
def test_every_form_of_a_map(device_map, expected):
    assert places(device_map) == expected


def test_words_spread_over_all_gpus():
    """By accelerate's rules: balanced evens the GPUs out, sequential fills one after the other,
    what is left goes to the CPU."""
    base = make_base(num_hidden_layers=8)
    size = sum(p.nbytes for p in base.parameters())

    def layers(word, *gpus) -> list:
        machine = dict(zip(GPUS, gpus, strict=True)) | {CPU: 2**40}
        found = resolve_map(base, word, "e.json", machine)
        return [device_of(f"model.layers.{i}", found) for i in range(8)]

    assert layers("sequential", 2 * size, 2 * size) == [0] * 8
    assert layers("auto", 2 * size, 2 * size) == layers("balanced", 2 * size, 2 * size)
    assert layers("auto", 2 * size, 2 * size).count(0) in (3, 4, 5)
    order = [0, 1, "cpu"]
    found = [
        order.index(place_modules) for place_modules in layers("sequential", size // 2, size // 2)
    ]
    assert found == sorted(found) and set(found) == {0, 1, 2}
    assert places("auto", {CPU: 2**40}) == ["cpu"] * 7


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model.layers.9": 0},
            r"model.device_map\['model.layers.9'\]: the base has no such layer; its 3 layers are model.layers.0",
        ),
        (
            {"model.embed_token": 0},
            r"'model.embed_token'\]: the base has no module of that name; did you mean 'model.embed_tokens'",
        ),
        ({"lm_head": 2}, r"'lm_head'\]: GPU 2 does not exist, this machine has 2; use \"cpu\""),
        ({"lm_head": None}, r"no key covers 'lm_head'; name it, or a prefix"),
        ({"model.layers.1": None}, r"no key covers 'model.layers.1.self_attn.q_proj'"),
        (
            {"encoder.encoder.base_model.model.model.norm": 0},
            r"device 0, but 'model.norm' puts the same module on 1: .* name one device for both",
        ),
    ],
)
def test_what_a_map_gets_wrong(changes, message):
    wrong = {k: v for k, v in (SPLIT | changes).items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        resolve_map(make_base(), wrong, "e.json", TWO)
    with pytest.raises(
        ConfigError, match="e.json: model.device_map: GPU 5 does not exist, this machine has 2"
    ):
        resolve_map(make_base(), 5, "e.json", TWO)


DISK = {
    "half of the layers": {
        "model": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "lm_head": "cpu",
    },
    "ends": {"model": "cpu", "model.embed_tokens": "disk", "model.norm": "disk", "lm_head": "disk"},
}


def on_disk_model(device_map, folder: Path, family: str = "llama") -> MemoryLM:
    base = make_base(family)
    place_modules(base, device_map, "e.json", folder)
    model = MemoryLM(base, MEMORY)
    model.load_memory_state_dict(make_model(family).memory_state_dict())
    return model


# smollm2: tied embeddings; qwen3: norms of keys
@pytest.mark.parametrize(
    "family, rests",
    [
        ("llama", "half of the layers"),
        ("llama", "ends"),
        ("smollm2", "ends"),
        ("qwen3", "half of the layers"),
    ],
)
def test_a_step_with_weights_on_disk_is_the_same_step(tmp_path, family, rests):
    """Bit for bit: the same kernels on the same numbers."""
    plain, model = make_model(family), on_disk_model(DISK[rests], tmp_path, family)
    plain.chunk_batch = model.chunk_batch = 2
    ids = random_ids(30)
    steps = [(Sample.language_modeling(ids, 8), name) for name in ESTIMATORS]
    steps += [(Sample.document(ids, 8).distilled(0.5), "exact"), (Sample.copy(ids[:20], 8), "uio")]
    for sample, name in steps:
        for each in (plain, model):
            uiollms.gradient_step(each, sample, estimator=name, S=1, rng=1)
        expected, found = gradients(plain), gradients(model)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        assert any(found[key].any() for key in found)
    model.checkpointing = True
    uiollms.gradient_step(model, sample, estimator=name, S=1, rng=1)
    found = gradients(model)
    assert all(torch.equal(found[key], expected[key]) for key in expected), "checkpointing"
    model.checkpointing = False
    for mode in ("memory", "window", "raw"):
        assert torch.equal(
            uiollms.score(model, ids, mode=mode).nll, uiollms.score(plain, ids, mode=mode).nll
        )
    assert torch.equal(model(ids[None]).logits, plain(ids[None]).logits)


def test_weights_on_disk_are_not_in_memory(tmp_path, monkeypatch):
    """Not between calls, and not in a graph either; where autograd may save them as they are, it
    keeps them."""
    loaded: list[weakref.ref] = []
    load = OffloadedWeightsLoader.__getitem__

    def recorded(self, key):
        weight = load(self, key)
        loaded.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", recorded)
    model = on_disk_model(DISK["half of the layers"], tmp_path)
    layers = model.base.model.layers

    def alive() -> int:
        gc.collect()
        return sum(storage() is not None for storage in loaded)

    graph = model.encode_layers(random_ids(3, 8))
    assert graph[-1].requires_grad and loaded and alive() == 0
    assert [{p.device.type for p in layer.parameters()} for layer in layers] == [
        {"cpu"},
        {"meta"},
        {"meta"},
    ]
    torch.autograd.backward(graph, [torch.ones_like(layer) for layer in graph])
    assert alive() == 0
    monkeypatch.setattr(_OffloadedForward, "pack", lambda self, tensor: tensor)
    graph = model.encode_layers(random_ids(3, 8))
    assert alive() > 5


def test_a_pipeline_refuses_weights_on_disk(tmp_path):
    model = on_disk_model(DISK["half of the layers"], tmp_path)
    model.pipeline = True
    with pytest.raises(ValueError, match="pipeline does not work with weights on disk"):
        uiollms.gradient_step(model, Sample.document(random_ids(30), 8))


def test_the_folder_goes_with_the_model(tmp_path):
    base = make_base()
    place_modules(base, DISK["ends"], "e.json", tmp_path)
    wanted = resolve_map(base, DISK["ends"], "e.json", {})
    assert on_disk(base, wanted) == ["model.embed_tokens", "model.norm", "lm_head"]
    (folder,) = tmp_path.iterdir()
    assert (folder / "lm_head.weight.dat").stat().st_size == 61 * 32 * 8
    del base
    gc.collect()
    assert not folder.exists()


def test_training_with_half_of_the_layers_on_disk_as_a_command(workspace):
    """Same losses, same evaluation, and no file left behind."""
    half = 'model.device_map={"model":"cpu","model.layers.1":"disk","model.layers.2":"disk","lm_head":"cpu"}'
    logs = []
    for changes in ([], [half, "model.offload_dir=resting"]):
        assert (
            call("train.py", "--env_conf", "env.json", *(f"--set={change}" for change in changes))
            == 0
        )
        logs.append(
            [
                json.loads(line) | {"seconds": 0, "machine": {}}
                for line in Path("out/metrics.jsonl").read_text().splitlines()
            ]
        )
    assert logs[0] == logs[1]
    gc.collect()
    assert Path("resting").is_dir() and not list(Path("resting").iterdir())
