"""Models, adapters, checkpoints, memories and configs that version 0.1 wrote load in this one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_base
from test_commands import call
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import uiollms.__main__
from uiollms import ConfigError, Memory, MemoryLM
from uiollms.build import load_memory_lm
from uiollms.cli.common import reporting_errors
from uiollms.config.load import load_env_config
from uiollms.model.memory import join
from uiollms.weights.adapters import load_weights, save_weights

FOLDER = Path(__file__).parent / "fixtures" / "version_0_1"
MEMORY = dict(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4)
TEXT = "It was a bright cold day, and the clocks were striking. "
LETTERS = "abcdefghijklmnopqrstuvwxyzIWQA,.:?ĠĊ01"
# In float32, where another kind of machine may add in another order.
MACHINES = dict(rtol=1e-4, atol=1e-5)


def make_fixtures(folder: Path) -> None:
    """Writes files with the program of this commit, and the numbers that it computes from them,
    into a new `folder`. At version 0.1 this wrote fixtures/version_0_1. A version that writes
    another format needs a separate folder:

    PYTHONPATH=src:tests python -c "
    from test_versions import *; import os
    Path('/tmp/new').mkdir(); os.chdir('/tmp/new'); make_fixtures(Path())"

    base/            a Llama of 2 layers, hidden size 16, in bfloat16, with a tokenizer of letters
    env.json memory.json test.json book*.txt    configs, and the texts that they read
    run/             a run of 6 documents, killed after the checkpoint of document 4
    adapter/ weights.pth   the weights of a run at save_ckp, in both formats
    model/           written by save_pretrained(include_base=True)
    book.mem         written by `uiollms compress book0.txt -o book.mem`
    expected.json    the numbers that each of them gives
    """
    shape = dict(vocab_size=3 + len(LETTERS), hidden_size=16, intermediate_size=8)
    shape |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    make_base(dtype=torch.bfloat16, **shape, max_position_embeddings=128).save_pretrained(
        folder / "base"
    )
    letter_tokenizer().save_pretrained(folder / "base")
    for i in range(2):
        (folder / f"book{i}.txt").write_text(f"{i}: {TEXT * 2}")
    files = dict(task_name="files:book*.txt", num_instance=2, truncation=100)
    env = dict(
        model=dict(
            model_name="base",
            model_dtype="fp32",
            model_structure="llama",
            config="memory.json",
            save_ckp="adapter",
            device_map="cpu",
        ),
        train=dict(
            tbptt=2,
            train_iters=6,
            max_lr=1e-1,
            warmup=0.3,
            save=2,
            eval=6,
            keep_last=3,
            run_dir="run",
            corpus=[dict(name="files:book*.txt", partition=1, truncation=80, crop="random")],
        ),
    )
    test = dict(tasks=[dict(task_type="perplexity", compare=["window", "raw"], **files)])
    for name, value in (("env", env), ("memory", MEMORY), ("test", test)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1))
    assert call("train.py", "--env_conf", "env.json") == 0
    assert call("test.py", "--env_conf", "env.json") == 0
    metrics, scores = metrics_of(folder / "run"), scores_of(folder / "run")
    cut_back(folder / "run")

    model, tokenizer = load_memory_lm(load_env_config("env.json"), "env.json")
    load_weights(model, "adapter")
    save_weights(model, "weights.pth")
    half = MemoryLM.from_pretrained("adapter", base="base", dtype="bf16")
    half.save_pretrained("model", include_base=True)
    # The fixture `old` puts this folder back, so that the stored files are small.
    shutil.rmtree(folder / "model" / "base")
    memory = model.compress((folder / "book0.txt").read_text(), tokenizer, source="book0.txt")
    memory.save("book.mem")
    expected = dict(metrics=metrics, test=scores, adapter=nll_of(model, tokenizer).tolist())
    expected["memory"] = question_logits(memory, model, tokenizer).tolist()
    (folder / ".adapter-lock").unlink()
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))


def letter_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = dict(eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def metrics_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "machine")} for line in lines]


def cut_back(run: Path) -> None:
    """Removes from a whole run everything after document 4, as if it had been killed there, and its
    pictures."""
    for name in ("step-00000002", "step-00000006"):
        shutil.rmtree(run / "checkpoints" / name)
    for name in ("curve.png", "test.png", "test.json", "test-nll.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "tensorboard")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]))


def scores_of(run: Path) -> list[dict]:
    """Returns the NLL of every mode and task that test.py wrote into a run folder."""
    found = json.loads((run / "test.json").read_text())["results"]
    return [{mode: result[mode]["nll"] for mode in ("memory", "window", "raw")} for result in found]


@torch.no_grad()
def nll_of(model: MemoryLM, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Returns the NLL of every token but the first of a text of more than four chunks."""
    ids = torch.tensor([tokenizer(TEXT * 2).input_ids])[:, :75]
    logits = model(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


@torch.no_grad()
def question_logits(
    memory: Memory, model: MemoryLM, tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """Returns the logits [V] after a question to a memory."""
    ids = torch.tensor([tokenizer("Q: was it bright? A:").input_ids])
    return model(ids, memory.state(model)).logits[0, -1]


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the fixtures. It is the working directory, and a run may continue in it."""
    folder = tmp_path / "old"
    shutil.copytree(FOLDER, folder)
    (folder / "model" / "base").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(folder / "base" / name, folder / "model" / "base")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def expected() -> dict:
    return json.loads((FOLDER / "expected.json").read_text())


def old_model() -> tuple[MemoryLM, PreTrainedTokenizerFast]:
    return load_memory_lm(load_env_config("env.json"), "env.json")


@pytest.mark.parametrize("weights", ["adapter", "weights.pth", "run/checkpoints/step-00000004"])
def test_weights_of_version_0_1_load(old, expected, weights):
    """The weights in the run's checkpoint are older than those at save_ckp, so they give other
    numbers."""
    model, tokenizer = old_model()
    load_weights(model, weights)
    found = nll_of(model, tokenizer)
    same = torch.allclose(found, torch.tensor(expected["adapter"]), **MACHINES)
    assert same == (not weights.startswith("run"))


def test_a_model_saved_by_version_0_1_loads(old, expected):
    model = MemoryLM.from_pretrained("model", dtype="fp32")
    found = nll_of(model, letter_tokenizer())
    torch.testing.assert_close(found, torch.tensor(expected["adapter"]), **MACHINES)


def test_a_run_continues_from_its_checkpoint(old, expected, caplog):
    before = len(metrics_of(old / "run"))
    assert 0 < before < len(expected["metrics"])
    assert call("train.py", "--env_conf", "env.json", "--resume") == 0
    found = metrics_of(old / "run")
    assert found[:before] == expected["metrics"][:before]
    for line, old_line in zip(found, expected["metrics"], strict=True):
        assert line.keys() == old_line.keys() and line["iteration"] == old_line["iteration"]
        for name in ("nll", "lr", "grad_norm"):
            assert line[name] == pytest.approx(old_line[name], rel=1e-3), (line, old_line)


def test_an_evaluation_gives_the_same_numbers(old, expected):
    assert call("test.py", "--env_conf", "env.json") == 0
    for found, old_scores in zip(scores_of(old / "run"), expected["test"], strict=True):
        assert found == pytest.approx(old_scores, rel=1e-4)


def test_a_memory_of_version_0_1_loads(old, expected, caplog):
    model, tokenizer = old_model()
    load_weights(model, "adapter")
    memory = Memory.load("book.mem", model)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "uiollms"]
    assert warning.startswith("book.mem: written by version 0.1, without a checksum")
    found = question_logits(memory, model, tokenizer)
    torch.testing.assert_close(found, torch.tensor(expected["memory"]), **MACHINES)
    # The new file has a checksum, and as few facts about the base as the old one.
    memory.save("again.mem")
    found = question_logits(Memory.load("again.mem", model), model, tokenizer)
    torch.testing.assert_close(found, torch.tensor(expected["memory"]), **MACHINES)


def test_the_recorded_fields_of_an_old_memory_are_checked(old):
    model, tokenizer = old_model()
    load_weights(model, "run/checkpoints/step-00000004")
    with pytest.raises(ConfigError, match="book.mem: made by another model: adapter"):
        Memory.load("book.mem", model)
    load_weights(model, "adapter")
    with torch.no_grad():
        model.base.model.norm.weight[3] *= 1.01
    with pytest.raises(ConfigError, match="book.mem: made by another model: base_weights"):
        Memory.load("book.mem", model)
    model.base.model.norm.weight[3] /= 1.01
    new = model.compress("A book.", tokenizer, source="new")
    message = "'new' .* different versions of this program .* compress both"
    with pytest.raises(ConfigError, match=message):
        join([Memory.load("book.mem"), new])


def call_ask(*arguments: str) -> int:
    return reporting_errors(lambda: uiollms.__main__.main(list(arguments)))


def test_a_question_about_a_memory_is_answered(old, capsys):
    """Options that read the text so far see the question, because an old memory has no text."""
    assert call_ask("ask", "book.mem", "Was it?", "--env_conf", "env.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] > 0


def test_the_fixtures_are_small_and_name_no_machine():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    assert not [
        path for path in files if b"/work/" in path.read_bytes() or b"/home/" in path.read_bytes()
    ]
