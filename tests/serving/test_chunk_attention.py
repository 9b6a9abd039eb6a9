"""Compares the attention to chunks with a slow twin, which reads and generates token by token."""

import math

import pytest
import torch
from conftest import make_model, random_ids
from server import NAME

from uiollms.config.sections import MemoryConfig
from uiollms.model import attention
from uiollms.serving.attention import chunk_attention


def twin(model, start, prompt, answer, monkeypatch) -> torch.Tensor:
    """Feeds one token at a time to the stream, as generation does, and computes the softmax of
    every attention call from its queries and keys."""
    num_chunks, m = start.num_slots // 2, 2
    masses: list[torch.Tensor] = []

    def attend(module, query, key, value, mask, scaling):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query.double() @ keys.double().transpose(2, 3) * scaling
        if mask is not None:  # recent tokens come before the first token of a chunk
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1)
        masses.append(weights[0, :, -1, : num_chunks * m].view(-1, num_chunks, m).sum(2).mean(0))
        values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (weights @ values.double()).to(value).transpose(1, 2)

    state = model(prompt[None, :-1], start).past_key_values
    total = torch.zeros(num_chunks, dtype=torch.float64)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "sdpa", attend)
        for token in [prompt[-1], *answer[:-1]]:
            masses.clear()
            state = model(token[None, None], state).past_key_values
            assert len(masses) == 3  # layers; the encoder attends with another function
            total += torch.stack(masses).mean(0)
    return total / len(answer)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "open_tokens, prompt, answer", [(0, 3, 4), (5, 2, 1), (3, 9, 20), (0, 8, 9)]
)
def test_attention_to_chunks_equals_the_twins(monkeypatch, family, open_tokens, prompt, answer):
    """Answers within a chunk, over several, and from the last token of a full one on."""
    model = make_model(family)
    start = model.compress(random_ids(24 + open_tokens)).state(model)
    prompt, answer = random_ids(prompt, seed=1), random_ids(answer, seed=2)
    found = chunk_attention(model, start, prompt, answer)
    expected = twin(model, start, prompt, answer, monkeypatch)
    assert found.shape == (3,) and 0 < found.sum() < 1
    # The library's eager attention computes its softmax in float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_recent_tokens_are_read_again(monkeypatch):
    model = make_model(
        config=MemoryConfig(num_memory=2, chunk_size=8, lora_rank=3, lora_alpha=6, recent_tokens=3)
    )
    start = model.compress(random_ids(26)).state(model)
    prompt, answer = random_ids(4, seed=1), random_ids(15, seed=2)
    found = chunk_attention(model, start, prompt, answer)
    expected = twin(model, start, prompt, answer, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # see above


def test_the_api_returns_the_attention_of_an_answer(served, tiny):
    model, _ = tiny
    body = dict(model=NAME, prompt="Why?", max_tokens=5, memory=[served.book, served.book])
    found = served.http.post("/v1/completions", json=body | dict(attention=True)).json()
    chunks = found["attention"]
    count = served.http.get(f"/v1/memories/{served.book}").json()["chunks"]
    assert [(c["memory"], c["chunk"]) for c in chunks] == [
        (served.book, i) for i in range(count)
    ] * 2
    sum_ = math.fsum(c["fraction"] for c in chunks)
    assert 0 < sum_ < 1 and all(c["fraction"] > 0 for c in chunks)
    lines = served.http.post("/v1/completions", json=body | dict(attention=True, stream=True))
    assert f'"fraction": {chunks[0]["fraction"]}' in lines.text
    assert "attention" not in served.http.post("/v1/completions", json=body).json()
