"""Small random models of every family, and the folder of a tiny untrained model that the commands
can load."""

import json
import os
from pathlib import Path

# Idle threads do not spin, because the tests share the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from uiollms import MemoryConfig, MemoryLM

# The models are so small that more threads cost more than they gain.
torch.set_num_threads(1)

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=2,
    bos_token_id=1,
    pad_token_id=0,
)
FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "smollm2": lambda: LlamaConfig(
        **SHAPE | dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3),
        tie_word_embeddings=True,
    ),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=32),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only the files that have such tests are imported, because the others import
    what only `make setup` installs."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text() or None
    return None


MEMORY = MemoryConfig(num_memory=2, chunk_size=8, lora_rank=3, lora_alpha=6)


def make_base(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes):
    """Returns a small random base model. `changes` are attributes of its transformers config."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    base = AutoModelForCausalLM.from_config(config).to(dtype)
    # Biases start at 0 and norms at 1. Random values make errors in them visible.
    for name, parameter in base.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return base


def make_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    config: MemoryConfig = MEMORY,
) -> MemoryLM:
    """Returns a small random model whose LoRA weights and token embeddings are all non-zero."""
    model = MemoryLM(make_base(family, dtype, seed), config)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns token ids of the given shape, without the special tokens 0, 1 and 2."""
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: MemoryLM) -> dict[str, torch.Tensor]:
    """Returns the gradients by parameter name, with zeros where there is none, and clears them."""
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.trainable_parameters().items()
    }
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns ||found - expected|| / ||expected||, and ||found|| if `expected` is all zeros."""
    difference = (found.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    return difference / size if size else difference


def worst_error(found: dict, expected: dict) -> float:
    """Returns the largest relative error of the tensors of two dicts with the same keys."""
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in found)


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The local Hugging Face folder of a Llama with 3 layers and a tokenizer that makes one token
    of every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )
    config = LlamaConfig(**SHAPE | dict(vocab_size=len(vocab), max_position_embeddings=128))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def workspace(tmp_path, monkeypatch, tiny_folder) -> Path:
    """The working directory, with a config that trains the tiny model on a few text files in one
    or two seconds."""
    monkeypatch.chdir(tmp_path)
    text = "It was a bright cold day, and the clocks were striking. " * 8
    for i in range(4):
        (tmp_path / f"book{i}.txt").write_text(f"{i}: {text}")
    memory = dict(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4)
    (tmp_path / "memory.json").write_text(json.dumps(memory))
    task = dict(task_type="perplexity", task_name="files:book*.txt", num_instance=2, truncation=100)
    env = dict(
        model=dict(
            model_name=str(tiny_folder),
            model_dtype="fp32",
            model_structure="llama",
            config="memory.json",
            save_ckp="out/ckp",
            device_map="cpu",
        ),
        train=dict(
            tbptt=2,
            train_iters=3,
            max_lr=1e-2,
            warmup=0.3,
            save=2,
            eval=3,
            run_dir="out",
            corpus=[dict(name="files:book*.txt", partition=1, truncation=80)],
            tasks=[task | dict(compare=["window", "raw"])],
        ),
    )
    (tmp_path / "env.json").write_text(json.dumps(env))
    (tmp_path / "test.json").write_text(json.dumps(dict(tasks=[task])))
    return tmp_path


@pytest.fixture
def tiny(workspace):
    """The model of the workspace with random trained weights, and its tokenizer."""
    from server import tiny_model

    return tiny_model()


@pytest.fixture
def served(tiny):
    """A running server of `tiny` with one ready memory, `served.book`."""
    from server import running

    with running(*tiny, Path("memories")) as server:
        server.book = server.upload()["id"]
        yield server
