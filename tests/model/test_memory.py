"""Compressed documents: they are saved, loaded, joined, read by streams, and checked."""

import copy
import json
import os

import pytest
import torch
from conftest import MEMORY, make_base, make_model, random_ids, relative_error
from safetensors import safe_open
from safetensors.torch import save as save_bytes
from transformers import AutoModelForCausalLM

import uiollms.model.fingerprint as fingerprint_module
from uiollms import ConfigError, Memory, MemoryLM
from uiollms.distributed.device_map import place_modules
from uiollms.model.fingerprint import fingerprint
from uiollms.model.memory import join
from uiollms.model.memory_file import checksum
from uiollms.model.state import join_slots

ROUNDING = 1e-12  # a few thousand operations in float64


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 16, 61])
def test_the_state_of_a_memory_equals_that_of_a_stream(family, length):
    model = make_model(family)
    text, question = random_ids(length), random_ids(1, 12, seed=1)
    memory = model.compress(text, source="a book")
    state = memory.state(model)
    expected = model(text[None]).past_key_values
    assert (
        (state.num_tokens, state.num_slots)
        == (expected.num_tokens, expected.num_slots)
        == (length, length // 8 * 2)
    )
    assert memory.num_slots == state.num_slots and memory.num_tokens == length
    assert (
        relative_error(model(question, state).logits, model(question, expected).logits) < ROUNDING
    )


@torch.no_grad()
def test_joined_memories_are_all_full_chunks_and_then_the_remaining_tokens(model):
    """Compares them with a state made step by step: every full chunk is encoded and projected to its
    positions, and then the remaining tokens are streamed."""
    texts = [
        random_ids(length, seed=length) for length in (19, 3, 30)
    ]  # 2 chunks + 3, 0 + 3, 3 + 6 tokens
    joined = join([model.compress(text, source=f"{len(text)}") for text in texts])
    assert [(s.name, s.num_tokens) for s in joined.sources] == [("19", 19), ("3", 3), ("30", 30)]
    state = model.new_state()
    chunks = [chunk for text in texts for chunk in text.split(8) if len(chunk) == 8]
    for number, chunk in enumerate(chunks):
        keys, values = model.project(model.encode_layers(chunk[None]), [number])
        state.memory_keys = [
            torch.cat([a, join_slots(b, 1)], 2)
            for a, b in zip(state.memory_keys, keys, strict=True)
        ]
        state.memory_values = [
            torch.cat([a, join_slots(b, 1)], 2)
            for a, b in zip(state.memory_values, values, strict=True)
        ]
        state.num_tokens += 8
    rest = torch.cat(
        [text[len(text) // 8 * 8 :] for text in texts]
    )  # 12 tokens, which are a full chunk and 4 more
    expected = model(rest[None], state).past_key_values
    found = joined.state(model)
    assert (
        found.num_tokens == expected.num_tokens == 52
        and found.num_slots == expected.num_slots == 12
    )
    question = random_ids(1, 9, seed=99)
    assert (
        relative_error(model(question, found).logits, model(question, expected).logits) < ROUNDING
    )
    # Documents of full chunks equal the concatenated text.
    whole = [random_ids(16, seed=5), random_ids(8, seed=6)]
    together = join([model.compress(text) for text in whole]).state(model)
    one = model(torch.cat(whole)[None]).past_key_values
    assert relative_error(model(question, together).logits, model(question, one).logits) < ROUNDING


@pytest.mark.parametrize("length", [3, 16, 30])
def test_a_loaded_memory_equals_the_saved_one_to_the_bit(model, tmp_path, length):
    memory = model.compress(random_ids(length), source="ein Büchlein")
    memory.save(tmp_path / "new" / "book.mem")
    loaded = Memory.load(tmp_path / "new" / "book.mem", model)
    assert torch.equal(loaded.slots, memory.slots) and loaded.slots.dtype == torch.float64
    assert torch.equal(loaded.open_ids, memory.open_ids)
    assert (loaded.sources, loaded.made_by) == (memory.sources, memory.made_by)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["book.mem"]


def test_generation_does_not_change_a_memory(model):
    memory = model.compress(random_ids(30))
    before = memory.slots.clone()
    question, options = (
        random_ids(1, 4, seed=8),
        dict(do_sample=False, max_new_tokens=12, eos_token_id=None),
    )
    state = memory.state(model)
    first = model.generate(question, state=state, **options)
    model.generate(random_ids(1, 7, seed=9), state=state, **options)
    assert torch.equal(model.generate(question, state=state, **options), first)
    assert torch.equal(model.generate(question, state=memory.state(model), **options), first)
    assert torch.equal(memory.slots, before)


def test_the_memory_of_another_model_raises_an_error(model, tmp_path):
    memory = model.compress(random_ids(20))
    memory.save(tmp_path / "a.mem")
    adapted = copy.deepcopy(model)
    with torch.no_grad():
        adapted.trainable_parameters()["decoder.layers.1.k_proj.lora_B"][0, 0] += 1e-3
    other_base = make_model(seed=1)
    other_base.load_memory_state_dict(model.memory_state_dict())
    wider = make_model(config=MEMORY.model_copy(update=dict(num_memory=4)))
    for other, field in ((adapted, "adapter"), (other_base, "base_weights"), (wider, "compressor")):
        with pytest.raises(ConfigError, match=f"a.mem: made by another model: .*{field}"):
            Memory.load(tmp_path / "a.mem", other)
        with pytest.raises(ConfigError, match="made by another model"):
            memory.state(other)
        with pytest.raises(ConfigError, match="different models and cannot be joined"):
            join([memory, other.compress(random_ids(8))])
    with pytest.raises(ConfigError, match="made by another model: adapter"):
        memory.state(adapted)  # nothing else differs


def test_a_model_in_another_dtype_can_read_the_memory(model):
    memory = model.compress(random_ids(20))
    single = MemoryLM(copy.deepcopy(model.base).float(), MEMORY)
    single.load_memory_state_dict(model.memory_state_dict())
    assert memory.state(single).memory_keys[0].dtype == torch.float32
    assert single.compress(random_ids(20)).state(model).memory_keys[0].dtype == torch.float64


def test_longer_documents_than_the_capacity_raise_an_error(model):
    with pytest.raises(ValueError, match="239 tokens, the capacity is 238"):
        model.compress(random_ids(239))
    # 29 memories and 6 tokens use all 64 positions.
    whole = model.compress(random_ids(238)).state(model)
    assert (whole.num_tokens, whole.num_slots, whole.open_ids.shape) == (238, 58, (1, 6))
    half = model.compress(random_ids(120))
    with pytest.raises(ValueError, match="240 tokens, the capacity is 238"):
        join([half, half]).state(model)


def test_loading_other_files_raises_an_error(model, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text.mem").write_text("a book")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.mem")
    for name, message in (
        ("none.mem", "cannot be read"),
        ("text.mem", "not a memory"),
        ("other.mem", "not a memory made by"),
    ):
        with pytest.raises(ConfigError, match=f"{name}: .*{message}"):
            Memory.load(tmp_path / name)


def test_compress_takes_one_document_of_text_or_ids(model):
    with pytest.raises(ValueError, match="a text needs its tokenizer"):
        model.compress("It was a bright cold day")
    with pytest.raises(ValueError, match="one document"):
        model.compress(random_ids(2, 9))
    ids = random_ids(9)
    for same in (ids[None], ids.tolist()):
        assert torch.equal(model.compress(same).slots, model.compress(ids).slots)


# ---- fingerprints --------------------------------------------------------------------------------


def with_changed_base(model: MemoryLM, name: str) -> MemoryLM:
    """Returns a copy in which the largest number of one tensor of the base is 1 % larger."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.base.get_parameter(name)
        weight.view(-1)[weight.abs().argmax()] *= 1.01
    return other


def test_a_change_of_any_tensor_changes_the_fingerprint(model, tmp_path):
    memory = model.compress(random_ids(20))
    memory.save(tmp_path / "a.mem")
    names = [name for name, _ in model.base.named_parameters()]
    assert len(names) == 3 * 9 + 3
    for name in names:
        with pytest.raises(ConfigError, match="a.mem: made by another model: base_weights "):
            Memory.load(tmp_path / "a.mem", with_changed_base(model, name))
    for name in model.trainable_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.trainable_parameters()[name].view(-1)[-1] += 0.1
        with pytest.raises(ConfigError, match="made by another model: adapter "):
            memory.state(other)


def test_exchanging_two_tensors_changes_the_fingerprint(model):
    other = copy.deepcopy(model)
    first, second = (
        other.base.get_parameter(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)
    )
    with torch.no_grad():
        copied = first.clone()
        first.copy_(second)
        second.copy_(copied)
    assert fingerprint(other).base_weights != fingerprint(model).base_weights


@pytest.mark.parametrize(
    "field, value",
    [
        ("rms_norm_eps", 1e-3),
        ("rope_parameters", dict(rope_type="default", rope_theta=500.0)),
        ("hidden_act", "gelu"),
    ],
)
def test_a_change_of_the_bases_config_changes_the_fingerprint(field, value):
    model, other = make_model(), MemoryLM(make_base(**{field: value}), MEMORY)
    other.load_memory_state_dict(model.memory_state_dict())
    with pytest.raises(ConfigError, match="made by another model: base_config [0-9a-f]{16}, this"):
        model.compress(random_ids(20)).state(other)


def in_bfloat16(family: str) -> MemoryLM:
    """Returns a model whose numbers can all be represented in bfloat16, as in published
    checkpoints."""
    model = make_model(family, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        model.base.model.layers[1].mlp.up_proj.weight[0, :3] = torch.tensor([1e-7, -3e-6, 1e-30])
    return model


def test_a_checkpoint_has_the_same_fingerprint_in_every_dtype(family, tmp_path):
    model = in_bfloat16(family)
    expected = fingerprint(model)
    model.base.save_pretrained(tmp_path / "base")
    # A float64 base gets float64 norms.
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for tied in (False, True)[: 1 + (family == "smollm2")]:
            base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
            if tied:  # an untied copy with the same numbers
                base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
            other = MemoryLM(base, MEMORY)
            other.load_memory_state_dict(model.memory_state_dict())
            found = fingerprint(other)
            assert found.model_copy(update=dict(base=expected.base)) == expected, dtype
    assert fingerprint(MemoryLM(base, MEMORY)).adapter != expected.adapter


def test_the_name_of_the_base_may_differ(model):
    memory = model.compress(random_ids(20))
    other = copy.deepcopy(model)
    other.base.config._name_or_path = "/elsewhere/renamed"
    assert memory.state(other).num_tokens == 20


def test_an_offloaded_base_has_the_same_fingerprint(tmp_path):
    model = in_bfloat16("smollm2")
    expected = fingerprint(model)
    base = copy.deepcopy(model.base)
    place_modules(
        base, {"": "cpu", "model.layers.1": "disk", "model.embed_tokens": "disk"}, "here", tmp_path
    )
    assert base.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    other = MemoryLM(base, MEMORY)
    other.load_memory_state_dict(model.memory_state_dict())
    assert fingerprint(other) == expected
    assert model.compress(random_ids(20)).state(other).num_tokens == 20


def test_the_base_is_hashed_again_only_after_a_change(monkeypatch):
    model = make_model()
    hashed = []
    original = fingerprint_module.hash_tensor
    monkeypatch.setattr(
        fingerprint_module, "hash_tensor", lambda t: hashed.append(t.shape) or original(t)
    )
    trained = len(model.trainable_parameters())
    memory = model.compress(random_ids(20))
    assert len(hashed) > 30
    hashed.clear()
    memory.state(model)
    assert len(hashed) == trained
    # every way in which trained tensors change
    before = model.memory_state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    model.load_memory_state_dict({name: 2 * tensor for name, tensor in before.items()})
    with pytest.raises(ConfigError, match="made by another model: adapter"):
        memory.state(model)
    model.load_memory_state_dict(before)
    memory.state(model)
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=0.1)
    for parameter in model.trainable_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(ConfigError, match="made by another model: adapter"):
        memory.state(model)
    model.load_memory_state_dict(before)
    for parameter in model.trainable_parameters().values():
        parameter.data.add_(0.1)  # this does not change the version of the tensor
    with pytest.raises(ConfigError, match="made by another model: adapter"):
        memory.state(model)
    model.load_memory_state_dict(before)
    # a change of the base
    hashed.clear()
    with torch.no_grad():
        model.base.lm_head.weight[0, 0] += 1
    with pytest.raises(ConfigError, match="made by another model: base_weights"):
        memory.state(model)
    assert len(hashed) == 30 + trained


def test_a_base_loaded_in_inference_mode_has_a_fingerprint():
    with torch.inference_mode():
        model = make_model()
        memory = model.compress(random_ids(20))
        model.base.model.norm.weight[0] += 1
        with pytest.raises(ConfigError, match="base_weights"):
            memory.state(model)


# ---- files ---------------------------------------------------------------------------------------


def test_any_flipped_bit_raises_an_error(model, tmp_path):
    """Every bit of the header is flipped, and one bit in each byte of the tensors. Then the file is
    cut at several lengths."""
    path = tmp_path / "a.mem"
    model.compress(random_ids(20), source="a book").save(path)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    assert 600 < end < len(whole)
    for i in range(len(whole)):
        for bit in range(8) if i < end else (i % 8,):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :])
            with pytest.raises(ConfigError, match="^[^\n]*a.mem: [^\n]*$"):
                Memory.load(path)
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match="^[^\n]*a.mem: [^\n]*$"):
            Memory.load(path)
    path.write_bytes(whole)
    assert Memory.load(path, model).num_tokens == 20


def write_file(path, tensors: dict, header: dict) -> None:
    """Writes a file with a right checksum, whatever its tensors and header are."""
    text = json.dumps(header | dict(sha256="0" * 64), separators=(",", ":"))
    data = save_bytes(tensors, metadata=dict(uiollms=text))
    end = 8 + int.from_bytes(data[:8], "little")
    assert checksum(data[:end], [data[end:]])
    path.write_bytes(data.replace(b"0" * 64, checksum(data[:end], [data[end:]]).encode(), 1))


def with_field(value: dict, path: str, new: object) -> dict:
    """Returns a copy of a JSON object in which the field at a dotted path is `new`."""
    value = json.loads(json.dumps(value))
    *parents, last = path.split(".")
    inner = value
    for part in parents:
        inner = inner[int(part) if isinstance(inner, list) else part]
    inner[int(last) if isinstance(inner, list) else last] = new
    return value


INVALID_FIELDS = {
    "format": ["uiollms memory 3", 2, None],
    "made_by": ["me", {}],
    "made_by.base": [7, None],
    "made_by.base_weights": ["", "x" * 16, 5],
    "made_by.adapter": ["ABCDEF0123456789"],
    "made_by.base_config": ["0" * 15],
    "made_by.covers": ["none"],
    "made_by.more": [1],
    "made_by.compressor.chunk_size": [16, 7, -8, 8.0],
    "made_by.compressor.num_memory": [4, 0],
    "sources": [[], {}, "a book"],
    "sources.0": [{}, ["a book", 20]],
    "sources.0.name": [None, 3, ["a book"]],
    "sources.0.num_tokens": [-1, 21, 19, 28, True, 1.5, 2**70, "20"],
    "more": [1],
}


@pytest.mark.parametrize("field", INVALID_FIELDS)
def test_every_field_of_the_header_is_checked(model, tmp_path, field):
    model.compress(random_ids(20), source="a book").save(tmp_path / "good.mem")
    with safe_open(tmp_path / "good.mem", "pt") as file:
        header = json.loads(file.metadata()["uiollms"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    write_file(tmp_path / "again.mem", tensors, header)
    assert Memory.load(tmp_path / "again.mem", model).num_tokens == 20
    for value in INVALID_FIELDS[field]:
        write_file(tmp_path / "bad.mem", tensors, with_field(header, field, value))
        with pytest.raises(ConfigError, match="bad.mem: ") as error:
            Memory.load(tmp_path / "bad.mem", model)
        assert "damaged" not in str(error.value), value


def test_every_tensor_is_checked(model, tmp_path):
    memory = model.compress(random_ids(20), source="a book")  # 2 chunks of 8, and 4 tokens
    memory.save(tmp_path / "good.mem")
    with safe_open(tmp_path / "good.mem", "pt") as file:
        header = json.loads(file.metadata()["uiollms"])
    tensors = dict(slots=memory.slots, open_ids=memory.open_ids, chunk_ids=memory.chunk_ids)
    assert memory.slots.shape == (3, 2, 2, 32)
    invalid = {
        "slots": [
            memory.slots.long(),
            memory.slots.to(torch.float8_e4m3fn),
            memory.slots[0],
            memory.slots[:2],
            memory.slots[:, :1],
            memory.slots[:, :, :1],
            memory.slots[..., :31],
            memory.slots[:0],
            memory.slots / 0,
        ],
        "open_ids": [
            memory.open_ids.int(),
            memory.open_ids[None],
            memory.open_ids[:3],
            memory.open_ids * 0 - 1,
            memory.open_ids * 0 + 61,
            memory.open_ids.double(),
        ],
        "chunk_ids": [
            memory.chunk_ids.int(),
            memory.chunk_ids.flatten(),
            memory.chunk_ids[:1],
            memory.chunk_ids * 0 - 1,
            memory.chunk_ids * 0 + 61,
        ],
        "more": [torch.zeros(1)],
    }
    for name, values in invalid.items():
        for tensor in values:
            write_file(tmp_path / "bad.mem", tensors | {name: tensor.contiguous()}, header)
            with pytest.raises(ConfigError, match="^[^\n]*bad.mem: [^\n]*$"):
                Memory.load(tmp_path / "bad.mem", model)
    for name in ("slots", "open_ids"):
        write_file(tmp_path / "bad.mem", {k: v for k, v in tensors.items() if k != name}, header)
        with pytest.raises(ConfigError, match="bad.mem: a safetensors file, but not a memory"):
            Memory.load(tmp_path / "bad.mem", model)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"1234567",
        b"\xff" * 8,
        b"\x02" + b"\0" * 7 + b"[]",
        b"\x06" + b"\0" * 7 + b'{"a":1',
        b"\xff\xff\x00" + b"\0" * 5,
    ],
)
def test_a_file_without_a_safetensors_header_is_an_error_of_one_line(tmp_path, header):
    (tmp_path / "a.mem").write_bytes(header)
    with pytest.raises(ConfigError, match="a.mem: not a memory, or damaged"):
        Memory.load(tmp_path / "a.mem")


def test_nested_headers_pipes_and_folders_are_errors_of_one_line(model, tmp_path):
    for nested in (
        "[" * 900 + "]" * 900,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 900 + "1" + "}" * 900,
    ):
        data = save_bytes({"slots": torch.zeros(1)}, metadata=dict(uiollms=nested))
        (tmp_path / "a.mem").write_bytes(data)
        with pytest.raises(ConfigError, match="a.mem: "):
            Memory.load(tmp_path / "a.mem")
    os.mkfifo(tmp_path / "pipe.mem")
    for name in ("pipe.mem", "."):
        with pytest.raises(ConfigError, match="cannot be read|is a named pipe"):
            Memory.load(tmp_path / name)


NAMES = [
    "\x1b[2J\x1b[31mgone",
    "a\nb",
    "\x9b31m",
    "[bold]x[/]",
    "\u202etxt.exe",
    "x" * 5000,
    "\udcff.txt",
]
NAMES += ["0" * 64, '"sha256":"' + "0" * 64]


@pytest.mark.parametrize("name", NAMES)
def test_any_source_name_can_be_saved_and_is_displayed_safely(model, tmp_path, name):
    memory = model.compress(random_ids(20), source=name)
    memory.save(tmp_path / "a.mem")
    (source,) = Memory.load(tmp_path / "a.mem", model).sources
    assert source.name == name.replace("\udcff", "\\udcff")
    assert source.display_name.isprintable() and len(source.display_name) < 300
    other = make_model(seed=1).compress(random_ids(20), source=name)
    with pytest.raises(ConfigError, match="cannot be joined") as error:
        join([memory, other])
    assert str(error.value).isprintable() and len(str(error.value)) < 800


# ---- the text ------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_text_of_a_state_is_in_the_order_of_the_stream(model, tmp_path):
    texts = [random_ids(length, seed=length) for length in (19, 3, 30)]
    joined = join([model.compress(text) for text in texts])
    joined.save(tmp_path / "a.mem")
    state = Memory.load(tmp_path / "a.mem", model).state(model)
    full = [text[: len(text) // 8 * 8] for text in texts]
    remaining = [text[len(text) // 8 * 8 :] for text in texts]
    assert torch.equal(state.text[0], torch.cat(full + remaining))
