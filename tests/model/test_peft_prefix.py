"""A compressed document as an adapter that plain PEFT loads onto the plain base."""

import json

import pytest
import torch
from conftest import MEMORY, make_base, make_model, random_ids, relative_error
from peft import PeftModel

from uiollms import ConfigError, MemoryLM
from uiollms.model.memory import join

ROUNDING = 1e-6  # float32


def plain_model(model, folder):
    """Returns a copy of the base with the adapter, and the ids that must be fed first."""
    base = type(model.base)(model.base.config)
    base.load_state_dict(model.base.state_dict())
    ids = json.loads((folder / "fed_first.json").read_text())["input_ids"]
    return PeftModel.from_pretrained(base, folder).eval(), torch.tensor([ids], dtype=torch.int64)


@torch.no_grad()
@pytest.mark.parametrize("length", [16, 37])
def test_plain_peft_gives_the_logits_of_the_memory(family, length, tmp_path):
    """For all tokens until the open chunk is full. Both lengths leave three tokens of it."""
    model, text = make_model(family, torch.float32), random_ids(length)
    memory = model.compress(text, source="a book")
    memory.to_peft(tmp_path / "adapter", model)
    question = random_ids(1, 8 - length % 8, seed=1)
    expected = model(question, memory.state(model)).logits
    plain, fed = plain_model(model, tmp_path / "adapter")
    found = plain(torch.cat([fed, question], dim=1)).logits[:, fed.shape[1] :]
    assert relative_error(found, expected) < ROUNDING


@torch.no_grad()
def test_recent_tokens_and_joined_documents_are_fed_first(tmp_path):
    config = MEMORY.model_copy(update=dict(recent_tokens=3))
    model = MemoryLM(make_base(dtype=torch.float32), config)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    texts = [random_ids(length, seed=length) for length in (19, 14)]
    memory = join([model.compress(text, source="x") for text in texts])
    memory.to_peft(tmp_path, model)
    plain, fed = plain_model(model, tmp_path)
    # 3 + 6 tokens are left over: a chunk of 8, whose last 3 are recent, and 1 token.
    assert fed.shape[1] == 3 + 1
    question = random_ids(1, 7, seed=1)
    found = plain(torch.cat([fed, question], dim=1)).logits[:, fed.shape[1] :]
    expected = model(question, memory.state(model)).logits
    assert relative_error(found, expected) < ROUNDING


@torch.no_grad()
def test_plain_peft_generates_what_the_memory_generates(tmp_path):
    model = make_model(dtype=torch.float32)
    memory = model.compress(random_ids(33), source="a book")
    memory.to_peft(tmp_path, model)
    plain, fed = plain_model(model, tmp_path)
    question = random_ids(1, 3, seed=1)
    options = dict(do_sample=False, max_new_tokens=4, eos_token_id=None)
    found = plain.generate(input_ids=torch.cat([fed, question], dim=1), **options)
    expected = model.generate(question, state=memory.state(model), **options)
    assert torch.equal(found[:, -4:], expected[:, -4:])


def test_what_plain_layers_cannot_read_is_refused(tmp_path):
    model = make_model("mistral", torch.float32)  # a sliding window of 32
    with pytest.raises(ConfigError, match="fills no chunk of 8 tokens"):
        model.compress(random_ids(5), source="x").to_peft(tmp_path / "a", model)
    model.compress(random_ids(8 * 12), source="x").to_peft(tmp_path / "b", model)
    with pytest.raises(
        ConfigError, match="sliding window of 32 positions is smaller than 26 slots"
    ):
        model.compress(random_ids(8 * 13), source="x").to_peft(tmp_path / "c", model)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
