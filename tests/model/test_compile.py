"""Tests of an encoder that torch.compile compiles: its results, how often it compiles, and what it
cannot be combined with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MEMORY, SHAPE, gradients, make_model, random_ids, worst_error
from torch._dynamo.utils import counters
from transformers import LlamaConfig

import uiollms
from uiollms import Sample
from uiollms.config.load import load_env_config
from uiollms.files.errors import ConfigError
from uiollms.model.layers import run_layer


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """aot_eager compiles forward and backward as inductor does, but runs the kernels of torch, and
    so needs seconds instead of a minute."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(run_layer, backend=request.param)
    monkeypatch.setattr("uiollms.model.memory_lm.compiled_layer", lambda: compiled)
    yield request.param
    torch._dynamo.reset()


def test_a_compiled_encoder_gives_the_same_gradients(backend, monkeypatch):
    """The model has six layers, of which the first four are compiled. The documents have batches of
    three chunks and of two, and in the second step of one. The values and gradients of float64
    differ by roundings of 1e-16, which grow to less than 1e-12 through six layers. Four graphs serve
    all layers and batches: with a graph of autograd three, for the first number of chunks, for any
    number, and for one chunk, and without one."""
    monkeypatch.setitem(FAMILIES, "deep", lambda: LlamaConfig(**SHAPE | {"num_hidden_layers": 6}))
    model = make_model("deep").train()
    model.chunk_batch = 3

    def steps() -> list:
        found = []
        for lengths in ((43, 19, 27), (40, 11), (25,)):
            samples = [Sample.document(random_ids(length, seed=length), 8) for length in lengths]
            options = dict(estimator="exact", rng=list(range(len(samples))))
            results = uiollms.gradient_step(model, samples, **options)
            found.append(gradients(model) | {"nll": torch.stack([each.nll for each in results])})
        return found

    expected = steps()
    model.compile_encoder = True
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        for found, plain in zip(steps(), expected, strict=True):
            assert worst_error(found, plain) < 1e-12
    assert 2 <= counters["stats"]["unique_graphs"] <= 6 and not counters["graph_break"]


def test_a_compiled_encoder_refuses_dropout():
    model = make_model(config=MEMORY.model_copy(update={"lora_dropout": 0.3})).train()
    model.compile_encoder = True
    with pytest.raises(ValueError, match="compile_encoder works neither with LoRA dropout"):
        uiollms.gradient_step(model, Sample.document(random_ids(30), 8), rng=0)


@pytest.mark.parametrize(
    "change, fault",
    [
        (
            'model.device_map={"model":"cpu","model.layers.1":"disk","lm_head":"cpu"}',
            "weights on disk",
        ),
        ("model.attn_implementation=flash_attention_2", "flash_attention_2"),
        ("model.quantization=nf4", "model.quantization nf4"),
    ],
)
def test_a_config_with_what_cannot_be_compiled_is_refused(workspace, change, fault):
    load_env_config("env.json", ["train.compile_encoder=true"])
    load_env_config("env.json", [change])
    with pytest.raises(ConfigError, match=f"compile_encoder true does not work with {fault}"):
        load_env_config("env.json", ["train.compile_encoder=true", change])


def test_a_compressor_with_dropout_is_refused(workspace):
    config = load_env_config("env.json", ["train.compile_encoder=true"])
    compressor = Path(config.model.config)
    changed = json.loads(compressor.read_text()) | {"lora_dropout": 0.1}
    compressor.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="compile_encoder true does not work with lora_dropout"):
        uiollms.build.check_env(config, "env.json")
