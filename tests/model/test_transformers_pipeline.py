"""generate() with text: stop strings, streamers, and the text-generation pipeline of transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

from uiollms import MemoryConfig, MemoryLM
from uiollms.weights.base_models import load_pretrained

GREEDY = dict(do_sample=False, max_new_tokens=12, return_full_text=False)


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny_folder) -> tuple[MemoryLM, object]:
    """A small random model and its tokenizer, whose tokens are bytes."""
    base = load_pretrained(AutoModelForCausalLM, str(tiny_folder), dtype=torch.float64)
    torch.manual_seed(0)
    model = MemoryLM(base, MemoryConfig(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4))
    return model, AutoTokenizer.from_pretrained(tiny_folder)


def test_generation_ends_at_a_stop_string_and_is_streamed(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
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
def generator(model_and_tokenizer):
    """The pipeline. Every test compares it with `generate` on the token ids."""
    model, tokenizer = model_and_tokenizer
    tokenizer.padding_side = "left"  # newer transformers do so themselves
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def continuation(model_and_tokenizer, prompt: str, **options) -> str:
    """Returns the text that `generate` adds to `prompt`."""
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.decode(
        model.generate(ids, **options)[0, ids.shape[1] :], skip_special_tokens=True
    )


def test_a_batch_of_prompts_gives_the_texts_of_single_prompts(model_and_tokenizer, generator):
    prompts = ["A short one", "A longer one, past a chunk's boundary"]
    alone = [generator(prompt, **GREEDY)[0]["generated_text"] for prompt in prompts]
    assert alone == [
        continuation(model_and_tokenizer, prompt, do_sample=False, max_new_tokens=12)
        for prompt in prompts
    ]
    together = generator(prompts, batch_size=2, **GREEDY)
    assert [found[0]["generated_text"] for found in together] == alone


def test_a_prompt_may_be_longer_than_the_bases_positions(model_and_tokenizer, generator):
    prompt = (
        "It was a bright cold day, and the clocks were striking. " * 5
    )  # 280 tokens, the base has 128 positions
    (found,) = generator(prompt, **GREEDY)
    assert found["generated_text"] == continuation(
        model_and_tokenizer, prompt, do_sample=False, max_new_tokens=12
    )


def test_default_sampling_repeats_with_the_same_seed(model_and_tokenizer, generator):
    """Without options the pipeline samples 256 tokens at temperature 0.7."""
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generator("Once upon a time")[0]["generated_text"])
    assert texts[0] == texts[1] != texts[2]
    torch.manual_seed(1)
    expected = continuation(
        model_and_tokenizer, "Once upon a time", do_sample=True, temperature=0.7, max_new_tokens=256
    )
    assert texts[0] == "Once upon a time" + expected


def test_a_prompt_after_a_state_gives_the_text_of_the_whole_prompt(model_and_tokenizer, generator):
    model, tokenizer = model_and_tokenizer
    with torch.no_grad():
        state = model(
            tokenizer("A text of more than a chunk,", return_tensors="pt").input_ids
        ).past_key_values
    (whole,) = generator("A text of more than a chunk, and more", **GREEDY)
    for _ in range(2):
        assert generator(" and more", state=state, **GREEDY) == [whole]


def test_chats_of_different_length_can_be_batched(model_and_tokenizer, generator, monkeypatch):
    _, tokenizer = model_and_tokenizer
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if "
        "add_generation_prompt %}<a>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who wrote the letter?"},
    ]
    (found,) = generator(messages, do_sample=False, max_new_tokens=12)
    reply = continuation(
        model_and_tokenizer,
        "<system>Be brief.</s><user>Who wrote the letter?</s><a>",
        do_sample=False,
        max_new_tokens=12,
    )
    assert found["generated_text"] == [*messages, {"role": "assistant", "content": reply}]
    longer = [*found["generated_text"], {"role": "user", "content": "Why?"}]
    both = generator(
        [messages, longer], batch_size=2, do_sample=False, max_new_tokens=12
    )  # two chats of different length
    assert both[0] == [found] and len(both[1][0]["generated_text"]) == 5
