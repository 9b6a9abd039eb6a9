"""Runs local tasks of lm-eval on the tiny model, and compares them with a model that reads token
by token."""

import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from uiollms import ConfigError, MemoryLM
from uiollms.build import load_memory_lm
from uiollms.cli.lm_eval import main
from uiollms.config.load import load_env_config
from uiollms.evaluation.base_prompts import base_prompt
from uiollms.evaluation.lm_eval_model import HarnessLM
from uiollms.weights.adapters import save_weights

ROOT = Path(__file__).parents[2]
BOS, CHUNK, POSITIONS = 1, 16, 128
# 56 memories of 2 slots leave positions for a whole chunk, 57 for 14 tokens.
CAPACITY = 57 * 16 + 14
# This text has 168 tokens, more than the base has positions.
DOCUMENT = "It was a bright cold day, and the clocks were striking. " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder) -> Path:
    """A config, its trained weights, and a base that generates letters only, so that its output can
    be the text of a task."""
    folder = tmp_path_factory.mktemp("harness")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    letters = tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz"])
    silent = torch.ones(base.config.vocab_size, dtype=torch.bool)
    silent[letters] = False
    with torch.no_grad():
        for parameter in base.parameters():
            # With large weights the next token depends on more than the last one.
            parameter *= 8 if parameter.dim() == 2 else 1
        base.lm_head.weight[silent] *= 0.01
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    memory = dict(num_memory=2, chunk_size=CHUNK, lora_rank=2, lora_alpha=4)
    (folder / "memory.json").write_text(json.dumps(memory))
    model = dict(
        model_name=str(folder / "base"),
        model_dtype="fp32",
        model_structure="llama",
        config=str(folder / "memory.json"),
    )
    corpus = [dict(name="files:*.txt", partition=1)]
    train = dict(tbptt=2, train_iters=1, max_lr=1e-2, save=1, eval=1, corpus=corpus)
    env = folder / "env.json"
    env.write_text(json.dumps(dict(model=model | dict(device_map="cpu"), train=train)))
    trained, _ = load_memory_lm(load_env_config(env), env)
    for parameter in trained.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(trained, folder / "weights")
    return folder


def model_args(folder: Path) -> dict:
    return {
        "env_conf": str(folder / "env.json"),
        "weights": str(folder / "weights"),
        "model.model_dtype": "fp64",
    }


@pytest.fixture(scope="module")
def lm(folder) -> HarnessLM:
    # lm-eval's command line passes this device by default.
    return HarnessLM(**model_args(folder), batch_size=3, device="cuda:0")


# ---- the slow twin -------------------------------------------------------------------------------


@torch.no_grad()
def token_by_token(model: MemoryLM, ids: list[int]) -> tuple[list[float], list[bool]]:
    """Returns for every token but the first its log probability after the tokens before it, and
    whether it is the likeliest."""
    state, found, likeliest = None, [], []
    for token, following in zip(ids, ids[1:], strict=False):
        output = model(torch.tensor([[token]]), state)
        state, logits = output.past_key_values, output.logits[0, -1]
        found.append(logits.log_softmax(-1)[following].item())
        likeliest.append(logits.argmax().item() == following)
    return found, likeliest


@torch.no_grad()
def greedy_tokens(model: MemoryLM, ids: list[int], count: int) -> list[int]:
    """Generates the likeliest tokens, one by one."""
    output, tokens = model(torch.tensor([ids])), []
    for _ in range(count):
        tokens.append(output.logits[0, -1].argmax().item())
        output = model(torch.tensor([tokens[-1:]]), output.past_key_values)
    return tokens


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def answers(lm: HarnessLM, kind: str, *arguments: tuple) -> list:
    return getattr(lm, kind)([request(kind, *a) for a in arguments], disable_tqdm=True)


# ---- through the harness -------------------------------------------------------------------------


def write_task(folder: Path, name: str, documents: list[dict], **task) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = dict(data_files={"test": str(data)}, cache_dir=str(folder / "cache"))
    task |= dict(task=name, dataset_path="json", dataset_kwargs=source, test_split="test")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def test_three_lm_eval_tasks_equal_a_token_by_token_model(folder, lm, tmp_path):
    encode, decode = lm.tokenizer.encode, lm.tokenizer.decode
    prompts = [f"{DOCUMENT}Question: {q}?\nAnswer:" for q in ("who", "when")]
    greedy = [decode(greedy_tokens(lm.model, encode(prompt), 20)) for prompt in prompts]
    choices = [["no", answer, "not at all, or hardly ever"] for answer in greedy]
    rows = [dict(prompt=p, choices=c) for p, c in zip(prompts, choices, strict=True)]
    write_task(
        tmp_path,
        "choose",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{prompt}}",
        doc_to_choice="{{choices}}",
        doc_to_target=1,
        target_delimiter="",
    )
    stop = max((greedy[0][i : i + 2] for i in range(19)), key=greedy[0].find)
    expected_answers = [answer.split(stop)[0] for answer in greedy]
    write_task(
        tmp_path,
        "answer",
        [dict(prompt=p, answer=a) for p, a in zip(prompts, expected_answers, strict=True)],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs=dict(until=[stop], max_gen_toks=20, do_sample=False),
        metric_list=[dict(metric="exact_match")],
    )
    texts = [DOCUMENT + "And then?", "Short.", DOCUMENT]
    write_task(
        tmp_path,
        "read",
        [dict(text=text) for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(
        "uiollms",
        model_args(folder),
        tasks=["choose", "answer", "read"],
        task_manager=manager,
        batch_size=2,
        bootstrap_iters=0,
    )

    for sample, prompt, three in zip(results["samples"]["choose"], prompts, choices, strict=True):
        for (found, is_greedy), choice in zip(sample["filtered_resps"], three, strict=True):
            logs, likeliest = token_by_token(lm.model, encode(prompt + choice))
            # In float64, batches and chunk sizes differ.
            assert found == pytest.approx(sum(logs[-len(choice) :]), rel=1e-9)
            assert is_greedy == all(likeliest[-len(choice) :]) == (choice == three[1])
    found_answers = [sample["filtered_resps"][0] for sample in results["samples"]["answer"]]
    assert found_answers == expected_answers and 0 < len(found_answers[0]) < 20
    assert results["results"]["answer"]["exact_match,none"] == 1
    logs = [token_by_token(lm.model, [BOS, *encode(text)])[0] for text in texts]
    assert [len(one) for one in logs] == [len(text) for text in texts] and len(logs[0]) > POSITIONS
    for sample, expected in zip(results["samples"]["read"], logs, strict=True):
        assert sample["filtered_resps"][0] == pytest.approx(sum(expected), rel=1e-9)
    bits = -sum(map(sum, logs)) / sum(map(len, logs)) / math.log(2)
    assert results["results"]["read"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-9)
    assert results["config"]["weights"] == str(folder / "weights")
    assert results["max_length"] == CAPACITY


PAST = (
    "loglikelihood_rolling: 2 of 2 requests are past the capacity of 926 tokens, the longest has "
    "17297"
)


def test_the_example_task_is_refused_past_the_capacity(lm):
    """The speeches of the example are longer than the tiny model's capacity."""
    manager = TaskManager(include_path=str(ROOT / "examples"), include_defaults=False)
    with pytest.raises(ConfigError, match=PAST):
        simple_evaluate(lm, tasks=["sotu"], task_manager=manager, limit=2)


# ---- without memory ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(folder) -> tuple[HarnessLM, HFLM]:
    """Mode raw, and lm-eval's own model of the base."""
    raw = HarnessLM(**model_args(folder), mode="raw")
    return raw, HFLM(pretrained=raw.model.base, tokenizer=raw.tokenizer, device="cpu")


def test_mode_raw_equals_lm_evals_own_model_of_the_base(bases):
    raw, base = bases
    text = DOCUMENT[:80]
    greedy = dict(until=["zz"], max_gen_toks=20, do_sample=False)
    for kind, requests in {
        "loglikelihood": [(text, " And then"), (text[:20], "a"), ("", "Once upon a time")],
        "loglikelihood_rolling": [(text,), ("Short.",)],
        "generate_until": [(text, greedy), ("Once upon", greedy)],
    }.items():
        found, expected = answers(raw, kind, *requests), answers(base, kind, *requests)
        if kind == "loglikelihood":
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            found, expected = ([value for value, _ in side] for side in (found, expected))
        # lm-eval's model computes log-softmax in float32.
        assert found == (pytest.approx(expected, rel=1e-5) if "log" in kind else expected)


@pytest.mark.parametrize("mode", ["window", "recent", "streaming"])
def test_other_modes_are_mode_raw_after_fewer_tokens(lm, bases, monkeypatch, mode):
    raw, _ = bases
    monkeypatch.setattr(lm, "mode", mode)
    settings = dict(until=[], max_gen_toks=20, do_sample=False)
    ids = lm.tok_encode(DOCUMENT)
    shorter = lm.tokenizer.decode(base_prompt(ids, lm.model.memory_config, mode))
    assert len(ids) > len(shorter) == len(lm.tok_encode(shorter))
    found = answers(lm, "generate_until", (DOCUMENT, settings))
    assert found == answers(raw, "generate_until", (shorter, settings)) and len(found[0]) == 20
    found = answers(lm, "loglikelihood", (DOCUMENT + "x", "and a word"))
    ids = lm.tok_encode(DOCUMENT + "x")
    shorter = lm.tokenizer.decode(base_prompt(ids, lm.model.memory_config, mode))
    expected = answers(raw, "loglikelihood", (shorter, "and a word"))
    assert found[0] == pytest.approx(expected[0], rel=1e-9)  # batches differ
    assert answers(lm, "loglikelihood", ("text", "")) == [(0.0, True)]


def test_a_sampled_answer_of_the_base_depends_on_the_seed_alone(bases):
    raw, _ = bases
    settings = dict(until=[], max_gen_toks=20, do_sample=True, temperature=9.0)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found += answers(raw, "generate_until", ("Once upon", settings))
        torch.rand(3)
    assert found[0] == found[1] != found[2]


def test_a_prompt_is_never_truncated(lm, bases, monkeypatch):
    """The error names the task, the tokens and what fits."""
    raw, _ = bases
    settings = dict(until=[], max_gen_toks=8)
    requests = [request("generate_until", text, settings) for text in ("short", DOCUMENT)]
    requests[1].task_name = "niah_single_1"
    message = (
        r"generate_until \(prompt and max_gen_toks\): 1 of 2 requests are past the base's 128 "
        r"positions \(mode raw\), the longest has 176 \(number 1 of task niah_single_1\); choose "
        r"others \(lm-eval's --samples\), or another mode"
    )
    with pytest.raises(ConfigError, match=message):
        raw.generate_until(requests)
    monkeypatch.setattr(lm, "mode", "recent")
    lm.generate_until(requests, disable_tqdm=True)  # reads few of the tokens
    settings["max_gen_toks"] = 128
    with pytest.raises(ConfigError, match=r"past the base's 128 positions \(mode recent\)"):
        lm.generate_until(requests)


def test_an_unknown_mode_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="mode 'rag' is unknown; allowed are memory, window, raw"):
        HarnessLM("missing.json", mode="rag")


# ---- the command `uiollms eval` ------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the command in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "uiollms", "eval", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )


def test_no_script_of_lm_eval_is_replaced():
    """lm-eval's scripts are `lm_eval` and `lm-eval`."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {"uiollms"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_the_command_has_one_more_model_than_lm_evals(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["uiollms"])
    with pytest.raises(SystemExit) as end:
        main(arguments)
    output = capsys.readouterr().out
    assert end.value.code == 0
    assert "uiollms eval --model uiollms --model_args env_conf=smollm2-8x.json" in output
    assert "lm-eval run --model hf" in output


def test_a_new_process_finds_this_model_and_those_of_lm_eval():
    """The process has not imported the model before, which would register it."""
    code = """
import sys
from uiollms.cli.lm_eval import register
register()
from lm_eval.api.registry import get_model, model_registry
print("hf" in model_registry, "uiollms.evaluation.lm_eval_model" in sys.modules)
print(get_model("uiollms").__name__)
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.stdout.split() == ["True", "False", "HarnessLM"], found.stderr


def test_without_lm_eval_the_command_prints_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["uiollms"])
    assert main(["--help"]) == 2
    output = capsys.readouterr()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, _ = extras["optional-dependencies"]["lm-eval"]  # and what its RULER needs
    assert output.err == f"lm-eval is not installed; run: pip install '{needed}'\n"
    assert "uiollms eval --model uiollms --model_args" in output.out


# It is slow because lm-eval lists its 14,000 tasks first.
@pytest.mark.slow
def test_the_command_evaluates_a_task(folder, tmp_path):
    texts = [DOCUMENT, "Short."]
    write_task(
        tmp_path,
        "read",
        [dict(text=text) for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
    )
    arguments = f"env_conf={folder / 'env.json'},weights={folder / 'weights'}"
    model = ["--model", "uiollms", "--model_args", arguments]
    task = str(tmp_path / "read.yaml")
    ran = command(*model, "--tasks", task, "--output_path", str(tmp_path / "results"))
    assert ran.returncode == 0, ran.stderr
    (path,) = (tmp_path / "results").rglob("results*.json")
    lm = HarnessLM(str(folder / "env.json"), str(folder / "weights"))
    nats = -sum(answers(lm, "loglikelihood_rolling", *((text,) for text in texts)))
    bits = json.loads(path.read_text())["results"]["read"]["bits_per_byte,none"]
    assert bits == pytest.approx(nats / sum(map(len, texts)) / math.log(2), rel=1e-5)
    assert "|read |" in ran.stdout

    task = str(ROOT / "examples" / "sotu_task.yaml")
    ran = command(*model, "--limit", "2", "--tasks", task)
    assert ran.returncode == 2 and ran.stderr.strip().splitlines()[-1].startswith(PAST), ran.stderr


# ---- special tokens, order, memory ---------------------------------------------------------------


@pytest.mark.parametrize("writes_bos", [False, True])
def test_the_first_token_is_predicted_from_one_bos(folder, writes_bos):
    lm = HarnessLM(**model_args(folder))
    if writes_bos:
        lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    text = lm.tokenizer.encode("Once upon a time", add_special_tokens=False)
    expected = sum(token_by_token(lm.model, [BOS, *text])[0])
    found = answers(lm, "loglikelihood_rolling", ("Once upon a time",), ("<s>Once upon a time",))
    assert found == pytest.approx([expected, expected], rel=1e-9)
    ((found, _),) = answers(lm, "loglikelihood", ("", "Once upon a time"))
    assert found == pytest.approx(expected, rel=1e-9)
    # A context that starts with BOS gets no second one.
    for start in ("", "<s>"):
        ids = [BOS, *text] if start or writes_bos else text
        expected = sum(token_by_token(lm.model, ids)[0][-5:])
        ((found, _),) = answers(lm, "loglikelihood", (f"{start}Once upon a", " time"))
        assert found == pytest.approx(expected, rel=1e-9)


def test_answers_keep_their_order_and_chunks_are_compressed_once(lm, monkeypatch):
    pairs = [
        ("z" * 20, "a"),
        (DOCUMENT + "x", "b"),
        (DOCUMENT + "y", "c" * 40),
        (DOCUMENT + "x", ""),
        ("z" * 20, "d"),
        ("z", ""),
    ]
    alone = [answers(lm, "loglikelihood", pair)[0] for pair in pairs]
    assert alone[3] == alone[5] == (0.0, True)
    encoded, encode_layers = [], lm.model.encode_layers
    monkeypatch.setattr(
        lm.model,
        "encode_layers",
        lambda ids, *rest: encoded.append(len(ids)) or encode_layers(ids, *rest),
    )
    lm.last_ids = []
    together = answers(lm, "loglikelihood", *pairs)
    expected = [found for found, _ in alone]
    assert [found for found, _ in together] == pytest.approx(expected, rel=1e-9)
    full = (len(DOCUMENT) + 1) // CHUNK
    # The chunks are those of the document, 3 of 9 open tokens and 39 of the 40 "c", and 1 of the
    # first 16 "z".
    assert sum(encoded) == full + 3 + 1


@pytest.mark.parametrize("recent", [5, CHUNK])
def test_reused_chunks_have_their_recent_tokens(lm, monkeypatch, recent):
    config = lm.model.memory_config.model_copy(update={"recent_tokens": recent})
    monkeypatch.setattr(lm.model, "memory_config", config)
    monkeypatch.setattr(lm, "last_ids", [])
    for prompt in (DOCUMENT + "x", DOCUMENT + "y", DOCUMENT[:-1]):
        ((found, _),) = answers(lm, "loglikelihood", (prompt, "c" * 20))
        logs, _ = token_by_token(lm.model, [*lm.tokenizer.encode(prompt + "c" * 20)])
        assert found == pytest.approx(sum(logs[-20:]), rel=1e-9)
    monkeypatch.setattr(lm, "last_ids", [])


def test_a_prompt_continues_the_answer_before_it(lm):
    settings = dict(until=[], max_gen_toks=25, temperature=0.7)

    def greedy_text(ids: list[int], count: int) -> str:
        return lm.tokenizer.decode(greedy_tokens(lm.model, ids, count))

    answer = greedy_text(lm.tokenizer.encode(DOCUMENT), 25)
    continuation = greedy_text(lm.tokenizer.encode(DOCUMENT + answer), 5)
    greedy = settings | dict(do_sample=False)
    prompts = (DOCUMENT + answer, greedy | dict(max_gen_toks=5)), (DOCUMENT, greedy)
    assert answers(lm, "generate_until", *prompts) == [continuation, answer]
    sampled = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sampled.append(answers(lm, "generate_until", (DOCUMENT, settings | dict(temperature=20.0))))
    assert sampled[0] == sampled[1] != sampled[2]
    prompts = (DOCUMENT, greedy | dict(num_beams=2)), (DOCUMENT, greedy)
    assert answers(lm, "generate_until", *prompts)[1] == answer
    assert answers(lm, "generate_until", ("", greedy)) == [greedy_text([BOS], 25)]


# Sort keys of the requests' indices.
ORDERS = [lambda i: i, lambda i: -i, lambda i: (7 * i) % 10]


@pytest.mark.parametrize(
    "settings",
    [dict(do_sample=False, repetition_penalty=1.7), dict(do_sample=True, temperature=9.0)],
)
def test_an_answer_does_not_depend_on_other_requests(folder, settings, monkeypatch):
    """An answer does not depend on order or --limit, although texts begin alike and chunks are
    reused. The last bits of a chunk's memory may depend on its batch, so every chunk is always
    encoded in the same batch."""
    lm = HarnessLM(**model_args(folder) | {"model.model_dtype": "fp32"})
    batches, encode_layers = set(), lm.model.encode_layers
    monkeypatch.setattr(
        lm.model,
        "encode_layers",
        lambda ids, *rest: batches.add(str(ids.tolist())) or encode_layers(ids, *rest),
    )
    starts = [DOCUMENT, DOCUMENT + "And then", DOCUMENT[:70], DOCUMENT * 2, "z" * 20]
    prompts = [start + end for start in starts for end in ("", "so?")]
    settings |= dict(until=[], max_gen_toks=20)
    torch.manual_seed(1234)
    alone, scored = [], []
    for prompt in prompts:
        lm.last_ids = []
        alone += answers(lm, "generate_until", (prompt, settings))
        lm.last_ids = []
        scored += answers(lm, "loglikelihood", (prompt, "a word"))
    assert len(set(alone)) > 5
    expected_batches = set(batches)
    for order in ORDERS:
        for limit in (10, 3):
            numbers = sorted(range(10), key=order)[:limit]
            found = answers(lm, "generate_until", *((prompts[i], settings) for i in numbers))
            assert found == [alone[i] for i in numbers]
            found = answers(lm, "loglikelihood", *((prompts[i], "a word") for i in numbers))
            assert found == [scored[i] for i in numbers]
    assert batches == expected_batches


def test_a_repeated_request_is_sampled_again(lm):
    """For `repeats`, lm-eval lists the same request several times."""
    one, other = (
        request("generate_until", DOCUMENT + x, dict(until=[], max_gen_toks=20, temperature=9.0))
        for x in "ab"
    )
    torch.manual_seed(1)
    found = lm.generate_until([one, one, other, one], disable_tqdm=True)
    assert len(set(found)) == 4
    found_again = lm.generate_until([other, one, one, one], disable_tqdm=True)
    assert found_again == [found[2], found[0], found[1], found[3]]


def test_answers_are_cached_one_by_one(lm, tmp_path, monkeypatch):
    """With --use_cache, an interrupted run computes only the answers that it lacks."""
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    requests = {
        "loglikelihood": [("a", "b"), ("a", "cd")],
        "loglikelihood_rolling": [("some text",)],
        "generate_until": [("a", dict(until=["\n"], max_gen_toks=3))],
    }
    found = {kind: answers(lm, kind, *arguments) for kind, arguments in requests.items()}
    monkeypatch.setattr(lm, "model", None)
    for kind, arguments in requests.items():
        found_again = getattr(cached, kind)([request(kind, *a) for a in arguments])
        assert [tuple(k) if isinstance(k, list) else k for k in found_again] == found[kind]


def test_chat_templates_are_applied(lm, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    turns = [dict(role="user", content="Hi"), dict(role="assistant", content="Well")]
    assert lm.apply_chat_template(turns[:1]) == "<user>Hi;<assistant>"
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == "<user>Hi;<assistant>Well"
    assert "/" not in lm.tokenizer_name


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(batch_size="auto"), "--batch_size auto: expected a number"),
        (dict(batch_size=0), "--batch_size 0: expected a number"),
        (dict(batch_size="9" * 5000), "--batch_size 9{60}.*: expected a number"),
        ({"model.model_dtpye": "fp64"}, "did you mean 'model_dtype'"),
        (dict(wieghts="here"), "env.json: wieghts: unknown key"),
    ],
)
def test_wrong_model_args_are_refused(folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        HarnessLM(str(folder / "env.json"), **settings)


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("loglikelihood", ("x" * CAPACITY, "y")),
        ("loglikelihood_rolling", ("x" * CAPACITY,)),
        ("generate_until", ("x" * (CAPACITY - 9), dict(max_gen_toks=10))),
    ],
)
def test_requests_past_the_capacity_are_refused(lm, kind, arguments):
    message = "1 of 2 requests are past the capacity of 926 tokens, the longest has 927"
    with pytest.raises(ConfigError, match=f"{kind}.*: {message}"):
        answers(lm, kind, ("a", *arguments[1:]), arguments)
