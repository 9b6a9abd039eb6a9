"""Makes the workspace of the attacks, a folder in which every command runs within a second. It
contains a tiny model, texts, a run, weights and a memory."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from uiollms.cli.common import reporting_errors

ROOT = Path(__file__).parent.parent
TRAIN = ["train.py", "--env_conf", "env.json"]
TEST = ["test.py", "--env_conf", "env.json"]
ASK = ["uiollms.__main__", "ask", "book.mem", "Who?", "--env_conf", "env.json"]
ASK += ["--max_new_tokens", "3"]
COMPRESS = ["uiollms.__main__", "compress", "book0.txt", "-o", "book.mem", "--env_conf", "env.json"]
DATA = ["uiollms.cli.data", "--check"]
TEXT = "It was a bright cold day, and the clocks were striking. "
# The program writes these. Everything else in the folder belongs to the user.
WRITTEN = ("out", "cache", "book.mem", "copy")


def call(command: str, *arguments: str) -> int:
    """Runs a command in this process as a user starts it. Returns its exit code."""
    if command.endswith(".py"):
        return reporting_errors(lambda: import_file(command).main(list(arguments)))
    return reporting_errors(lambda: importlib.import_module(command).main(list(arguments)))


def import_file(command: str) -> ModuleType:
    """Imports a program of the repository, which is not a module of the package."""
    spec = importlib.util.spec_from_file_location(f"command_{Path(command).stem}", ROOT / command)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_workspace(folder: Path) -> None:
    """Makes the files and runs a training, an evaluation and a compression on them. It changes the
    working directory, so it is called in a separate process."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    make_base(Path("base"))
    for i in range(3):
        Path(f"book{i}.txt").write_text(f"{i}: {TEXT * 6}", encoding="utf-8")
    rows = [{"text": f"{i}: {TEXT * 4}"} for i in range(3)]
    rows.append({"input": TEXT * 4, "output": "What?"})
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    Path("lines.jsonl").write_bytes(lines)
    Path("packed.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    table = pyarrow.table({"text": [row["text"] for row in rows[:3]]})
    pyarrow.parquet.write_table(table, "rows.parquet")
    Path("raw_data").mkdir()
    copies = [{"prompt": TEXT * 4, "response": TEXT * 4}] * 2
    write("raw_data/minipile_copy_256.json", {"train": copies, "test": copies})
    memory = dict(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4, lora_dropout=0.0)
    write("memory.json", memory)
    write("env.json", env_config())
    task = dict(task_type="perplexity", task_name="files:book*.txt", num_instance=2, truncation=60)
    write("test.json", {"tasks": [task | {"compare": ["window"]}]})
    for command in (TRAIN, TEST, COMPRESS):
        assert call(*command, "--quiet") == 0, command


def env_config() -> dict[str, Any]:
    task = dict(
        task_type="language modeling", task_name="files:book*.txt", num_instance=1, truncation=40
    )
    model = dict(
        model_name="base", model_dtype="fp32", model_structure="llama", config="memory.json"
    )
    train = dict(
        tbptt=2, train_iters=2, max_lr=1e-2, warmup=0.3, weight_decay=0.1, beta1=0.9, beta2=0.95
    )
    train |= dict(accum_grad=1, clip_grad=1.0, save=1, eval=2, seed=0, chunk_batch=4, keep_last=2)
    return dict(
        model=model | dict(device_map="cpu", load_ckp=None, released_ckp=None, save_ckp="out/ckp"),
        train=train
        | dict(
            corpus=[dict(name="files:book*.txt", partition=1, truncation=60, crop="start")],
            tasks=[task | dict(compare=[], protocols=["paper"])],
            run_dir="out",
        ),
        test="test.json",
    )


def write(path: str, value: Any) -> None:
    Path(path).write_text(json.dumps(value, indent=1), encoding="utf-8")


def make_base(folder: Path) -> None:
    """Saves a Llama of 2 layers with a tokenizer that makes one token of every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = dict(eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def contents(folder: Path) -> dict[str, Any]:
    """Returns the contents of every path in a folder that belongs to the user: the bytes of files
    and the targets of links."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in WRITTEN:
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes() if path.stat().st_size < 2**30 else path.stat().st_size
        else:
            found[name] = path.stat().st_mode
    return found
