"""The config `"slot_input": "last"`, with which the input of a slot is the embedding of the last
token of its span.

All numbers are float64. The relative tolerance is 1e-10 between two computations with the same
rotary tables, and TABLES where the library computes them in float32 and the oracle in float64.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import (
    MEMORY,
    SHAPE,
    gradients,
    make_base,
    make_model,
    random_ids,
    relative_error,
    worst_error,
)
from oracle import Oracle, Variant
from test_commands import call
from test_step import PROVEN, plain_gradients

import uiollms
from uiollms import ConfigError, MemoryLM, Sample
from uiollms.config.load import load_env_config
from uiollms.model.memory import Memory, compress
from uiollms.planning.planner import make_plan
from uiollms.weights.adapters import load_weights, save_weights

TABLES = 1e-5
LAST = MEMORY.model_copy(update={"slot_input": "last"})
TRAIN = ["train.py", "--env_conf", "env.json"]


@torch.no_grad()
def test_the_inputs_of_slots_are_the_last_tokens_of_their_spans():
    """With 8 tokens and 2 slots these are tokens 3 and 7. Their normed embeddings are the memory of the
    first layer."""
    model, ids = make_model(config=LAST), random_ids(3, 8)
    rows = model.base.model.embed_tokens(ids[:, [3, 7]])
    assert torch.equal(model.encode(ids)[0], model.base.model.layers[0].input_layernorm(rows))
    assert "encoder.retrieval_token" not in model.trainable_parameters()
    assert model.trainable_parameters().keys() == model.memory_state_dict().keys()


def test_logits_and_gradients_equal_the_oracle():
    model, ids = make_model(config=LAST), random_ids(27)
    trained = {n: t.clone().requires_grad_() for n, t in model.memory_state_dict().items()}
    variant = Variant("llama")
    oracle = Oracle(variant, SHAPE, model.base.state_dict(), trained, LAST)
    expected = oracle.stream(ids)
    loss = torch.nn.functional.cross_entropy(expected[:-1], ids[1:])
    loss.backward()
    parts, state = [], None
    with torch.no_grad():
        for piece in ids[None].split([3, 9, 1, 14], dim=1):
            output = model(piece, state)
            state = output.past_key_values
            parts.append(output.logits[0])
    assert relative_error(torch.cat(parts), expected.detach()) < TABLES
    uiollms.gradient_step(model, Sample.document(ids, 8), estimator="exact")
    found = gradients(model)
    expected = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in trained.items()}
    assert worst_error(found, expected) < 10 * TABLES
    assert found["encoder.layers.0.v_proj.lora_A"].abs().max() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_step_equals_autograd(family, checkpointing):
    model = make_model(family, config=LAST)
    model.checkpointing = checkpointing
    for sample in (Sample.language_modeling(random_ids(29), 8), Sample.copy(random_ids(16), 8)):
        weights = torch.rand(len(sample.rows), len(sample.chunks) + 1, dtype=torch.float64)
        uiollms.gradient_step(model, sample, weights=weights)
        found = gradients(model)
        assert worst_error(found, plain_gradients(model, sample, weights)) < PROVEN


@torch.no_grad()
def test_streams_generation_and_files_work(tmp_path):
    model, ids = make_model(config=LAST), random_ids(1, 21)
    answer = model.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=None)
    for i in range(21, 30):
        assert int(model(answer[:, :i]).logits[0, -1].argmax()) == int(answer[0, i])
    compress(model, ids, "text").save(tmp_path / "text.mem")
    state = Memory.load(tmp_path / "text.mem", model).state(model)
    more = random_ids(1, 5, seed=1)
    expected = model(torch.cat([ids, more], 1)).logits[:, 21:]
    assert relative_error(model(more, state).logits, expected) < PROVEN
    with pytest.raises(ConfigError, match="compressor"):
        Memory.load(tmp_path / "text.mem", make_model())


@pytest.mark.parametrize("name", ["folder", "list.pth"])
@pytest.mark.parametrize("saved, other", [("token", "last"), ("last", "token")])
def test_weights_trained_with_another_slot_input_raise_an_error(tmp_path, name, saved, other):
    base = make_base(dtype=torch.float32)
    configs = {"token": MEMORY, "last": LAST}
    model, again = MemoryLM(base, configs[saved]), MemoryLM(base, configs[saved])
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter)
    save_weights(model, tmp_path / name)
    load_weights(again, tmp_path / name)
    loaded = again.memory_state_dict()
    assert all(torch.equal(t, loaded[k]) for k, t in model.memory_state_dict().items())
    fresh = MemoryLM(base, configs[other])
    before = {n: t.clone() for n, t in fresh.memory_state_dict().items()}
    with pytest.raises(ConfigError, match="slot_input") as error:
        load_weights(fresh, tmp_path / name)
    assert "\n" not in str(error.value) and saved in str(error.value) and other in str(error.value)
    message = f'"{other}", these weights were trained with "{saved}"'
    with pytest.raises(ValueError, match=message) as error:
        fresh.load_memory_state_dict(model.memory_state_dict())
    assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in fresh.memory_state_dict().items())


def test_a_run_with_last_tokens_as_slots(workspace, capsys):
    """It trains, resumes, saves and plans. It cannot resume, and its weights cannot be loaded, with
    the learned memory token."""
    memory = json.loads(Path("memory.json").read_text())
    Path("memory.json").write_text(json.dumps(memory | dict(slot_input="last")))
    assert call(*TRAIN) == 0
    assert call(*TRAIN, "--resume", "--set=train.train_iters=4") == 0
    assert call("test.py", "--env_conf", "env.json") == 0
    assert call("test.py", "--env_conf", "env.json", "--set=model.load_ckp=out/ckp") == 0
    assert make_plan(load_env_config("env.json"), "env.json").flops > 0
    capsys.readouterr()
    Path("memory.json").write_text(json.dumps(memory))
    assert call(*TRAIN, "--resume", "--set=train.train_iters=5") == 2
    assert 'compressor.slot_input: "last" -> "token"' in capsys.readouterr().err
    assert call("test.py", "--env_conf", "env.json") == 2
    assert "slot_input last, the config has token" in capsys.readouterr().err
