"""Small random models of every family, and a tiny trained-nowhere model folder that the commands
can load."""

import json
import os
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # idle threads do not spin: tests share the machine
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

torch.set_num_threads(1)  # the models are tiny: more threads cost more than they bring

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
MEMORY = MemoryConfig(num_memory=2, chunk_size=8, lora_rank=3, lora_alpha=6)


def make_base(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes):
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    base = AutoModelForCausalLM.from_config(config).to(dtype)
    for (
        name,
        parameter,
    ) in base.named_parameters():  # biases and norms start at 0 and 1: make them count
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return base


def make_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    config: MemoryConfig = MEMORY,
) -> MemoryLM:
    """A small random model whose LoRA and tokens are all non-zero."""
    model = MemoryLM(make_base(family, dtype, seed), config)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: MemoryLM) -> dict[str, torch.Tensor]:
    """Gradients by name, zeros where there is none; and clears them."""
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.trainable_parameters().items()
    }
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; 0 where both vanish."""
    difference, size = (
        (found.double() - expected.double()).norm().item(),
        expected.double().norm().item(),
    )
    return difference / size if size else difference


def worst_error(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in found)


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Llama of 3 layers with a one-byte-one-token tokenizer, as a local Hugging Face folder."""
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
    """A working directory with a config that trains the tiny model on a few text files in a
    second or two."""
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
