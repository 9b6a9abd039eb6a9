"""PEFT finds the base of a saved model by the name in adapter_config.json, in processes that do not
import this package, from a hub's cache on the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_ids, relative_error
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from uiollms import MemoryConfig, MemoryLM
from uiollms.model.roles import PROJECTIONS
from uiollms.weights.adapters import ROLES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MEMORY = MemoryConfig(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=6)
FLOAT32 = 1e-6  # PEFT computes LoRA and stores a prefix in float32

PLAIN = """
import sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
assert not any(name.split(".")[0] == "uiollms" for name in sys.modules)
"""


@pytest.fixture
def cache(tmp_path, tiny_folder) -> Path:
    """A hub's cache with the base someone/base, as huggingface_hub lays it out."""
    repository = tmp_path / "home" / "hub" / "models--someone--base"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(tiny_folder.iterdir())):
        blob = repository / "blobs" / f"{number:040}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return tmp_path / "home"


def run_plain(cache: Path, folder: Path, ids: torch.Tensor, cwd: Path) -> torch.Tensor:
    torch.save(ids, cwd / "ids")
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", PLAIN, str(folder), str(cwd / "ids"), str(cwd / "logits")]
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(cwd / "logits")


def make_saved_model(base_path: Path, folder: Path) -> MemoryLM:
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float64)
    torch.manual_seed(0)
    model = MemoryLM(base, MEMORY)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def merged_logits(model: MemoryLM, folder: Path, role: str, ids: torch.Tensor) -> torch.Tensor:
    """The slow twin, in float64: the base with W + alpha / rank * B A."""
    adapter = load_file(folder / role / "adapter_model.safetensors")
    for number, layer in enumerate(model.base.model.layers):
        for name in PROJECTIONS[role]:
            key = f"base_model.model.model.layers.{number}.self_attn.{name}.lora_"
            a, b = (adapter[f"{key}{half}.weight"].double() for half in "AB")
            weight = getattr(layer.self_attn, name).weight
            weight += MEMORY.lora_alpha / MEMORY.lora_rank * b @ a
    return model.base(ids).logits


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("source", ["hub", "local"])
def test_the_adapter_alone_is_the_base_with_lora_for_all_tokens(
    cache, tmp_path, tiny_folder, role, source
):
    snapshot = cache / "hub" / "models--someone--base" / "snapshots" / COMMIT
    base, cwd = (snapshot, tmp_path) if source == "hub" else (tiny_folder, tiny_folder.parent)
    model = make_saved_model(base, tmp_path / "model")
    fields = json.loads((tmp_path / "model" / role / "adapter_config.json").read_text())
    expected_name = "someone/base" if source == "hub" else "tiny"
    assert fields["base_model_name_or_path"] == expected_name
    ids = random_ids(1, 40)
    found = run_plain(cache, tmp_path / "model" / role, ids, cwd)
    expected = merged_logits(model, tmp_path / "model", role, ids)
    assert relative_error(found, expected) < FLOAT32


@torch.no_grad()
def test_a_compressed_document_finds_the_base(cache, tmp_path):
    snapshot = cache / "hub" / "models--someone--base" / "snapshots" / COMMIT
    model = make_saved_model(snapshot, tmp_path / "model")
    memory = model.compress(random_ids(37), source="a book")
    memory.to_peft(tmp_path / "book", model)
    question = random_ids(1, 16 - 37 % 16, seed=1)  # until the open chunk is full
    fed = torch.tensor(
        [json.loads((tmp_path / "book" / "fed_first.json").read_text())["input_ids"]]
    )
    found = run_plain(cache, tmp_path / "book", torch.cat([fed, question], dim=1), tmp_path)
    expected = model(question, memory.state(model)).logits
    assert relative_error(found[:, fed.shape[1] :], expected) < FLOAT32
