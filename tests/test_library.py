"""Documents compressed once: kept, joined, asked again, refused by other models."""

import copy

import pytest
import torch
from conftest import MEMORY, make_model, random_ids, relative_error

from uiollms import ConfigError, Memory, MemoryLM
from uiollms.library import join
from uiollms.memory import join_slots

ROUNDING = 1e-12  # float64, a few thousand operations


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 16, 61])
def test_a_memory_answers_as_the_stream_that_read_the_text(family, length):
    model = make_model(family)
    text, question = random_ids(length), random_ids(1, 12, seed=1)
    memory = model.compress(text, source="a book")
    state = memory.state(model)
    expected = model(text[None]).past_key_values
    assert (state.num_tokens, state.num_slots) == (expected.num_tokens, expected.num_slots) == (length, length // 8 * 2)
    assert memory.num_slots == state.num_slots and memory.num_tokens == length
    assert relative_error(model(question, state).logits, model(question, expected).logits) < ROUNDING


@torch.no_grad()
def test_joined_memories_are_chunks_in_order_then_what_was_left_over(model):
    """The slow twin encodes every full chunk anew, gives it its place by hand, and streams the left-over tokens."""
    texts = [random_ids(length, seed=length) for length in (19, 3, 30)]  # 2 chunks + 3, 0 + 3, 3 + 6 tokens
    joined = join([model.compress(text, source=f"{len(text)}") for text in texts])
    assert [(s.name, s.num_tokens) for s in joined.sources] == [("19", 19), ("3", 3), ("30", 30)]
    state = model.new_state()
    chunks = [chunk for text in texts for chunk in text.split(8) if len(chunk) == 8]
    for number, chunk in enumerate(chunks):
        keys, values = model.project(model.encode_layers(chunk[None]), [number])
        state.memory_keys = [torch.cat([a, join_slots(b, 1)], 2) for a, b in zip(state.memory_keys, keys, strict=True)]
        state.memory_values = [torch.cat([a, join_slots(b, 1)], 2) for a, b in zip(state.memory_values, values, strict=True)]
        state.num_tokens += 8
    rest = torch.cat([text[len(text) // 8 * 8 :] for text in texts])  # 12 tokens: a chunk of their own, and 4
    expected = model(rest[None], state).past_key_values
    found = joined.state(model)
    assert found.num_tokens == expected.num_tokens == 52 and found.num_slots == expected.num_slots == 12
    question = random_ids(1, 9, seed=99)
    assert relative_error(model(question, found).logits, model(question, expected).logits) < ROUNDING
    # documents of whole chunks: the same as reading one text behind the other
    whole = [random_ids(16, seed=5), random_ids(8, seed=6)]
    together = join([model.compress(text) for text in whole]).state(model)
    one = model(torch.cat(whole)[None]).past_key_values
    assert relative_error(model(question, together).logits, model(question, one).logits) < ROUNDING


@pytest.mark.parametrize("length", [3, 16, 30])
def test_a_saved_memory_is_the_same_to_the_bit(model, tmp_path, length):
    memory = model.compress(random_ids(length), source="ein Büchlein")
    memory.save(tmp_path / "new" / "book.mem")
    loaded = Memory.load(tmp_path / "new" / "book.mem", model)
    assert torch.equal(loaded.slots, memory.slots) and loaded.slots.dtype == torch.float64
    assert torch.equal(loaded.open_ids, memory.open_ids)
    assert (loaded.sources, loaded.made_by) == (memory.sources, memory.made_by)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["book.mem"]


def test_questions_do_not_change_a_memory(model):
    memory = model.compress(random_ids(30))
    before = memory.slots.clone()
    question, options = random_ids(1, 4, seed=8), dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
    state = memory.state(model)
    first = model.generate(question, state=state, **options)
    model.generate(random_ids(1, 7, seed=9), state=state, **options)
    assert torch.equal(model.generate(question, state=state, **options), first)
    assert torch.equal(model.generate(question, state=memory.state(model), **options), first)
    assert torch.equal(memory.slots, before)


def test_another_models_memory_is_refused_by_name(model, tmp_path):
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
        memory.state(adapted)  # and nothing else differs


def test_another_dtype_of_the_same_model_is_the_same_model(model):
    memory = model.compress(random_ids(20))
    single = MemoryLM(copy.deepcopy(model.base).float(), MEMORY)
    single.load_memory_state_dict(model.memory_state_dict())
    assert memory.state(single).memory_keys[0].dtype == torch.float32
    assert single.compress(random_ids(20)).state(model).memory_keys[0].dtype == torch.float64


def test_past_the_capacity(model):
    with pytest.raises(ValueError, match="239 tokens, the capacity is 238"):
        model.compress(random_ids(239))
    whole = model.compress(random_ids(238)).state(model)  # 29 memories and 6 tokens: all 64 positions
    assert (whole.num_tokens, whole.num_slots, whole.open_ids.shape) == (238, 58, (1, 6))
    half = model.compress(random_ids(120))
    with pytest.raises(ValueError, match="240 tokens, the capacity is 238"):
        join([half, half]).state(model)


def test_files_that_are_no_memories(model, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text.mem").write_text("a book")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.mem")
    for name, message in (("none.mem", "cannot be read"), ("text.mem", "not a memory"), ("other.mem", "not a memory made by")):
        with pytest.raises(ConfigError, match=f"{name}: .*{message}"):
            Memory.load(tmp_path / name)


def test_what_compress_takes(model):
    with pytest.raises(ValueError, match="a text needs its tokenizer"):
        model.compress("It was a bright cold day")
    with pytest.raises(ValueError, match="one document"):
        model.compress(random_ids(2, 9))
    ids = random_ids(9)
    for same in (ids[None], ids.tolist()):
        assert torch.equal(model.compress(same).slots, model.compress(ids).slots)
