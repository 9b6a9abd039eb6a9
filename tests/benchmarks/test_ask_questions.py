"""Questions as `uiollms ask` asks them, on the tiny model: what each mode reads, and the scores."""

import json
import shutil

import pytest
import torch
from benchmarks import ask_questions
from benchmarks.ask_questions import FACT_TOKENS, Asked, answer_all, fact_questions, summarize
from test_book_questions import write_books
from transformers import AutoTokenizer

from uiollms.build import load_memory_lm
from uiollms.cli.chat import first_turn
from uiollms.config.load import load_env_config
from uiollms.data.corpora.facts import fact_pairs, make_fact
from uiollms.data.tokens import tokenize
from uiollms.weights.adapters import save_weights

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def model(workspace, tiny_folder):
    """A model with random weights whose base has positions enough for a document of bytes."""
    shutil.copytree(tiny_folder, "base")
    config = json.loads((workspace / "base/config.json").read_text())
    config["max_position_embeddings"] = 8192
    (workspace / "base/config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("base")
    env = json.loads((workspace / "env.json").read_text())
    env["model"]["model_name"] = "base"
    (workspace / "env.json").write_text(json.dumps(env))
    model, _ = load_memory_lm(load_env_config("env.json"), "env.json")
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(model, "out/ckp")
    return model


def test_a_question_asks_for_a_held_out_fact_of_its_document(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    asked = fact_questions(tokenizer, 6)
    assert asked == fact_questions(tokenizer, 6) and len({one.text for one in asked}) == 6
    training = set(fact_pairs(held_out=False))
    for one in asked:
        assert abs(len(tokenize(tokenizer, one.text)) - FACT_TOKENS) <= 8  # line breaks of facts
        owner, thing = one.question.removeprefix("What is ").removesuffix("?").split("'s ")
        stated = [
            make_fact(form, one.answer, thing=thing, person=owner).statement.strip()
            for form in ask_questions.FORMS
        ]
        assert sum(one.text.count(statement) for statement in stated) == 1
        assert (thing, owner) not in training


def test_each_mode_reads_what_its_name_says(model):
    tokenizer = AutoTokenizer.from_pretrained("base")
    texts = ("Amber is the harbour. " * 8, "4819 " * 40)
    asked = [Asked("facts", text, f"What {i}?", "x") for i, text in enumerate(texts)]
    rows = answer_all(model, tokenizer, asked, 5)
    assert any(row["answers"]["memory"] != row["answers"]["another's memory"] for row in rows)
    assert [list(row["answers"]) for row in rows] == 2 * [
        ["memory", "another's memory", "recent", "raw", "none"]
    ]

    def generated(ids, state=None):
        source = model if state is not None else model.base
        past = dict(state=state) if state is not None else {}
        new = source.generate(ids, do_sample=False, max_new_tokens=5, **past)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True).strip()

    for number, row in enumerate(rows):
        for mode, text in (
            ("memory", asked[number].text),
            ("another's memory", asked[1 - number].text),
        ):
            state = model.compress(tokenize(tokenizer, text)).state(model)
            ids = first_turn(tokenizer, asked[number].question, state)
            assert row["answers"][mode] == generated(ids, state)
        text = asked[number].text
        kept = len(text) // 16 * 2 + len(text) % 16  # 2 slots of 16 bytes each, and the open ones
        before = [("recent", text[-kept:] + "\n\n"), ("raw", text + "\n\n"), ("none", "")]
        for mode, text in before:
            prompt = f"<user>{text}{asked[number].question}</s><assistant>"
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
            assert row["answers"][mode] == generated(ids)


def test_an_answer_that_contains_the_reference_is_right():
    answers = [{"memory": "It is amber.", "raw": "red"}, {"memory": "red", "raw": "red"}]
    references = ["amber", "amber"]
    rows = [
        dict(kind="facts", answer=reference, answers=answer)
        for reference, answer in zip(references, answers, strict=True)
    ]
    memory, raw = summarize(rows)
    assert (memory["right"], raw["right"], memory["questions"]) == (0.5, 0.0, 2)
    assert memory["right_interval_95"] == (0.0, 1.0) and raw["token_f1"] == 0.0


def test_the_command_writes_every_answer_beside_the_summary(model, tmp_path, capsys, monkeypatch):
    write_books(tmp_path / "novels")
    monkeypatch.setattr(ask_questions, "QUESTIONS", ask_questions.QUESTIONS[:2])
    command = ["--env_conf", "env.json", "--facts", "2", "--max_new_tokens", "2", "--json"]
    ask_questions.main([*command, "--books", "novels", "--out", "asked"])
    result = json.loads((tmp_path / "asked/results.json").read_text())
    assert [row["kind"] for row in result["rows"]] == ["facts", "facts", "books", "books"]
    assert result["rows"][2]["answer"] == "Admiral Benbow"
    assert json.loads(capsys.readouterr().out)["summary"] == result["summary"]
    assert len(result["summary"]) == 2 * 5
