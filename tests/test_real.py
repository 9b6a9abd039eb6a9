"""The real small model and its trained adapter (slow), and a GPU where there is one."""

from pathlib import Path

import pytest
import torch
from conftest import gradients, make_model, random_ids, worst_error

import uiollms
from uiollms.checkpoint import load_weights
from uiollms.config import load_env_config
from uiollms.data import open_corpus
from uiollms.evaluate import score
from uiollms.pretrained import load_memory_lm
from uiollms.samples import tokenize

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_released_adapter_beats_the_window(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_env_config("smollm2-8x.json", ["model.device_map=cpu"])
    model, tokenizer = load_memory_lm(config, "smollm2-8x.json")
    ids = tokenize(tokenizer, open_corpus("sotu.test")[10].text)[:1024]
    alone = model.base(ids[None, :256]).logits
    assert torch.equal(model(ids[None, :256]).logits, alone)  # no memory: the base, to the bit
    untrained = uiollms.score(model, ids).perplexity
    load_weights(model, config.model.released_ckp)
    window = score(model, ids, mode="window").perplexity
    raw = score(model, ids, mode="raw").perplexity
    trained = uiollms.score(model, ids).perplexity
    assert raw < trained < window < untrained


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_gpu_gives_the_cpus_gradients(family):
    """float32 with TF32 off: 1e-4 leaves room for another order of summation."""
    torch.backends.cuda.matmul.allow_tf32 = False
    sample = uiollms.Sample.language_modeling(random_ids(40), 8)
    model = make_model(family, torch.float32)
    uiollms.gradient_step(model, sample)
    expected = gradients(model)
    model.to("cuda")
    uiollms.gradient_step(model, sample)
    assert worst_error({n: g.cpu() for n, g in gradients(model).items()}, expected) < 1e-4
