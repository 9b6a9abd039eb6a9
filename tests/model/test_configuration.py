"""The config class, the Auto classes of transformers and the text-generation pipeline."""

import json
import logging

import pytest
import torch
from conftest import SHAPE, make_base, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, pipeline

from uiollms import ConfigError, MemoryConfig, MemoryLM
from uiollms.model.configuration import MemoryLMConfig, register_auto_classes
from uiollms.weights.base_models import load_pretrained

MEMORY = MemoryConfig(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4, recent_tokens=3)


@pytest.fixture
def model(tiny_folder) -> MemoryLM:
    base = load_pretrained(AutoModelForCausalLM, str(tiny_folder), dtype=torch.float64)
    torch.manual_seed(0)
    model = MemoryLM(base, MEMORY)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_the_config_comes_back(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    for found in (MemoryLMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(found, MemoryLMConfig) and isinstance(found.text_config, LlamaConfig)
        assert found.memory_config == MEMORY
        expected = model.base.config.to_dict() | {"_name_or_path": "tiny"}
        assert found.text_config.to_dict() | {"dtype": expected["dtype"]} == expected
        assert found.get_text_config() is found.text_config
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads"):
            assert getattr(found, name) == getattr(model.base.config, name)
        named = {"_name_or_path": found.name_or_path}
        assert found.to_dict() == model.config.to_dict() | named
        assert not hasattr(found, "sliding_window")
    assert str(tmp_path.parent) not in (tmp_path / "config.json").read_text()


def test_a_config_with_faulty_memory_is_refused(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["memory"]["chunk_size"] = 15
    (tmp_path / "config.json").write_text(json.dumps(fields))
    message = "config.json: memory: chunk_size 15 must be a multiple of num_memory 2"
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_pretrained(tmp_path)


@torch.no_grad()
def test_the_auto_class_loads_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    ids = random_ids(1, 40)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert type(loaded) is MemoryLM and loaded.memory_config == MEMORY
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.name_or_path == loaded.name_or_path == str(tmp_path / "model")
    assert loaded.config.text_config is loaded.base.config
    options = dict(dtype="bfloat16", attn_implementation="eager", trust_remote_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert loaded.dtype == torch.bfloat16
    assert loaded.base.config._attn_implementation == "eager"
    # Of the compressor what the trained weights do not depend on may be changed.
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.memory["lora_dropout"] = 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config)
    assert loaded.memory_config.lora_dropout == 0.5
    config.memory["chunk_size"] = 32
    with pytest.raises(ConfigError, match="another compressor: chunk_size 16, the config has 32"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config)
    with pytest.raises(TypeError, match="output_loading_info"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)


def test_the_auto_class_makes_an_untrained_model():
    config = MemoryLMConfig(text_config=LlamaConfig(**SHAPE), memory=MEMORY.model_dump())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert type(model) is MemoryLM and model.dtype == torch.bfloat16
    assert model.memory_config == MEMORY and model.base.config is config.text_config


def test_the_base_keeps_its_attention():
    base = make_base()
    base.set_attn_implementation("eager")
    wrapped = MemoryLM(base, MEMORY)
    assert wrapped.config._attn_implementation == base.config._attn_implementation == "eager"


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_the_tokenizer_falls_to_the_base(model, tmp_path, tiny_folder, with_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    if with_tokenizer:
        tokenizer.add_tokens(["<more>"])
    model.save_pretrained(tmp_path / "model", tokenizer=tokenizer if with_tokenizer else None)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("source", ["model", "folder"])
def test_a_pipeline_has_no_wall_of_models(model, tmp_path, tiny_folder, source):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        if source == "folder":
            model.save_pretrained(tmp_path / "model")
            generator = pipeline("text-generation", str(tmp_path / "model"), dtype=torch.float64)
        else:
            tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
            generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        prompt = "Once upon a time there was a chunk, and"
        (found,) = generator(prompt, do_sample=False, max_new_tokens=12, return_full_text=False)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not [r.getMessage() for r in records if "not supported" in r.getMessage()]
    ids = generator.tokenizer(prompt, return_tensors="pt").input_ids
    expected = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert found["generated_text"] == generator.tokenizer.decode(expected, skip_special_tokens=True)


def test_registering_again_changes_nothing():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = {*CONFIG_MAPPING.keys()}
    register_auto_classes(MemoryLM)
    assert {*CONFIG_MAPPING.keys()} == names and CONFIG_MAPPING["uiollms"] is MemoryLMConfig
    assert CONFIG_MAPPING["llama"] is LlamaConfig
