"""Answers of the base that reads documents raw."""

import pytest
import torch
from conftest import make_base
from transformers import AutoTokenizer

from uiollms import ConfigError
from uiollms.data import ChatDocument, Document
from uiollms.training.teacher_answers import Teacher

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NEW = 6  # tokens of an answer


@pytest.fixture
def teacher(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    base = make_base(vocab_size=len(tokenizer), max_position_embeddings=256)
    return Teacher(base, tokenizer, NEW)


def slow_answer(teacher, text: str) -> str:
    """Generates one token after another, each from the whole text."""
    ids = teacher.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    length = ids.shape[1]
    for _ in range(NEW):
        with torch.no_grad():
            token = teacher.base(ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
        if token.item() == teacher.tokenizer.eos_token_id:
            break
    return teacher.tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()


def say(*contents: str) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant") * len(contents)
    return tuple(dict(role=r, content=c) for r, c in zip(roles, contents, strict=False))


def test_answers_equal_those_of_one_token_after_another(teacher):
    messages = say("The mill stands. Where?", "old", "Why?", "older", "When?")
    document = ChatDocument("x", "a", task="question answering", messages=messages)
    found = teacher.answer_document(document)
    text, expected = "", []
    for i, message in enumerate(messages):
        if i % 2 == 0:
            text += f"<user>{message['content']}<assistant>"
            expected.append(slow_answer(teacher, text))
            text += expected[-1]
    assert [m["content"] for m in found.messages[1::2]] == expected
    assert found.messages[::2] == messages[::2]
    # Another document on the same cache.
    assert teacher.answer_document(document) == found


def test_examples_stay_and_are_read(teacher):
    messages = say("Where?", "There.", "Why?", "old")
    document = ChatDocument("x", "a", task="question answering", messages=messages)
    found = teacher.answer_document(document, num_examples=1)
    assert found.messages[:3] == messages[:3]
    expected = slow_answer(teacher, "<user>Where?<assistant>There.<user>Why?<assistant>")
    assert found.messages[3]["content"] == expected


def test_a_prompt_gets_a_response(teacher):
    document = Document("The mill. Where? ", "a", response="old", task="question answering")
    found = teacher.answer_document(document)
    assert found.response == slow_answer(teacher, "The mill. Where? ")
    with pytest.raises(ConfigError, match="a: has no question; its kind is language modeling"):
        teacher.answer_document(Document("A text.", "a"))


def test_what_the_base_cannot_read_is_refused(teacher):
    with pytest.raises(ConfigError, match=r"a: a prompt of 251 tokens .* 256 positions"):
        teacher.answer([5] * 251, "a")
    assert isinstance(teacher.answer([5] * 250), str)
    teacher.tokenizer.chat_template = None
    document = ChatDocument("x", "a", task="question answering", messages=say("Where?"))
    with pytest.raises(ConfigError, match="a: the tokenizer of .* has no chat template"):
        teacher.answer_document(document)
