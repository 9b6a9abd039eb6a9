"""Runs RULER's tasks at small lengths on a tiny model, without a network."""

import inspect
import json
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uiollms import ConfigError
from uiollms.build import load_memory_lm
from uiollms.cli.ruler import main
from uiollms.config.load import load_env_config
from uiollms.evaluation import ruler
from uiollms.evaluation.lm_eval_model import HarnessLM
from uiollms.evaluation.ruler import TASKS, load_task, run_ruler
from uiollms.weights.adapters import save_weights

CHUNK, SLOTS, POSITIONS, LENGTH = 64, 4, 384, 1024


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Every connection fails."""

    def refuse(*arguments):
        raise AssertionError(f"connects to {arguments[1:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A config with trained weights. Its tokenizer has words as tokens, because some of the tasks
    do not end if 1,024 tokens hold too little text."""
    folder = tmp_path_factory.mktemp("ruler")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    modules = (ruler.cwe_utils, ruler.fwe_utils, ruler.niah_utils, ruler.vt_utils)
    texts = [inspect.getsource(module) for module in modules]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, " ".join(ruler.cwe_utils.WORDS)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "base")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(
        vocab_size=len(fast), max_position_embeddings=POSITIONS, num_key_value_heads=1, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    memory = dict(num_memory=SLOTS, chunk_size=CHUNK, lora_rank=2, lora_alpha=4)
    (folder / "memory.json").write_text(json.dumps(memory))
    model = dict(
        model_name=str(folder / "base"),
        model_dtype="fp32",
        model_structure="llama",
        config=str(folder / "memory.json"),
        device_map="cpu",
    )
    corpus = [dict(name="files:*.txt", partition=1)]
    train = dict(tbptt=2, train_iters=1, max_lr=1e-2, save=1, eval=1, corpus=corpus)
    (folder / "env.json").write_text(json.dumps(dict(model=model, train=train)))
    trained, _ = load_memory_lm(load_env_config(folder / "env.json"), folder / "env.json")
    save_weights(trained, folder / "weights")
    return folder


@pytest.fixture(scope="module")
def lm(folder) -> HarnessLM:
    return HarnessLM(str(folder / "env.json"), str(folder / "weights"))


def test_the_command_writes_a_table_of_task_length_and_mode(folder, tmp_path, capsys):
    """All six tasks run offline. A prompt past the base's positions is a fault and has no score."""
    arguments = ["--env_conf", str(folder / "env.json"), "--weights", str(folder / "weights")]
    out = tmp_path / "out"
    options = ["--lengths", str(LENGTH), "--limit", "1", "--modes", "memory", "recent", "raw"]
    main([*arguments, *options, "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((out / "results.json").read_text())
    assert printed["cells"] == written["cells"]
    cells = {(cell["task"], cell["mode"]): cell for cell in written["cells"]}
    assert [*cells] == [(task, mode) for task in TASKS for mode in ("memory", "recent", "raw")]
    for task in TASKS:
        memory, recent, raw = (cells[task, mode] for mode in ("memory", "recent", "raw"))
        tokens = memory["prompt_tokens"]
        # fwe's prompts have up to the length, the others leave space for the answer
        assert LENGTH // 4 < tokens <= LENGTH + 1
        chunks = (tokens - 1) // CHUNK
        assert memory["slots"] == chunks * SLOTS
        assert memory["read_tokens"] == tokens - chunks * CHUNK
        assert recent["read_tokens"] == memory["read_tokens"] + memory["slots"]
        assert 0 <= memory["score"] <= 1 and len(memory["answers"]) == 1
        assert raw["score"] is None and not raw["answers"]
        assert f"past the base's {POSITIONS} positions (mode raw)" in raw["fault"]
        assert task in raw["fault"]
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "| task | length | prompt tokens | memory | recent | raw |"
    assert [line.split(" | ")[0][2:] for line in lines[2:8]] == [*TASKS]
    assert all(line.endswith("| does not fit |") for line in lines[2:8])
    assert sum(line.startswith("- ") for line in lines) == 6
    assert written["command"].startswith("uiollms ruler --env_conf ") and written["size"] == [64, 4]


def test_a_score_is_the_fraction_of_references_in_the_answer(lm, monkeypatch):
    """One answer has all references, one has half of them, one has none."""

    def answers(requests, disable_tqdm):
        references = [request.doc["outputs"] for request in requests]
        return [" ".join(references[0]), " ".join(references[1][::2]).upper(), "nothing"]

    monkeypatch.setattr(lm, "generate_until", answers)
    (cell,) = run_ruler(lm, ["ruler_cwe"], [LENGTH], ["memory"], limit=3)
    assert [answer["score"] for answer in cell.answers] == [1.0, 0.5, 0.0]
    assert cell.score == 0.5 and cell.interval_95[0] < 0.5 < cell.interval_95[1]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_the_first_of_lm_evals_and_depend_on_the_seed_alone(lm, folder, name):
    def prompts(seed: int) -> list[str]:
        task = load_task(name, LENGTH, lm.tokenizer, 2, seed)
        task.build_all_requests()
        return [request.args[0] for request in task.instances]

    found = prompts(3)
    assert prompts(4) != found == prompts(3)
    random.seed(3)
    np.random.seed(3)
    metadata = {"max_seq_lengths": [LENGTH], "tokenizer": str(folder / "base")}
    manager = TaskManager(include_path=str(ruler.FOLDER), include_defaults=False, metadata=metadata)
    task = manager.load([name])["tasks"][name]
    task.build_all_requests(limit=2)
    assert found == [request.args[0] for request in task.instances]


@pytest.mark.parametrize(
    "tasks, modes, message",
    [
        (["niah_single_2"], ["memory"], "task 'niah_single_2' is unknown; allowed are niah_single"),
        (["ruler_vt"], ["rag"], "mode 'rag' is unknown; allowed are memory"),
        (["ruler_fwe"], ["raw"], "no prompt fits: generate_until .* of task ruler_fwe"),
    ],
)
def test_what_cannot_run_is_refused(lm, tasks, modes, message):
    with pytest.raises(ConfigError, match=message):
        run_ruler(lm, tasks, [LENGTH], modes, limit=1)


def test_without_the_extra_the_command_prints_how_to_install_it(monkeypatch):
    monkeypatch.setattr("uiollms.cli.ruler.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run: pip install 'lm-eval\[ruler\]>=0.4.13,<0.5'"):
        main(["--env_conf", "missing.json"])
