"""Bases that would score in silence on random, foreign or broken weights are refused by name, in
one line."""

import importlib
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_base, make_model, random_ids
from safetensors.torch import load_file, save_file
from test_commands import call
from transformers import AutoModelForCausalLM, AutoTokenizer

from uiollms import ConfigError, MemoryConfig, MemoryLM
from uiollms.build import load_memory_lm
from uiollms.cli.common import reporting_errors
from uiollms.config.load import load_env_config
from uiollms.evaluation.scoring import score
from uiollms.files.atomic import write_checksums
from uiollms.files.json_files import as_json
from uiollms.model.memory import Memory
from uiollms.weights.adapters import load_weights, save_weights
from uiollms.weights.base_models import load_causal_lm, load_pretrained
from uiollms.weights.fitness import not_finite

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture
def base(workspace, tiny_folder) -> Path:
    """The workspace's model, in a folder of its own that a test may damage."""
    shutil.copytree(tiny_folder, "base")
    env = json.loads(Path("env.json").read_text())
    env["model"]["model_name"] = "base"
    Path("env.json").write_text(json.dumps(env))
    return Path("base")


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def command_of(name: str, *arguments: str) -> int:
    """The exit code of a script, or of a module with a `main`."""
    if name.endswith(".py"):
        return call(name, *arguments)
    return reporting_errors(lambda: importlib.import_module(name).main(list(arguments)))


UNFILLED = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != DOWN}, f"1 tensor is missing: {DOWN}; save"),
    "no head": (lambda t: {k: v for k, v in t.items() if "lm_head" not in k}, "missing: lm_head.weight"),
    "prefix": (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "the model that config.json describes: _orig_mod."),
    "shape": (lambda t: t | {EMBEDDING: t[EMBEDDING][:9]}, f"{EMBEDDING} [9, 32] where the config has [259, 32]"),
    "bias": (lambda t: t | {BIAS: torch.ones(32)}, f"1 tensor is not of the model that config.json describes: {BIAS}"),
    "a layer more": (lambda t: t | {DOWN.replace("1", "3"): t[DOWN].clone()}, "describes: model.layers.3.mlp.down_proj"),
    "NaN": (lambda t: t | {DOWN: t[DOWN].fill_(torch.nan)}, f"{DOWN} holds NaN or infinite numbers"),
    "infinite": (lambda t: t | {DOWN: t[DOWN].index_fill(0, torch.tensor(3), torch.inf)}, f"{DOWN} holds NaN or"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFILLED)
def test_tensors_that_do_not_fill_the_model_are_named_by_every_command(base, capsys, case):
    save_weights(load_memory_lm(load_env_config("env.json"), "env.json")[0], "out/ckp")
    change, expected = UNFILLED[case]
    change_tensors(base, change)
    env = ("--env_conf", "env.json")
    commands = {
        "train.py": env,
        "test.py": env,
        "uiollms.cli.convert": (*env, "out/ckp", "out.pth"),
        "uiollms.__main__": ("compress", *env, "book0.txt", "-o", "x.mem"),
    }
    capsys.readouterr()
    for command, arguments in commands.items():
        assert command_of(command, *arguments) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert said.startswith("model.model_name: 'base': ") and expected in said, said
    assert not Path("x.mem").exists() and not Path("out.pth").exists()


@pytest.mark.parametrize("included", [True, False])
def test_from_pretrained_names_what_is_missing(base, included):
    memory = MemoryConfig(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4)
    MemoryLM(AutoModelForCausalLM.from_pretrained(base), memory).save_pretrained(
        "saved", include_base=included
    )
    MemoryLM.from_pretrained("saved")
    change_tensors(Path("saved/base") if included else base, UNFILLED["missing"][0])
    with pytest.raises(ConfigError, match=f"saved: its base .* 1 tensor is missing: {DOWN}"):
        MemoryLM.from_pretrained("saved")


@pytest.mark.parametrize("family", ["smollm2", "llama"])
def test_tied_and_left_over_tensors_are_right(tmp_path, family):
    """A head that is the embedding is not missing, a value head or a table of an older release
    in no one's way."""
    made = make_base(family, torch.float32)
    made.save_pretrained(tmp_path)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(
        tmp_path, lambda t: t | {"v_head.summary.weight": torch.ones(2), table: torch.ones(4)}
    )
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (family == "llama")
    loaded = load_causal_lm(str(tmp_path), dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), made.parameters(), strict=True)
    )


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))


def added(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["clocks", "bright"])
    tokenizer.save_pretrained(folder)


GPTQ = dict(quant_method="gptq", bits=4, group_size=128)
DAMAGED = {
    "lfs weights": (lambda d: (d / "model.safetensors").write_text(POINTER), "model.safetensors: only a git-lfs po"),
    "lfs tokenizer": (lambda d: (d / "tokenizer.json").write_text(POINTER), "tokenizer.json: only a git-lfs pointer"),
    "lfs config": (lambda d: (d / "config.json").write_text(POINTER), "config.json: only a git-lfs pointer; run"),
    "cut short": (cut, "the folder base cannot be loaded (SafetensorError: "),
    "no header": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64), "the folder base cannot be loaded ("),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "the folder base cannot be loaded ("),
    "pickled": (pickled, "the folder base cannot be loaded ("),
    "no config": (lambda d: (d / "config.json").unlink(), "the folder base cannot be loaded ("),
    "tokenizer {}": (lambda d: (d / "tokenizer.json").write_text("{}"), "the folder base cannot be loaded ("),
    "no tokenizer": (lambda d: [p.unlink() for p in d.glob("tokenizer*")], "base"),
    "half a tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "base"),
    "quantised": (lambda d: change_config(d, quantization_config=GPTQ), "quantised (gptq), which is not supported; name"),
    "heads 3": (lambda d: change_config(d, num_attention_heads=3), "base"),
    "heads 0": (lambda d: change_config(d, num_attention_heads=0), "num_attention_heads: Input should be greater"),
    "activation": (lambda d: change_config(d, hidden_act="x"), "the folder base cannot be loaded ("),
    "hidden size": (lambda d: change_config(d, hidden_size=48), " tensors are of another shape: lm_head.weight [259, 32] wh"),
    "vocabulary": (lambda d: change_config(d, vocab_size=300), "[259, 32] where the config has [300, 32]"),
    "adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "the folder is a PEFT adapter, not a whole model;"),
    "tokens added": (added, "its tokenizer has tokens up to id 260, the base has 259 embeddings (vocab_size); resize"),
    "no end": (lambda d: change_config(d, eos_token_id=None), "base: the base's config names no eos_token_id, from"),
    "no ends": (lambda d: change_config(d, eos_token_id=[]), "base: the base's config names no eos_token_id, from"),
    "end 5000": (lambda d: change_config(d, eos_token_id=5000), "base: eos_token_id 5000 is outside of the base's 259"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_foreign_folder_is_one_line(base, capsys, case):
    damage, expected = DAMAGED[case]
    damage(base)
    for command in ("train.py", "test.py"):
        assert call(command, "--env_conf", "env.json") == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert expected in said and "model.model_name: " in said, said
        assert "cannot be reached" not in said and "HF_TOKEN" not in said, (
            "a folder's fault is not the hub's"
        )


def test_a_window_narrower_than_a_chunk_is_refused_before_anything_is_loaded(
    workspace, tiny_folder, capsys, monkeypatch
):
    made = make_base("mistral", torch.float32, sliding_window=8, vocab_size=259)
    made.save_pretrained("narrow")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained("narrow")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    fields = (
        "--set=model.model_name=narrow",
        "--set=model.model_structure=mistral",
        "--set=train.chunk_batch=2",
    )
    fields += ("--set=train.corpus.0.truncation=40", "--set=train.tasks=[]")
    assert call("train.py", "--env_conf", "env.json", *fields) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    expected = (
        "env.json: model.model_name: narrow: the base attends to 8 tokens (sliding_window), fewer "
        "than chunk_size 16;"
    )
    assert said.startswith(expected)


def test_from_pretrained_says_why_a_base_cannot_carry_the_memory(tmp_path):
    make_model("llama", torch.float32).save_pretrained(tmp_path / "saved", include_base=True)
    change_config(tmp_path / "saved/base", eos_token_id=None)
    with pytest.raises(
        ConfigError,
        match="saved: its base does not support its memory: the base's config names no eos_token_id",
    ):
        MemoryLM.from_pretrained(tmp_path / "saved")


def test_ask_checks_the_tokenizer_of_a_saved_model(base, capsys):
    memory = MemoryConfig(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["clocks"])
    MemoryLM(AutoModelForCausalLM.from_pretrained(base), memory).save_pretrained(
        "saved", tokenizer=tokenizer
    )
    assert (
        command_of("uiollms.__main__", "compress", "--model", "saved", "book0.txt", "-o", "x.mem")
        == 2
    )
    assert (
        "its tokenizer has tokens up to id 259, the base has 259 embeddings"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("wrong", [61, -1])
def test_a_token_without_an_embedding_is_a_value_error(wrong):
    model = make_model()
    ids = random_ids(1, 20)
    ids[0, 11] = wrong
    tries = (
        lambda: model(ids),
        lambda: model.generate(ids, max_new_tokens=1),
        lambda: model.compress(ids[0]),
        lambda: score(model, ids),
        lambda: score(model, ids, mode="raw"),
    )
    for attempt in tries:
        with pytest.raises(
            ValueError, match=f"token id {wrong} has no embedding, the base's are 0 .. 60"
        ):
            attempt()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("./nowhere", "there is no such folder"),
        ("/a/b/c", "there is no such folder"),
        ("model.gguf", "that is a file, not a folder"),
        ("some/where", "cannot be reached from here"),
    ],
)
def test_what_is_no_folder_is_said(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError) as refusal:
        load_pretrained(AutoTokenizer, name)
    assert f"cannot get {name!r}: " in str(refusal.value) and reason in str(refusal.value)


def test_too_little_memory_is_not_called_damage(base, monkeypatch):
    def full(*arguments, **settings):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(ConfigError, match="there is too little memory to load it"):
        load_causal_lm("base", dtype=torch.float32)


# ---- numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ["folder", "weights.pth"])
def test_weights_that_are_no_numbers_are_neither_saved_nor_loaded(tmp_path, value, form):
    model = make_model("llama", torch.float32)
    path = tmp_path / form
    save_weights(model, path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} or path.read_bytes()
    name = "decoder.layers.0.k_proj.lora_A"
    with torch.no_grad():
        model.trainable_parameters()[name][1, 2] = value
    with pytest.raises(
        ConfigError, match=f"weights are not saved: {name} holds NaN or infinite numbers"
    ):
        save_weights(model, path)
    with pytest.raises(ConfigError, match=f"{name} holds NaN or infinite numbers"):
        model.save_pretrained(tmp_path / "whole", include_base=True)
    assert not (tmp_path / "whole").exists()
    assert (
        {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} or path.read_bytes()
    ) == before

    if form == "folder":
        file = path / "decoder/adapter_model.safetensors"
        tensors = load_file(file)
        tensors[next(n for n in tensors if "layers.0." in n and "k_proj.lora_A" in n)][1, 2] = value
        save_file(tensors, file, metadata={"format": "pt"})
        (path / "checksums.json").unlink()
    else:
        torch.save(list(model.memory_state_dict().values()), path)
    other = make_model("llama", torch.float32, seed=1)
    kept = {n: t.clone() for n, t in other.memory_state_dict().items()}
    with pytest.raises(ConfigError, match=f"{form}: {name} holds NaN or infinite numbers"):
        load_weights(other, path)
    assert all(torch.equal(t, kept[n]) for n, t in other.memory_state_dict().items()), (
        "nothing was copied"
    )


def test_weights_past_float16_are_not_written_in_it(tmp_path):
    model = make_model("llama", torch.float32)
    with torch.no_grad():
        model.trainable_parameters()["encoder.retrieval_token"][0, 0, 0] = 1e5
    save_weights(model, tmp_path / "fp32")
    with pytest.raises(
        ConfigError,
        match="encoder.retrieval_token holds NaN or infinite numbers in torch.float16",
    ):
        save_weights(model, tmp_path / "fp16", torch.float16)
    assert not (tmp_path / "fp16").exists()


def test_a_memory_that_is_no_number_is_neither_saved_nor_loaded(tmp_path):
    model = make_model("llama", torch.float32)
    memory = model.compress(random_ids(20))
    memory.save(tmp_path / "good.mem")
    broken = tmp_path / "broken.mem"
    memory.slots[1, 0, 0, 3] = torch.nan
    with pytest.raises(ConfigError, match="not saved: the memory holds NaN"):
        memory.save(broken)
    from safetensors import safe_open

    with safe_open(tmp_path / "good.mem", "pt") as file:
        header = file.metadata()
    save_file({"slots": memory.slots, "open_ids": memory.open_ids}, broken, metadata=header)
    with pytest.raises(ConfigError, match="broken.mem: the memory holds NaN"):
        Memory.load(broken)


def test_not_finite_looks_at_every_number():
    good = torch.arange(12.0).view(3, 4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert (
            not_finite([("a", good.to(dtype)), ("empty", good[:0]), ("ids", good.long())]) is None
        )
        for place in range(12):
            for value in (torch.nan, torch.inf, -torch.inf):
                bad = good.to(dtype).flatten().index_fill(0, torch.tensor(place), value).view(3, 4)
                assert not_finite([("a", good), ("b", bad), ("c", bad)]) == "b"


def no_constant(name: str) -> None:
    raise AssertionError(f"bare {name} is no JSON")


def test_a_loss_past_the_range_of_exp_is_reported_as_such(base, capsys, monkeypatch):
    """709.78 nats and more: a head 100,000 times too large is scored, not a traceback."""
    change_tensors(base, lambda t: t | {"lm_head.weight": 1e5 * t["lm_head.weight"]})
    monkeypatch.setenv("COLUMNS", "250")
    assert call("train.py", "--env_conf", "env.json", "--json") == 0
    for line in capsys.readouterr().out.splitlines():
        json.loads(line, parse_constant=no_constant)
    assert call("test.py", "--env_conf", "env.json") == 0
    said = capsys.readouterr().out
    written = json.loads(Path("out/test.json").read_text(), parse_constant=no_constant)
    memory = written["results"][0]["memory"]
    assert (
        memory["nll"] > 709.78
        and memory["perplexity"] is None
        and memory["interval_95"] == [None, None]
    )
    assert f"perplexity exp({memory['nll']:.2f})" in said
    for line in Path("out/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constant)
    assert command_of("uiollms.cli.report", "out", "--no_attention") == 0, (
        "the report reads null too"
    )


def test_json_has_null_for_what_is_no_number():
    value = {"a": math.nan, "b": [math.inf, 1.5, (-math.inf, "x")], "c": None}
    assert json.loads(as_json(value), parse_constant=no_constant) == {
        "a": None,
        "b": [None, 1.5, [None, "x"]],
        "c": None,
    }


def test_optimizer_moments_that_are_no_numbers_are_refused(workspace, capsys):
    assert call("train.py", "--env_conf", "env.json", "--set=train.tasks=[]") == 0
    checkpoint = Path("out/checkpoints/step-00000002")
    file = checkpoint / "optimizer.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("exp_avg_sq"))
    tensors[name].fill_(torch.nan)
    save_file(tensors, file)
    (checkpoint / "checksums.json").unlink()
    write_checksums(checkpoint)
    assert (
        call(
            "train.py",
            "--env_conf",
            "env.json",
            "--set=train.tasks=[]",
            "--resume",
            str(checkpoint),
        )
        == 2
    )
    assert f"optimizer.safetensors: {name} holds NaN or infinite numbers" in capsys.readouterr().err
