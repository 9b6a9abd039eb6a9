"""generate() with text: stop strings, streamers, transformers' text-generation pipeline."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

from uiollms import MemoryConfig, MemoryLM
from uiollms.weights.base_models import load

GREEDY = dict(do_sample=False, max_new_tokens=12, return_full_text=False)


@pytest.fixture(scope="module")
def speaking(tiny_folder) -> tuple[MemoryLM, object]:
    """A model with text: bytes as tokens."""
    base = load(AutoModelForCausalLM, str(tiny_folder), dtype=torch.float64)
    torch.manual_seed(0)
    model = MemoryLM(base, MemoryConfig(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4))
    return model, AutoTokenizer.from_pretrained(tiny_folder)


def test_stop_strings_and_streamer(speaking):
    model, tokenizer = speaking
    ids = tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    options = dict(do_sample=True, max_new_tokens=40, eos_token_id=None)
    torch.manual_seed(1)
    whole = tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :])
    stop = next(character for character in whole if character.isascii() and character.isalpha())
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    torch.manual_seed(1)
    stopped = tokenizer.decode(
        model.generate(ids, **options, stop_strings=[stop], tokenizer=tokenizer, streamer=streamer)[
            0
        ]
    )
    assert stopped == "Once upon a time there was" + whole[: whole.index(stop) + 1]
    assert "".join(streamer) == whole[: whole.index(stop) + 1]


@pytest.fixture
def write(speaking):
    """The pipeline; its twin in every test is `generate` on the token ids."""
    model, tokenizer = speaking
    tokenizer.padding_side = "left"  # newer transformers do so themselves
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def continued(speaking, prompt: str, **options) -> str:
    """What `generate` writes behind `prompt`."""
    model, tokenizer = speaking
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.decode(
        model.generate(ids, **options)[0, ids.shape[1] :], skip_special_tokens=True
    )


def test_prompts_of_different_length(speaking, write):
    prompts = ["A short one", "A longer one, past a chunk's boundary"]
    alone = [write(prompt, **GREEDY)[0]["generated_text"] for prompt in prompts]
    assert alone == [
        continued(speaking, prompt, do_sample=False, max_new_tokens=12) for prompt in prompts
    ]
    together = write(prompts, batch_size=2, **GREEDY)
    assert [found[0]["generated_text"] for found in together] == alone


def test_a_prompt_past_the_bases_positions(speaking, write):
    prompt = (
        "It was a bright cold day, and the clocks were striking. " * 5
    )  # 280 tokens, the base has 128 positions
    (found,) = write(prompt, **GREEDY)
    assert found["generated_text"] == continued(
        speaking, prompt, do_sample=False, max_new_tokens=12
    )


def test_its_own_settings_repeat_under_a_seed(speaking, write):
    """Without any option it samples 256 tokens at temperature 0.7."""
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(write("Once upon a time")[0]["generated_text"])
    assert texts[0] == texts[1] != texts[2]
    torch.manual_seed(1)
    own = continued(
        speaking, "Once upon a time", do_sample=True, temperature=0.7, max_new_tokens=256
    )
    assert texts[0] == "Once upon a time" + own


def test_a_state_and_what_comes_after_it_are_the_text_in_one_piece(speaking, write):
    model, tokenizer = speaking
    with torch.no_grad():
        state = model(
            tokenizer("A text of more than a chunk,", return_tensors="pt").input_ids
        ).past_key_values
    (whole,) = write("A text of more than a chunk, and more", **GREEDY)
    for _ in range(2):
        assert write(" and more", state=state, **GREEDY) == [whole]


def test_chat_messages(speaking, write, monkeypatch):
    _, tokenizer = speaking
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if "
        "add_generation_prompt %}<a>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who wrote the letter?"},
    ]
    (found,) = write(messages, do_sample=False, max_new_tokens=12)
    said = continued(
        speaking,
        "<system>Be brief.</s><user>Who wrote the letter?</s><a>",
        do_sample=False,
        max_new_tokens=12,
    )
    assert found["generated_text"] == [*messages, {"role": "assistant", "content": said}]
    longer = [*found["generated_text"], {"role": "user", "content": "Why?"}]
    both = write(
        [messages, longer], batch_size=2, do_sample=False, max_new_tokens=12
    )  # two chats of different length
    assert both[0] == [found] and len(both[1][0]["generated_text"]) == 5
