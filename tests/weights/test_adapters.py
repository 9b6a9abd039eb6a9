"""Weights on disk: round trips, PEFT's own reading of them, and files that do not fit."""

import json
import resource

import pytest
import torch
from conftest import MEMORY, make_base, make_model, random_ids, relative_error
from peft import PeftModel
from processes import run_forked

from uiollms import ConfigError, MemoryConfig, MemoryLM
from uiollms.weights.adapters import load_weights, save_weights


@pytest.mark.parametrize("name", ["folder", "list.pth"])
def test_round_trip(tmp_path, name, family):
    model = make_model(family, torch.float32)
    save_weights(model, tmp_path / name)
    save_weights(model, tmp_path / name)  # over itself
    other = MemoryLM(model.base, MEMORY)
    load_weights(other, tmp_path / name)
    expected = model.memory_state_dict()
    assert all(torch.equal(t, expected[k]) for k, t in other.memory_state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing temporary is left


def test_peft_loads_each_role_as_an_adapter_of_its_own(tmp_path):
    """PEFT's decoder adapter gives the keys and values that ours gives; its encoder adapter the
    same queries."""
    model = make_model("llama", torch.float32)
    save_weights(model, tmp_path / "ckp")
    x = torch.randn(1, 5, 32)
    for role, projection in (
        ("encoder", "q_proj"),
        ("decoder", "k_proj"),
        ("encoder", "v_proj"),
        ("decoder", "v_proj"),
    ):
        adapted = PeftModel.from_pretrained(
            make_base("llama", torch.float32), tmp_path / "ckp" / role
        )
        theirs = getattr(adapted.base_model.model.model.layers[1].self_attn, projection)(x)
        linear = getattr(model.base.model.layers[1].self_attn, projection)
        ours = linear(x) + getattr(model, role).layers[1][projection](x)
        assert relative_error(ours, theirs) < 1e-6  # float32


def test_smaller_dtype(tmp_path):
    model = make_model("llama", torch.float32)
    save_weights(model, tmp_path / "ckp", dtype=torch.bfloat16)
    other = MemoryLM(model.base, MEMORY)
    load_weights(other, tmp_path / "ckp")
    for name, tensor in other.memory_state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.memory_state_dict()[name].bfloat16().float())


def test_another_compressor_is_refused(tmp_path):
    save_weights(make_model(), tmp_path / "ckp")
    wider = make_model(config=MemoryConfig(**MEMORY.model_dump() | dict(num_memory=4)))
    with pytest.raises(
        ConfigError, match="trained with another compressor: num_memory 2, the config has 4"
    ):
        load_weights(wider, tmp_path / "ckp")
    load_weights(wider, tmp_path / "ckp", any_sizes=True)  # as where a training starts
    for name, tensor in wider.memory_state_dict().items():
        assert torch.equal(tensor, make_model().memory_state_dict()[name])
    higher = make_model(config=MEMORY.model_copy(update=dict(lora_rank=4)))
    with pytest.raises(ConfigError, match="lora_rank 3, the config has 4"):
        load_weights(higher, tmp_path / "ckp", any_sizes=True)


def test_another_base_is_refused(tmp_path):
    save_weights(make_model("smollm2"), tmp_path / "ckp")
    with pytest.raises(
        ConfigError,
        match=r"do not fit(.|\n)*retrieval_token: shape \[1, 1, 36\], expected \[1, 1, 32\]",
    ):
        load_weights(make_model("llama"), tmp_path / "ckp")


def test_missing_and_damaged_files_are_named(tmp_path):
    model = make_model("llama", torch.float32)
    with pytest.raises(ConfigError, match="nothing"):
        load_weights(model, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no checkpoint can be read here"):
        load_weights(model, tmp_path / "nothing.pth")
    save_weights(model, tmp_path / "ckp")
    adapter = tmp_path / "ckp" / "encoder" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="ckp: the checkpoint is damaged"):
        load_weights(model, tmp_path / "ckp")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ConfigError, match="text.pth: not a list of tensors"):
        load_weights(model, tmp_path / "text.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "dict.pth")
    with pytest.raises(ConfigError, match="expected a list of 26 tensors .*, found dict"):
        load_weights(model, tmp_path / "dict.pth")


def test_nothing_in_a_pth_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save([Trap()], tmp_path / "trap.pth")
    with pytest.raises(ConfigError, match="trap.pth: not a list of tensors"):
        load_weights(make_model(), tmp_path / "trap.pth")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["folder", "list.pth"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, name):
    model = make_model("llama", torch.float32)
    save_weights(model, tmp_path / name)
    before = {n: t.clone() for n, t in model.memory_state_dict().items()}
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.zero_()

    def save_with_room_for(size: int) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(ConfigError, match=f"{name}: cannot be written .*{name} is as it was"):
            save_weights(model, tmp_path / name)
        return 0

    for size in (0, 100, 1000, 4000):
        assert run_forked(lambda size=size: save_with_room_for(size)) == 0
        assert [p.name for p in tmp_path.iterdir()] == [name]
    load_weights(model, tmp_path / name)
    assert all(torch.equal(t, before[n]) for n, t in model.memory_state_dict().items())


def test_every_flipped_bit_is_noticed(tmp_path):
    model = make_model("llama", torch.float32)
    save_weights(model, tmp_path / "ckp")
    save_weights(model, tmp_path / "list.pth")
    for path in [
        p for p in (tmp_path / "ckp").rglob("*") if p.is_file() and p.name != "checksums.json"
    ]:
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 16]) + whole[-2:])
        with pytest.raises(
            ConfigError, match=rf"ckp: the checkpoint is damaged \(.*{path.name}: its sha256 is"
        ):
            load_weights(model, tmp_path / "ckp")
        path.write_bytes(whole)
    load_weights(model, tmp_path / "ckp")
    data = model.memory_state_dict()["encoder.retrieval_token"].numpy().tobytes()
    whole = (tmp_path / "list.pth").read_bytes()
    (tmp_path / "list.pth").write_bytes(whole.replace(data, data[:-1] + bytes([data[-1] ^ 1])))
    with pytest.raises(
        ConfigError,
        match=(
            "list.pth: not a list of tensors saved by torch .damaged: the checksum of "
            "archive/data/0 differs"
        ),
    ):
        load_weights(model, tmp_path / "list.pth")


def test_another_vocabulary_is_refused(tmp_path):
    model = make_model("llama", torch.float32)
    save_weights(model, tmp_path / "ckp")
    wider = MemoryLM(make_base("llama", torch.float32, vocab_size=70), MEMORY)
    with pytest.raises(
        ConfigError, match="ckp: trained with a vocabulary of 61 tokens, the model has 70"
    ):
        load_weights(wider, tmp_path / "ckp")


def test_weights_take_the_place_of_nothing_else(tmp_path):
    model = make_model("llama", torch.float32)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "book.txt").write_text("a year of work")
    with pytest.raises(
        ConfigError,
        match=r"data: weights would replace it, but it contains other files \(book.txt\)",
    ):
        save_weights(model, tmp_path / "data")
    with pytest.raises(
        ConfigError, match="book.txt: weights would replace it, but it is not a folder"
    ):
        save_weights(model, tmp_path / "data" / "book.txt")
    assert (tmp_path / "data" / "book.txt").read_text() == "a year of work"


def test_weights_make_the_same_model(tmp_path):
    model = make_model()
    save_weights(model, tmp_path / "ckp")
    other = MemoryLM(model.base, MEMORY)
    load_weights(other, tmp_path / "ckp")
    ids = random_ids(1, 20)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert json.loads((tmp_path / "ckp" / "memory_config.json").read_text())["chunk_size"] == 8


def test_convert_there_and_back(workspace):
    from uiollms.build import load_memory_lm
    from uiollms.cli.convert import main
    from uiollms.config.load import load_env_config

    model, _ = load_memory_lm(load_env_config("env.json"), "env.json")
    save_weights(model, "a")
    main(["--env_conf", "env.json", "a", "b.pth"])
    main(["--env_conf", "env.json", "b.pth", "c", "--dtype", "bf16"])
    other, _ = load_memory_lm(load_env_config("env.json", ["train.seed=9"]), "env.json")
    load_weights(other, "c")
    expected = {n: t.bfloat16().float() for n, t in model.memory_state_dict().items()}
    assert all(torch.equal(t, expected[n]) for n, t in other.memory_state_dict().items())
