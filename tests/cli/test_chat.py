"""Runs the commands compress, ask and chat, and the examples, with the tiny model."""

import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from uiollms import ConfigError, MemoryLM
from uiollms.build import load_memory_lm
from uiollms.cli.chat import first_turn, later_turn, main
from uiollms.config.load import load_env_config
from uiollms.model.memory import Memory, join
from uiollms.weights.adapters import save_weights

ROOT = Path(__file__).parents[2]


def token_ids(tokenizer, text):
    """The token ids [1, T] of a text, without special tokens."""
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])


TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}[sys]{% endif %}<{{ m['role'] }}>{{ m['content'] "
    "}}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def trained(workspace) -> MemoryLM:
    """Writes random weights to the save_ckp of the workspace. Returns their model."""
    model, _ = load_memory_lm(load_env_config("env.json"), "env.json")
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(model, "out/ckp")
    return model


def run(capsys, *arguments: str, stdin: str = "") -> str:
    main([*arguments, "--env_conf", "env.json"], io.StringIO(stdin))
    return capsys.readouterr().out


def test_ask_answers_as_generate_does(trained, capsys):
    text = Path("book0.txt").read_text()
    output = run(capsys, "compress", "book0.txt", "-o", "book.mem")
    full = len(text) // 16
    weights = "weights: out/ckp, base in torch.float32\n"
    assert output.startswith(
        f"{weights}book.mem: {full * 16} tokens in {full * 2} memory slots (+ {len(text) % 16} "
        "open tokens), "
    )
    memory = Memory.load("book.mem", trained)
    assert [(s.name, s.num_tokens) for s in memory.sources] == [("book0.txt", len(text))]
    tokenizer = AutoTokenizer.from_pretrained(trained.base.config._name_or_path)
    ids = token_ids(tokenizer, "\n\nQuestion: Why?\nAnswer:")
    options = dict(do_sample=False, max_new_tokens=9, stop_strings=["\n"], tokenizer=tokenizer)
    prompt = torch.cat([token_ids(tokenizer, text), ids], 1)
    expected = trained.generate(prompt, **options)[0, prompt.shape[1] :]
    answer = tokenizer.decode(expected, skip_special_tokens=True)
    output = run(capsys, "ask", "book.mem", "Why?", "Who?", "--max_new_tokens=9", "--json")
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["question"] for line in lines] == ["Why?", "Who?"]
    assert lines[0]["answer"] == answer.strip()
    assert lines[0]["new_tokens"] == len(expected)
    streamed = run(capsys, "ask", "book.mem", "Why?", "--max_new_tokens=9")
    assert streamed == f"{weights}Why?\n> {answer}\n"
    sampling = ("ask", "book.mem", "Why?", "--max_new_tokens=9", "--temperature=2")
    sampled = [run(capsys, *sampling, f"--seed={seed}") for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


EVIL = "\x1b[31m[bold]\u202e\x9b2J.txt"


def test_control_characters_in_file_names_are_escaped(trained, capsys):
    """The sources of a memory, and the errors of `ask` and `chat` for memories that do not fit, are
    printed with control characters escaped."""
    Path(EVIL).write_text("A book. " * 9)
    for flags in ((), ("--json",)):
        output = run(capsys, "compress", EVIL, "-o", "evil.mem", *flags)
        assert all(line.isprintable() for line in output.splitlines())
    assert json.loads(output)["sources"][0]["name"] == EVIL
    assert Memory.load("evil.mem").sources[0].name == EVIL
    for flags in (("--max_new_tokens=2",), ("--max_new_tokens=2", "--json")):
        output = run(capsys, "ask", "evil.mem", "Why?", *flags)
        output += run(capsys, "chat", "--memory", "evil.mem", *flags, stdin="Hi")
        assert not set(output) & set("\x1b\x9b\u202e")


def test_an_answer_depends_only_on_the_seed(trained, capsys):
    """Neither earlier questions nor other random draws change an answer."""
    run(capsys, "compress", "book0.txt", "-o", "book.mem")
    options = ("--max_new_tokens=9", "--temperature=9", "--seed=1", "--json")
    first = run(capsys, "ask", "book.mem", "Why?", *options)
    torch.manual_seed(123)
    both = run(capsys, "ask", "book.mem", "Who?", "Why?", *options).splitlines()
    assert json.loads(both[1])["answer"] == json.loads(first)["answer"]


def test_ask_and_chat_refuse_a_memory_with_a_flipped_bit(trained, capsys):
    run(capsys, "compress", "book0.txt", "-o", "book.mem")
    data = bytearray(Path("book.mem").read_bytes())
    data[-5] ^= 1
    Path("book.mem").write_bytes(data)
    for arguments in (["ask", "book.mem", "Why?"], ["chat", "--memory", "book.mem"]):
        with pytest.raises(ConfigError, match="^book.mem: damaged: .*sha256"):
            run(capsys, *arguments, stdin="Hi")


def test_several_files_and_several_memories_are_joined(trained, capsys):
    for i in (0, 1):
        Path(f"book{i}.txt").write_text(f"{i}, the shorter edition. " * (3 + i))
        run(capsys, "compress", f"book{i}.txt", "-o", f"{i}.mem")
    output = run(capsys, "compress", "book0.txt", "book1.txt", "-o", "both.mem", "--json")
    sources = json.loads(output)["sources"]
    assert [source["name"] for source in sources] == ["book0.txt", "book1.txt"]
    joined, both = join([Memory.load("0.mem"), Memory.load("1.mem")]), Memory.load("both.mem")
    assert torch.equal(joined.slots, both.slots) and torch.equal(joined.open_ids, both.open_ids)
    options = ("Why?", "--max_new_tokens=5")
    expected = run(capsys, "ask", "both.mem", *options)
    assert run(capsys, "ask", "0.mem", "1.mem", *options) == expected


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_chat_reads_every_earlier_turn(trained, tiny_folder, capsys, monkeypatch, template):
    """Two turns give the same stream as the whole conversation, which a twin formats in one
    piece."""
    trained.save_pretrained("model", tokenizer=tokenizer_with(tiny_folder, template))
    tokenizer = AutoTokenizer.from_pretrained("model")
    arguments = ["chat", "--model", "model", "--max_new_tokens=6"]
    main([*arguments, "--json"], io.StringIO("Hello\n\nAnd then?\n/quit\nnever read\n"))
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn["question"] for turn in turns] == ["Hello", "And then?"]
    options = dict(do_sample=False, max_new_tokens=6)
    opening = "[sys]<user>Hello</s>\n<assistant>"
    continuation = "</s>\n<user>And then?</s>\n<assistant>"
    if not template:
        options |= dict(stop_strings=["\n"], tokenizer=tokenizer)
        opening, continuation = (
            f"\n\nQuestion: {question}\nAnswer:" for question in ("Hello", "And then?")
        )
    model = MemoryLM.from_pretrained("model")
    first = model.generate(token_ids(tokenizer, opening), **options)
    later = token_ids(tokenizer, continuation)
    if torch.equal(first[:, -1:], later[:, :1]):
        later = later[:, 1:]
    whole = torch.cat([first, later], 1)
    second = model.generate(whole, **options)
    answer = tokenizer.decode(second[0, whole.shape[1] :], skip_special_tokens=True)
    assert turns[1]["answer"] == answer.strip()
    read = second.shape[1] - 1
    assert turns[1]["held"] == dict(
        tokens=read // 16 * 16, slots=read // 16 * 2, open_tokens=read % 16
    )
    main(arguments, io.StringIO("Hello\n"))
    read = first.shape[1] - 1
    assert capsys.readouterr().out.endswith(
        f"[memory: {read // 16 * 16} tokens in {read // 16 * 2} memory slots (+ {read % 16} open "
        "tokens)]\n"
    )


def tokenizer_with(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [None, "<s>" + TEMPLATE])
def test_bos_is_only_at_the_start_of_the_stream(trained, tiny_folder, template):
    """A tokenizer that adds BOS adds it at the start of the stream, and not before a question that
    follows a document."""
    tokenizer = tokenizer_with(tiny_folder, template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    empty, read = trained.new_state(), trained.compress("A book. ", tokenizer).state(trained)
    assert read.open_ids[0, 0] == 1 and (read.open_ids == 1).sum() == 1
    alone, after_document = first_turn(tokenizer, "Hi", empty), first_turn(tokenizer, "Hi", read)
    assert alone[0, 0] == 1 and (alone == 1).sum() == 1
    assert torch.equal(alone[:, 1:], after_document)


def test_a_later_turn_closes_the_answer_before_it(tiny_folder):
    """The end token is added only if the answer did not generate it."""
    tokenizer = tokenizer_with(tiny_folder, TEMPLATE)
    expected = token_ids(tokenizer, "</s>\n<user>Hi</s>\n<assistant>")
    assert torch.equal(later_turn(tokenizer, "Hi", torch.tensor([[2]])), expected)
    unfinished = torch.tensor([[9]])
    found = later_turn(tokenizer, "Hi", unfinished)
    assert torch.equal(found, torch.cat([unfinished, expected], 1))


def test_chat_continues_from_a_memory(trained, capsys):
    run(capsys, "compress", "book0.txt", "-o", "book.mem")
    chat = ("chat", "--memory", "book.mem")
    (line,) = run(capsys, *chat, "--max_new_tokens=3", "--json", stdin="Hi").splitlines()
    memory = Memory.load("book.mem")
    assert json.loads(line)["held"]["slots"] >= memory.num_slots
    # This chat has no question.
    output = run(capsys, *chat)
    num_open = len(memory.open_ids)
    assert output == (
        "weights: out/ckp, base in torch.float32\n"
        f"[memory: {memory.num_tokens - num_open} tokens in {memory.num_slots} memory slots "
        f"(+ {num_open} open tokens)]\n"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["compress", "book0.txt", "-o", "book.txt"],
            "book.txt: the file name of a memory must end in .mem",
        ),
        (["compress", "none.txt", "-o", "a.mem"], "none.txt: cannot be read"),
        (["compress", "latin.txt", "-o", "a.mem"], "latin.txt: byte 1 is not UTF-8"),
        (
            ["compress", "long.txt", "-o", "a.mem"],
            "long.txt: the document has 2000 tokens, the capacity is 926",
        ),
        (
            ["compress", "book0.txt", "book1.txt", "book2.txt", "-o", "a.mem"],
            "the files together: the document has",
        ),
        (["ask", "none.mem", "Why?"], "none.mem: cannot be read"),
        (["ask", "Why?"], "no memory"),
        (["ask", "book.mem"], "no question"),
        (["chat", "--max_new_tokens=1000"], "the longest answer: the document has 10"),
    ],
)
def test_errors_are_one_line(trained, capsys, arguments, message):
    Path("latin.txt").write_bytes(b"a\xe4\n")
    Path("long.txt").write_text("x" * 2000)
    with pytest.raises(ConfigError, match=message) as error:
        run(capsys, *arguments, stdin="Hi")
    assert "\n" not in str(error.value) and not list(Path().glob("*.mem"))


def test_commands_without_weights_are_refused(workspace, capsys):
    with pytest.raises(ConfigError, match="env.json: there are no trained weights yet"):
        run(capsys, "chat", stdin="Hi")


# The output of each example: figures of its model, or its input followed by generated text.
NUMBER = r"\d+\.\d+"
EXPECTED = {
    "compress_and_ask.py": r"\d+ tokens: \d+ slots per layer and \d+ uncompressed tokens\n"
    r"What is this about\? .+How does it begin\? .+What does the note say\? ",
    "evaluate.py": rf"no memory \(window only\).*{NUMBER}.*with memory.*{NUMBER}.*"
    rf"raw context.*{NUMBER}.*"
    r'\[\{"task": "files:book0.txt", "task_type": "perplexity",',
    "generate.py": r".+The chair.+My fellow citizens, the state of the.+ In short,.+ But.+",
    "train.py": rf"64 tokens, perplexity {NUMBER}\n"
    rf"(step \d: loss {NUMBER}, encoded with a graph: chunks \[0, 1, 2\]\n){{3}}"
    rf"perplexity {NUMBER}\n",
}


# sotu_task.py belongs to an lm-eval task, which tests/evaluation/test_lm_eval_model.py runs.
@pytest.mark.parametrize(
    "script",
    sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.stem != "sotu_task"),
)
def test_examples_run(trained, tiny_folder, capsys, monkeypatch, script):
    trained.save_pretrained("model", tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    monkeypatch.setattr(sys, "argv", [script, "model", "book0.txt"])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    output = capsys.readouterr().out
    assert re.search(EXPECTED[script], output, re.DOTALL), output
