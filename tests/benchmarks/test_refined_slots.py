"""Slots that are trained on their document, on the tiny model: what each mode reads."""

import json

import pytest
import torch
from benchmarks import refined_slots
from benchmarks.refined_slots import MODES, documents_of, measure, nll_after
from torch.nn import functional as F

from uiollms.build import load_memory_lm
from uiollms.cli import study
from uiollms.config.load import load_env_config
from uiollms.files.errors import ConfigError
from uiollms.training.refine import Refinement, Settings
from uiollms.weights.adapters import save_weights

SETTINGS = Settings(passage_size=4, num_passages=2, lr=0.05)
TOKENS = 64  # 3 chunks of 16 that are compressed, and the last one


@pytest.fixture
def model(workspace):
    """A model with random trained weights, saved where env.json names them."""
    model, _ = load_memory_lm(load_env_config("env.json"), "env.json")
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(model, "out/ckp")
    return model


def documents(model, count=3):
    tokenizer = load_memory_lm(load_env_config("env.json"), "env.json")[1]
    return documents_of(model, tokenizer, "files:book*.txt", count, TOKENS)


def test_numbers_without_training_are_those_of_study_budget(model, capsys):
    """The same documents, tokens and memories. The tolerance is float32's rounding."""
    options = ["--env_conf", "env.json", "--corpus", "files:book*.txt", "--documents", "3"]
    budget = ["--chunk_size", "16", "--tokens", str(TOKENS), "--ratios", "8", "--lengths"]
    modes = ["--modes", "window", "shuffled", "recent", "raw"]
    study.main(["budget", *options, *budget, *modes, "--ratio", "8", "--out", "b", "--quiet"])
    expected = {row["mode"]: row["nll"] for row in json.load(open("b/results.json"))["rows"]}
    capsys.readouterr()
    trained = ["--tokens", str(TOKENS), "--passage_size", "4", "--passages", "2", "--steps", "1"]
    refined_slots.main([*options, *trained, "--out", "refined", "--quiet", "--json"])
    result = json.load(open("refined/results.json"))
    found = {row["mode"]: row["nll"] for row in result["rows"]}
    assert tuple(found) == MODES
    for mode, nll in expected.items():
        assert found[mode] == pytest.approx(nll, rel=1e-5)
    assert json.loads(capsys.readouterr().out)["rows"] == result["rows"]


def test_the_last_chunk_follows_the_selected_slots(model):
    ids = documents(model, 2)
    nlls, trainings = measure(model, ids, SETTINGS, steps=40, select_every=10)
    text, last = ids[1][:-16], ids[1][-16:]
    refinement = Refinement(model, model.compress(text), SETTINGS)
    for step in range(1, 41):
        refinement.step()
        if step % 10 == 0:
            refinement.select()
    assert trainings[1]["best_step"] == refinement.best_step > 0
    # The last update counts too, although 7 is no multiple of 10.
    assert measure(model, ids, SETTINGS, steps=7, select_every=10)[1][1]["best_step"] == 7
    expected = nll_after(model, refinement.memory(), text, last)
    assert torch.equal(nlls["refined"][1], expected)
    assert not torch.equal(nlls["refined"][1], nlls["memory"][1])
    assert torch.equal(
        nlls["shuffled"][1], nll_after(model, model.compress(ids[0][:-16]), text, last)
    )


def test_raw_text_is_read_by_the_base_alone(model):
    ids = documents(model)[0]
    logits = model.base(ids[None]).logits[0, -16:-1].double()
    expected = F.cross_entropy(logits, ids[-15:], reduction="none")
    found = nll_after(model, None, ids[:-16], ids[-16:])
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)  # float32


def test_recent_tokens_are_refused(model):
    config = model.memory_config
    model.memory_config = config.model_copy(update={"recent_tokens": 4})
    with pytest.raises(ConfigError, match="recent_tokens: found 4"):
        documents(model)
