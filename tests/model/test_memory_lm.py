"""Invariants of a MemoryLM in every family, on small random models in float64."""

import copy

import pytest
import torch
from conftest import (
    FAMILIES,
    MEMORY,
    gradients,
    make_base,
    make_model,
    random_ids,
    relative_error,
    worst_error,
)

import uiollms
from uiollms import MemoryConfig, MemoryLM, Sample
from uiollms.model.passes import empty_prefix

ROUNDING = 1e-12  # a few thousand operations in float64


@torch.no_grad()
def test_a_batch_without_memory_equals_the_base(family):
    base = make_base(family)
    model = MemoryLM(base, MEMORY)
    ids = random_ids(2, 7)
    assert torch.equal(model(ids).logits, base(ids).logits)  # the same kernels give the same bits


@torch.no_grad()
def test_a_batch_without_memory_equals_the_base_in_float32(family):
    base = make_base(family, torch.float32)
    ids = random_ids(2, 7)
    alone = base(ids).logits
    assert torch.equal(MemoryLM(base, MEMORY)(ids).logits, alone)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 27, [8, 8, 8, 3], [3, 13, 1, 10], [27], [16, 11]])
def test_any_split_of_calls_gives_the_same_logits(family, pieces):
    model = make_model(family)
    ids = random_ids(2, 27)
    whole = model(ids).logits
    state, logits, start = None, [], 0
    for length in pieces:
        output = model(ids[:, start : start + length], state)
        state, start = output.past_key_values, start + length
        logits.append(output.logits)
    assert relative_error(torch.cat(logits, 1), whole) < ROUNDING
    assert state.num_tokens == 27 and state.num_slots == 3 * MEMORY.num_memory


@torch.no_grad()
def test_a_batch_equals_its_rows_alone(family):
    model = make_model(family)
    ids = random_ids(3, 21)
    batched = model(ids).logits
    for i in range(3):
        assert relative_error(model(ids[i : i + 1]).logits[0], batched[i]) < ROUNDING


@torch.no_grad()
def test_a_memory_does_not_depend_on_the_batch(family):
    model = make_model(family)
    chunks = random_ids(4, 8)
    together = model.encode(chunks)
    assert together.shape == (3, 4, MEMORY.num_memory, model.config.hidden_size)
    for c in range(4):
        assert relative_error(model.encode(chunks[c : c + 1])[:, 0], together[:, c]) < ROUNDING


@torch.no_grad()
def test_a_chunk_depends_on_earlier_chunks_only_through_memory(family):
    """If the memories of chunk 0 are replaced by those of another text, the logits of chunk 1 are
    those after the other text."""
    model = make_model(family)
    a, b, tail = random_ids(1, 8, seed=1), random_ids(1, 8, seed=2), random_ids(1, 6, seed=3)
    state_a, state_b = model(a).past_key_values, model(b).past_key_values
    expected = model(tail, state_b).logits
    state_a.memory_keys, state_a.memory_values = state_b.memory_keys, state_b.memory_values
    assert torch.equal(model(tail, state_a).logits, expected)
    assert relative_error(model(tail, model(a).past_key_values).logits, expected) > 1e-3


def test_exact_step_is_autograd_through_everything(family):
    """Compares the gradients of the two-pass step with those of forward(), which builds one graph
    over all chunks."""
    model = make_model(family)
    ids = random_ids(1, 29)
    model(ids, labels=ids).loss.backward()
    plain = gradients(model)
    result = uiollms.gradient_step(model, Sample.document(ids, 8), estimator="exact")
    found = gradients(model)
    assert worst_error(found, plain) < 1e-10
    # Both roles get gradients in one step. With PEFT's set_adapter one of them would not.
    for role in ("encoder", "decoder"):
        names = [
            n
            for n in found
            if n.startswith(role) and "layers.2" not in n and n != "decoder.repeat_token"
        ]
        assert all(found[n].abs().max() > 0 for n in names)
    assert result.reencoded == (0, 1, 2)


@torch.no_grad()
def test_the_base_is_shared_and_frozen():
    base = make_base()
    weights = copy.deepcopy(base.state_dict())
    model = MemoryLM(base, MEMORY)
    assert model.base is base and not any(p.requires_grad for p in base.parameters())
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())
    assert added == sum(p.numel() for p in model.trainable_parameters().values())
    assert all(torch.equal(weights[k], v) for k, v in base.state_dict().items())


def test_the_encoder_does_not_run_modules_whose_results_nothing_reads():
    """These are the last layer's attention and MLP, the final norm and the LM head."""
    model = make_model()
    ran = []
    last = model.base.model.layers[-1]
    for module in (last.self_attn, last.mlp, model.base.model.norm, model.base.lm_head):
        module.register_forward_hook(lambda module, *_: ran.append(type(module).__name__))
    model.encode(random_ids(2, 8))
    assert ran == []


@torch.no_grad()
def test_earlier_chunks_are_not_encoded_or_projected_again():
    model = make_model()
    state = model(random_ids(1, 16)).past_key_values
    keys = [k.clone() for k in state.memory_keys]
    calls = []
    model.base.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda m, args, out: calls.append(args[0].shape[1])
    )
    after = model(random_ids(1, 3), state).past_key_values
    assert calls == [3]  # the three new tokens only
    assert all(torch.equal(a, b) for a, b in zip(after.memory_keys, keys, strict=True))


@torch.no_grad()
def test_memories_are_no_views_of_larger_tensors():
    """In the release they are views of all hidden states, which are 33 times as large."""
    model = make_model()
    state = model(random_ids(1, 20)).past_key_values
    for memory in [*model.encode_layers(random_ids(2, 8)), model.encode(random_ids(2, 8))]:
        assert memory.untyped_storage().nbytes() == memory.nbytes
    # 4 slots, and in the same buffer the open chunk of up to 8 tokens
    for keys in (*state.memory_keys, *state.memory_values):
        assert keys.untyped_storage().nbytes() <= keys.nbytes // 4 * (4 + 8)


@torch.no_grad()
def test_continuations_of_one_state_do_not_affect_each_other():
    """Without a graph, new tokens are appended to the buffer that the states share. The texts cross
    a chunk boundary."""
    model, ids, other = make_model(), random_ids(2, 27), random_ids(2, 27, seed=1)
    expected = {
        name: model(torch.cat([ids[:, :11], more], dim=1)).logits[:, 11:]
        for name, more in (("a", ids), ("b", other))
    }
    states = dict.fromkeys(expected, model(ids[:, :11]).past_key_values)
    assert (
        all(buffer.length == 5 for buffer in states["a"].buffers.values()) and states["a"].buffers
    )
    for t in range(27):
        for name, more in (("a", ids), ("b", other)):
            output = model(more[:, t : t + 1], states[name])
            states[name] = output.past_key_values
            torch.testing.assert_close(
                output.logits[:, 0], expected[name][:, t], rtol=1e-9, atol=1e-9
            )
    same, swapped = model(ids[:, :11]).past_key_values, model(ids[:, :11]).past_key_values
    swapped.memory_keys = [torch.zeros_like(k) for k in swapped.memory_keys]
    assert (
        relative_error(model(ids[:, 11:12], swapped).logits, model(ids[:, 11:12], same).logits)
        > 1e-3
    )
    same.reorder_cache(torch.tensor([1, 0]))
    expected_rows = model(ids[:, :12]).logits[[1, 0], 11:]
    torch.testing.assert_close(
        model(ids[[1, 0], 11:12], same).logits, expected_rows, rtol=1e-9, atol=1e-9
    )


def test_a_call_does_not_change_its_state():
    model = make_model()
    state = model(random_ids(1, 11)).past_key_values
    first = model(random_ids(1, 9, seed=1), state).logits
    model(random_ids(1, 9, seed=2), state)
    assert torch.equal(model(random_ids(1, 9, seed=1), state).logits, first)
    assert state.num_tokens == 11


@torch.no_grad()
def test_generation_continues_across_chunk_boundaries(family):
    model = make_model(family)
    ids = random_ids(2, 13)
    found = model.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=None)
    expected = ids
    for _ in range(9):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)
    sampled = model.generate(ids, do_sample=True, top_p=0.9, max_new_tokens=4, eos_token_id=None)
    beams = model.generate(ids, num_beams=3, do_sample=False, max_new_tokens=4, eos_token_id=None)
    assert sampled.shape == beams.shape == (2, 17)
    ones = torch.ones_like(ids)  # as a tokenizer returns it
    assert torch.equal(
        model.generate(
            ids, attention_mask=ones, do_sample=False, max_new_tokens=9, eos_token_id=None
        ),
        expected,
    )


@torch.no_grad()
def test_logits_to_keep_decodes_the_last_chunk_only():
    model = make_model()
    ids = random_ids(1, 27)
    decoded = []
    model.base.model.norm.register_forward_hook(
        lambda m, args, out: decoded.append(args[0].shape[1])
    )
    last = model(ids, logits_to_keep=1)
    assert decoded == [3]  # only the open chunk is decoded
    whole = model(ids)
    assert relative_error(last.logits, whole.logits[:, -1:]) < ROUNDING
    more = random_ids(1, 4, seed=5)
    assert (
        relative_error(
            model(more, last.past_key_values).logits, model(more, whole.past_key_values).logits
        )
        < ROUNDING
    )


def test_labels_give_the_loss_of_the_document_protocol():
    model = make_model()
    ids = random_ids(2, 19)
    labels = ids.clone()
    labels[:, :5] = -100
    output = model(ids, labels=labels)
    nll = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert relative_error(output.loss, nll) < ROUNDING


def test_a_longer_text_than_the_capacity_is_an_error_with_the_numbers():
    model = make_model()  # 64 positions, chunks of 8, 2 slots
    # The last of 29 full chunks follows 28 * 2 = 56 slots. Then 64 - 58 = 6 positions are left.
    assert model.capacity == 29 * 8 + 6 == 238
    ids = random_ids(1, 238)
    with torch.no_grad():
        whole = model(ids, logits_to_keep=7)
        pieces = [model(ids[:, :231], logits_to_keep=1)]
        for i in range(231, 238):
            pieces.append(model(ids[:, i : i + 1], pieces[-1].past_key_values))
        assert relative_error(torch.cat([p.logits for p in pieces[1:]], 1), whole.logits) < ROUNDING
        with pytest.raises(
            ValueError,
            match="239 tokens, the capacity is 238: max_position_embeddings 64, chunk_size 8 and "
            "num_memory 2 allow 29 full chunks and 6 tokens after them; cut it",
        ):
            model(random_ids(1, 1), whole.past_key_values)


@pytest.mark.parametrize(
    "num_memory, chunk_size, positions, capacity",
    [
        # 32x.json: 97 full chunks after up to 3,072 slots, then 992 tokens after 3,104 slots
        (32, 1024, 4096, 100_320),
        # 8x.json: 25 full chunks and 4,096 - 25 * 128 = 896 tokens
        (128, 1024, 4096, 26_496),
        # smollm2-8x.json: 249 full chunks and 8,192 - 249 * 32 = 224 tokens
        (32, 256, 8192, 63_968),
        (2, 8, 8, 8 + 6),  # one chunk fills all positions, then 2 slots leave 6 of them
        (8, 8, 16, 16),  # no position is left after 2 chunks
        (4, 8, 15, 16 + 7),  # 7 positions are left after 2 chunks, one less than a chunk
    ],
)
def test_capacity_follows_its_definition(num_memory, chunk_size, positions, capacity):
    """The capacity is one less than the first length at which a chunk needs more positions."""
    memory = MemoryConfig(
        num_memory=num_memory, chunk_size=chunk_size, lora_rank=128, lora_alpha=512
    )
    assert memory.capacity(positions) == capacity

    def fits(length: int) -> bool:
        full, last = divmod(length, chunk_size)
        rows = [(full - 1, chunk_size)] * bool(full) + [(full, last)] * bool(last)
        return all(memories * num_memory + tokens <= positions for memories, tokens in rows)

    assert fits(capacity) and not fits(capacity + 1)


def test_learned_tokens_start_as_copies_of_the_eos_embedding():
    model = MemoryLM(make_base(), MEMORY)
    tensors = model.memory_state_dict()
    eos = model.base.model.embed_tokens.weight[2]
    for name in ("encoder.retrieval_token", "decoder.repeat_token"):
        assert tensors[name].shape == (1, 1, 32) and torch.equal(tensors[name][0, 0], eos)
    assert (
        len({t.data_ptr() for t in (*tensors.values(), model.base.model.embed_tokens.weight)})
        == len(tensors) + 1
    )


def test_strict_loading_lists_every_wrong_tensor():
    model = make_model()
    tensors = dict(model.memory_state_dict())
    tensors["encoder.extra"] = tensors.pop("decoder.repeat_token")
    tensors["encoder.retrieval_token"] = torch.zeros(1, 1, 5)
    with pytest.raises(ValueError) as error:
        model.load_memory_state_dict(tensors)
    for part in (
        "decoder.repeat_token: missing",
        "encoder.extra: unknown",
        "retrieval_token: shape [1, 1, 5], expected [1, 1, 32]",
    ):
        assert part in str(error.value)
    tensors.pop("encoder.retrieval_token")
    model.load_memory_state_dict(tensors, strict=False)


def test_unsupported_bases_raise_an_error():
    base = make_base("mistral")
    with pytest.raises(ValueError, match="sliding_window"):
        MemoryLM(base, MemoryConfig(num_memory=2, chunk_size=48, lora_rank=2, lora_alpha=2))
    base = make_base()
    base.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported: llama"):
        MemoryLM(base, MEMORY)


def test_a_bfloat16_base_has_float32_trained_parameters():
    model = make_model("smollm2", torch.bfloat16)
    uiollms.gradient_step(model, Sample.language_modeling(random_ids(24), 8))
    found = gradients(model)
    assert all(t.dtype == torch.float32 for t in found.values())
    assert found["encoder.layers.0.q_proj.lora_A"].abs().max() > 0
    reference = MemoryLM(copy.deepcopy(model.base).double(), MEMORY)
    reference.load_memory_state_dict(model.memory_state_dict())
    uiollms.gradient_step(reference, Sample.language_modeling(random_ids(24), 8))
    exact = gradients(reference)
    # bfloat16 has 8 bits of precision, and the errors of three layers are a few per cent
    assert (
        relative_error(
            found["decoder.layers.0.v_proj.lora_B"], exact["decoder.layers.0.v_proj.lora_B"]
        )
        < 0.1
    )


def test_five_families_are_tested():
    assert set(FAMILIES) == {"llama", "smollm2", "mistral", "qwen2", "qwen3"}


# Products of these dtypes with frozen weights use another kernel where memory is read.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "smollm2", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_one_row_without_memory_equals_the_base_to_the_bit(family, dtype):
    model = make_model(family, dtype)
    for length in (1, 5, 7, 8):
        ids = random_ids(1, length)
        assert torch.equal(model(ids).logits, model.base(ids).logits), length
        hidden = model.decode(ids, empty_prefix(model), [0])
        assert torch.equal(hidden, model.base.model(ids).last_hidden_state)


@torch.no_grad()
def test_rows_of_a_batch_equal_the_base_up_to_rounding():
    model, ids = make_model(), random_ids(5, 8)
    hidden = model.decode(ids, empty_prefix(model), [0] * 5)
    assert relative_error(hidden, model.base.model(ids).last_hidden_state) < 1e-10
