"""The two-pass step is compared with plain autograd, and the mean of every estimator's gradient
over all of its outcomes with the exact gradient.

The computation is in float64, whose rounding is about 1e-14 here. A relative error of 1e-10 is
allowed.
"""

import itertools
import random
import weakref

import pytest
import torch
from conftest import (
    FAMILIES,
    MEMORY,
    SHAPE,
    gradients,
    make_model,
    random_ids,
    relative_error,
    worst_error,
)
from test_estimators import reservoir_outcomes

import uiollms
from uiollms import MemoryConfig, Sample
from uiollms.data.limits import check_sample
from uiollms.data.sample import Row
from uiollms.kernels import recompute
from uiollms.model.passes import (
    decode_rows,
    empty_slots,
    encode_all,
    encode_and_project_all,
    prepare_rows,
    project_all,
    teacher_hidden,
)
from uiollms.model.state import KVPrefix, join_slots
from uiollms.training.estimators import (
    Estimator,
    Importance,
    all_pairs,
    inclusion_probabilities,
    systematic_sample,
    window_from_draws,
)
from uiollms.training.step import chunk_norms, chunks_with_gradient, row_weights

PROVEN = 1e-10


def plain_gradients(
    model, sample: Sample, weights: torch.Tensor, seeds=None
) -> dict[str, torch.Tensor]:
    """Computes the gradients with one graph over all chunks: the slow twin of the step. The loss
    J_t reads the mixture w * m_s + (1 - w) * detach(m_s), whose value is m_s and whose gradient is
    w times as large. The decoder's LoRA weights get their gradient from a second pass over plain
    memories."""
    found = {}
    for weighted in (False, True):
        memory = [
            model.encode_layers(chunk[None], seeds and [seeds[s]])
            for s, chunk in enumerate(sample.chunks)
        ]
        loss = torch.zeros((), dtype=torch.float64)
        for t, row in enumerate(sample.rows):
            if not len(row.scored):
                continue
            parts = []
            for s in range(row.num_memories):
                w = weights[t, s].item() if weighted else 1.0
                mixed = [w * m + (1 - w) * m.detach() for m in memory[s]]
                parts.append(model.project(mixed, [s], seeds and [seeds[s]]))
            layers = range(len(model.base.model.layers))
            keys = [[p[0][i] for p in parts] for i in layers]
            values = [[p[1][i] for p in parts] for i in layers]
            (rows,) = prepare_rows(model, sample, [[t]])
            token_losses, _ = decode_rows(
                model, sample, rows, KVPrefix(keys, values), teacher_hidden(model, sample)
            )
            loss = loss + (token_losses * row.token_weights[row.scored]).sum()
        if loss.requires_grad:
            loss.backward()
        role = "encoder" if weighted else "decoder"
        found |= {n: g for n, g in gradients(model).items() if n.startswith(role)}
    return found


def protocols(ids: torch.Tensor) -> dict[str, Sample]:
    labels = ids.clone()
    labels[5:20] = -100
    return {
        "paper": Sample.language_modeling(ids, 8),
        "document": Sample.document(ids, 8),
        "beacon": Sample.beacon(ids, labels, 8),
    }


@pytest.mark.parametrize("protocol", ["paper", "document", "beacon"])
@pytest.mark.parametrize("chunk_batch", [1, 2, 8])
@pytest.mark.parametrize("length", [8, 9, 17, 32, 37])
def test_the_step_equals_autograd_for_any_weights(protocol, chunk_batch, length):
    model = make_model()
    model.chunk_batch = chunk_batch
    sample = protocols(random_ids(length))[protocol]
    weights = torch.rand(len(sample.rows), len(sample.rows), dtype=torch.float64).tril(-1)
    # No row sends a gradient to chunk 1.
    weights[:, 1:2] = 0
    result = uiollms.gradient_step(model, sample, weights=weights)
    found = gradients(model)
    assert worst_error(found, plain_gradients(model, sample, weights)) < PROVEN
    assert 1 not in result.reencoded
    assert result.scored.tolist() == [len(row.scored) for row in sample.rows]


@pytest.mark.parametrize("length", [8, 27])
def test_copying_equals_autograd_and_trains_the_repeat_token(length):
    """Every row reads all memories, that of the copied chunk included."""
    model, sample = make_model(), Sample.copy(random_ids(length), 8)
    count = len(sample.rows)
    for weights in (
        torch.ones(count, count, dtype=torch.float64),
        torch.rand(count, count, dtype=torch.float64),
    ):
        uiollms.gradient_step(model, sample, weights=weights)
        found = gradients(model)
        assert worst_error(found, plain_gradients(model, sample, weights)) < PROVEN
        assert found["decoder.repeat_token"].abs().max() > 0
    uiollms.gradient_step(model, sample, estimator="exact")
    exact = gradients(model)
    assert worst_error(exact, plain_gradients(model, sample, torch.ones(count, count))) < PROVEN
    outcomes = [
        (row_weights(sample, window_from_draws(draws, 1, True, count + 1)), probability)
        for draws, probability in reservoir_outcomes(count + 1, 1)
    ]
    # uio is unbiased here too.
    assert worst_error(expectation(model, sample, outcomes), exact) < PROVEN


def test_rows_that_read_all_memories_have_the_same_weights():
    """Questions are not chunks, so they evict nothing from the reservoir. One draw of S among C
    memories sets the weights of all rows."""
    sample, C, S = samples_with_teachers()["questions, plain"], 3, 2
    assert len(sample.chunks) == C
    for draws, _ in reservoir_outcomes(C + 1, S):
        for compensate, factor in ((True, C / S), (False, 1)):
            weights = row_weights(sample, window_from_draws(draws, S, compensate, C + 1))
            assert torch.equal(weights[0], weights[1])
            assert sorted(weights[0].tolist()) == [0, 0, factor, factor]


def samples_with_teachers() -> dict[str, Sample]:
    ids = random_ids(27)
    questions = [
        (random_ids(3, seed=1), random_ids(2, seed=2)),
        (random_ids(9, seed=3), random_ids(4, seed=4)),
    ]
    return {
        "distilled beacons": protocols(ids)["beacon"].distilled(),
        "memory utilization": Sample.memory_utilization(ids, random_ids(6, seed=5), 8),
        "questions, 0.9 KL": Sample.questions(ids, questions, 8, kl_weight=0.9),
        "questions, plain": Sample.questions(ids, questions, 8),
    }


@pytest.mark.parametrize("kind", samples_with_teachers())
def test_distillation_losses_and_gradients_equal_the_formula(kind):
    """The losses are compared with softmaxes of the logits of the base and of a stream."""
    model, sample = make_model(), samples_with_teachers()[kind]
    weights = torch.ones(len(sample.rows), len(sample.rows) + 4, dtype=torch.float64)
    result = uiollms.gradient_step(model, sample, weights=weights)
    assert worst_error(gradients(model), plain_gradients(model, sample, weights)) < PROVEN
    with torch.no_grad():
        for t, row in enumerate(sample.rows):
            context = sample.chunks[: row.num_memories].flatten()
            state = model(context[None]).past_key_values if len(context) else None
            student = model(row.input_ids[None], state).logits[0].log_softmax(-1)[row.scored]
            nll = -student.gather(1, row.targets[row.scored, None])[:, 0]
            loss = nll
            if sample.kl_weight:
                text = torch.cat([context, row.input_ids])
                raw = model.base(text[None]).logits[0, len(context) :]
                teacher = raw.log_softmax(-1)[row.scored]
                kl = (teacher.exp() * (teacher - student)).sum(-1)
                loss = (1 - sample.kl_weight) * nll + sample.kl_weight * kl
            expected = (loss * row.token_weights[row.scored]).sum()
            assert relative_error(result.losses[t], expected) < 1e-10, t


def test_a_teacher_past_the_positions_is_refused():
    message = "reads its context raw: 65 tokens, the base has 64 positions"
    with pytest.raises(ValueError, match=message):
        uiollms.gradient_step(make_model(), Sample.document(random_ids(65), 8).distilled())


def test_copy_losses_equal_those_of_reconstruct():
    model, ids = make_model(), random_ids(8)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model.reconstruct(ids[None])[0], ids)
    found = uiollms.gradient_step(model, Sample.copy(ids, 8)).losses[0]
    assert relative_error(found, expected) < 1e-12


def test_losses_equal_those_of_the_forward_pass():
    model, ids = make_model(), random_ids(29)
    result = uiollms.gradient_step(model, Sample.document(ids, 8))
    expected = model(ids[None], labels=ids[None]).loss.detach()
    assert relative_error(result.losses.sum(), expected) < 1e-12
    assert relative_error(result.nll / 28, result.losses.sum()) < 1e-12
    without = uiollms.gradient_step(model, Sample.document(ids, 8), report_all=False)
    assert without.losses[0] == 0 and without.scored[0] == 0
    assert torch.equal(without.losses[1:], result.losses[1:])


def test_gradients_are_added_and_scaled():
    model, sample = make_model(), Sample.document(random_ids(29), 8)
    uiollms.gradient_step(model, sample)
    once = gradients(model)
    uiollms.gradient_step(model, sample, scale=0.25)
    uiollms.gradient_step(model, sample, scale=0.75)
    assert worst_error(gradients(model), once) < PROVEN


def expectation(model, sample: Sample, outcomes) -> dict[str, torch.Tensor]:
    """Returns the mean of the step's gradients over outcomes (weights, probability)."""
    mean: dict[str, torch.Tensor] = {}
    for weights, probability in outcomes:
        uiollms.gradient_step(model, sample, weights=weights)
        for name, grad in gradients(model).items():
            mean[name] = mean.get(name, 0) + probability * grad
    return mean


@pytest.mark.parametrize("S", [1, 2])
def test_uio_averaged_over_all_reservoirs_is_the_exact_gradient(S):
    num_chunks = 5
    model, sample = make_model(), Sample.language_modeling(random_ids(38), 8)
    exact = expectation(model, sample, [(all_pairs(num_chunks), 1.0)])

    def outcomes(compensate):
        return [
            (window_from_draws(draws, S, compensate, num_chunks), probability)
            for draws, probability in reservoir_outcomes(num_chunks, S)
        ]

    assert worst_error(expectation(model, sample, outcomes(True)), exact) < PROVEN

    def encoder_error(found):
        flat = [
            torch.cat([g[n].flatten() for n in g if n.startswith("encoder")])
            for g in (found, exact)
        ]
        return relative_error(*flat)

    # Biased estimators fail this check by far.
    uncompensated = encoder_error(expectation(model, sample, outcomes(False)))
    truncated = encoder_error(expectation(model, sample, [(all_pairs(5).triu(-S), 1.0)]))
    assert uncompensated > 0.1 and truncated > 0.1, (uncompensated, truncated)


@pytest.mark.parametrize("name", ["tbptt", "uio"])
def test_gradients_with_S_of_the_whole_document_are_exact(name):
    model, sample = make_model(), Sample.language_modeling(random_ids(38), 8)
    uiollms.gradient_step(model, sample, estimator="exact")
    exact = gradients(model)
    uiollms.gradient_step(model, sample, estimator=name, S=4, rng=0)
    assert worst_error(gradients(model), exact) == 0


@pytest.mark.parametrize("S", [1, 2, 3])
def test_importance_averaged_over_its_outcomes_is_the_exact_gradient(S):
    """systematic_sample is a step function of one uniform number. The test visits every step once
    and weights it with its width."""
    model, sample = make_model(), Sample.language_modeling(random_ids(38), 8)
    norms: list[float] = []

    class Fixed(Importance):
        def columns(self, gradient_norms, rng):
            norms[:] = gradient_norms
            inclusion = inclusion_probabilities(gradient_norms, self.S, self.floor)
            chosen = systematic_sample(inclusion, rng.u)
            return [1 / p if c else 0.0 for p, c in zip(inclusion, chosen, strict=True)]

    def step(u):
        rng = random.Random(0)
        rng.u = u
        result = uiollms.gradient_step(model, sample, estimator=Fixed(S), rng=rng)
        return result, gradients(model)

    step(0.5)
    ends = itertools.accumulate(inclusion_probabilities(norms, S, 0.1))
    breaks = sorted({0.0, 1.0, *(end % 1.0 for end in ends)})
    mean: dict[str, torch.Tensor] = {}
    for low, high in itertools.pairwise(breaks):
        if high - low > 1e-13:
            result, found = step((low + high) / 2)
            assert len(result.reencoded) <= S + 1
            for name, grad in found.items():
                mean[name] = mean.get(name, 0) + (high - low) * grad
    uiollms.gradient_step(model, sample, estimator="exact")
    assert worst_error(mean, gradients(model)) < PROVEN


def test_importance_receives_the_norms_of_memory_gradients():
    model, sample = make_model(), Sample.language_modeling(random_ids(30), 8)
    memory = [model.encode_layers(chunk[None]) for chunk in sample.chunks]
    memory = [[layer.detach().requires_grad_() for layer in one] for one in memory]
    for t, row in list(enumerate(sample.rows))[1:]:
        projected = [model.project(memory[s], [s]) for s in range(row.num_memories)]
        keys, values = ([[p[half][i] for p in projected] for i in range(3)] for half in (0, 1))
        (rows,) = prepare_rows(model, sample, [[t]])
        nll, _ = decode_rows(model, sample, rows, KVPrefix(keys, values))
        (nll * row.token_weights[row.scored]).sum().backward()
    expected = [sum(layer.grad.norm().item() ** 2 for layer in one) ** 0.5 for one in memory]
    gradients(model)

    class Spy(Estimator):
        def weight_matrix(self, num_chunks, rng):
            return all_pairs(num_chunks)

        def columns(self, norms, rng):
            assert norms == pytest.approx(expected, rel=1e-10)
            return [1.0] * len(norms)

    uiollms.gradient_step(model, sample, estimator=Spy())
    assert chunk_norms([torch.ones(2, 3, 4)]).tolist() == pytest.approx([12**0.5] * 2)


@pytest.mark.parametrize("chunk_batch", [1, 8])
def test_dropout_is_the_same_in_both_runs_of_a_chunk(chunk_batch):
    """If a chunk were encoded again with another dropout mask, the error would be of order 1."""
    model = make_model(config=MemoryConfig(**MEMORY.model_dump() | dict(lora_dropout=0.4)))
    model.chunk_batch = chunk_batch
    model.train()
    sample = Sample.language_modeling(random_ids(38), 8)
    weights = window_from_draws([1, 0, 4], 2, True)
    uiollms.gradient_step(model, sample, weights=weights, rng=7)
    found = gradients(model)
    rng = random.Random(7)
    seeds = [rng.getrandbits(62) for _ in sample.chunks]
    assert worst_error(found, plain_gradients(model, sample, weights, seeds)) < PROVEN
    uiollms.gradient_step(model, sample, weights=weights, rng=8)
    other = gradients(model)
    assert relative_error(other["encoder.retrieval_token"], found["encoder.retrieval_token"]) > 1e-3
    model.eval()
    uiollms.gradient_step(model, sample, weights=weights, rng=7)
    assert worst_error(gradients(model), plain_gradients(model, sample, weights)) < PROVEN


@pytest.mark.parametrize("estimator", ["exact", "uio", "importance"])
def test_checkpointing_changes_no_gradient(estimator):
    """Both compute the same operations on the same numbers, in both roles and with dropout, so the
    results are equal bit for bit."""
    model = make_model(config=MemoryConfig(**MEMORY.model_dump() | dict(lora_dropout=0.4)))
    model.chunk_batch = 2
    model.train()
    sample, found = Sample.language_modeling(random_ids(38), 8), []
    for model.checkpointing in (False, True):
        result = uiollms.gradient_step(model, sample, estimator=estimator, rng=7)
        found.append(gradients(model) | {"losses": result.losses})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_only_chunks_with_gradient_are_encoded_with_a_graph():
    """In the release, 28 of the 32 backward passes of the encoder at 8,192 tokens compute
    zeros."""
    model, sample = make_model(), Sample.language_modeling(random_ids(8 * 9), 8)
    model.chunk_batch = 1
    # These draws reject every chunk after chunk 0.
    weights = window_from_draws([1, 2, 3, 4, 5, 6, 7, 8], 1, True)
    encoded = []
    plain = model.encode_layers
    model.encode_layers = lambda ids, *rest: (
        encoded.append((len(ids), torch.is_grad_enabled())) or plain(ids, *rest)
    )
    result = uiollms.gradient_step(model, sample, weights=weights)
    assert result.reencoded == (0,)
    assert sum(count for count, with_grad in encoded if with_grad) == 1
    assert sum(count for count, with_grad in encoded if not with_grad) == 8


def graph_bytes(model, sample, **settings) -> int:
    """Returns the most bytes that autograd stored for backward at any moment of a step. A saved
    tensor counts as long as its graph lives. A tensor that
    `compact_graph` computes again or saves in half precision counts as what is saved for it."""
    alive: dict[int, int] = {}
    most = 0

    tensors = recompute.CompactTensors()

    class Saved:
        def __init__(self, tensor):
            nonlocal most
            self.packed, self.key = tensors.pack(tensor), id(self)
            alive[self.key] = self.packed.nbytes if isinstance(self.packed, torch.Tensor) else 0
            most = max(most, sum(alive.values()))

        def __del__(self):
            alive.pop(self.key, None)

    def hooks():
        return torch.autograd.graph.saved_tensors_hooks(
            Saved, lambda saved: tensors.unpack(saved.packed)
        )

    def count_saved(function, hidden):
        with hooks():
            return function(hidden)

    # The hooks count tensors that are saved in layers and outside of them.
    with pytest.MonkeyPatch.context() as patch, hooks():
        patch.setattr("uiollms.kernels.execution.compact_graph", count_saved)
        uiollms.gradient_step(model, sample, **settings)
    gradients(model)
    return most


def test_peak_memory_grows_neither_with_S_nor_with_the_documents_length():
    """The most bytes that graphs store are compared for S = 1, 4 or all chunks, and for documents
    of 6 and of 24 chunks, with chunk_batch 2."""
    config = MemoryConfig(num_memory=1, chunk_size=8, lora_rank=2, lora_alpha=4)
    model = make_model(config=config)
    model.chunk_batch = 2
    short, long = (Sample.language_modeling(random_ids(8 * n), 8) for n in (6, 24))
    by_S = [graph_bytes(model, long, estimator="uio", S=S, rng=0) for S in (1, 4, 24)]
    by_S.append(graph_bytes(model, long))
    # The last batch may be filled differently, which is 2 %.
    assert max(by_S) <= 1.02 * min(by_S), by_S
    # In a longer document only the attention of a decoder batch grows, because it reads more
    # memory: 18 more slots of 1/8 chunk.
    assert graph_bytes(model, long) < 2 * graph_bytes(model, short)


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_do_not_store_outputs_of_silu(family, monkeypatch):
    """The graph stores two of the three tensors [B, T, I] of a SwiGLU, and every gradient is the
    same bit for bit."""
    model, sample = make_model(family), Sample.language_modeling(random_ids(40), 8)
    model.chunk_batch = 2
    found, counts = [], []
    for pack in (recompute.CompactTensors.pack, lambda tensors, saved: saved):
        stored: list[bool] = []

        def count_and_pack(tensors, saved, pack=pack, stored=stored):
            packed = pack(tensors, saved)
            stored.append(is_mlp_tensor(packed))
            return packed

        monkeypatch.setattr(recompute.CompactTensors, "pack", count_and_pack)
        uiollms.gradient_step(model, sample, estimator="exact")
        found.append(gradients(model))
        counts.append(sum(stored))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert counts[0] * 3 == counts[1] * 2 > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_store_the_inputs_of_norms_once_in_the_bases_dtype(family, monkeypatch):
    """In bfloat16 RMSNorm converts its input to float32, and its graph refers to the result twice.
    One tensor in bfloat16 is stored for both, and every gradient is the same bit for bit."""
    model = make_model(family, torch.bfloat16)
    sample = Sample.language_modeling(random_ids(40), 8)
    found, stored = [], []
    for pack in (recompute.CompactTensors.pack, lambda tensors, saved: saved):
        inputs: dict[int, torch.Tensor] = {}

        def pack_and_list(tensors, saved, pack=pack, inputs=inputs):
            packed = pack(tensors, saved)
            tensor = packed.tensor if isinstance(packed, recompute.Narrow) else packed
            if is_norm_input(saved) and saved.shape[-1] == model.config.hidden_size:
                inputs[id(tensor)] = tensor
            return packed

        monkeypatch.setattr(recompute.CompactTensors, "pack", pack_and_list)
        uiollms.gradient_step(model, sample, estimator="exact")
        found.append(gradients(model))
        stored.append(sum(tensor.nbytes for tensor in inputs.values()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert stored[0] * 2 == stored[1] > 0


def is_norm_input(saved) -> bool:
    """Returns whether a tensor is float32 hidden states that were converted from bfloat16."""
    node = saved.grad_fn
    return node is not None and node.name() == "ToCopyBackward0" and saved.dim() == 3


def is_mlp_tensor(saved) -> bool:
    """Returns whether a saved value is a tensor as wide as the inside of an MLP."""
    return (
        isinstance(saved, torch.Tensor)
        and saved.dim() == 3
        and saved.shape[-1] == SHAPE["intermediate_size"]
    )


def test_passes_without_a_graph_take_more_chunks_at_once():
    model, ids = make_model(), random_ids(8 * 7)
    for size, at_once in ((1, 2), (2, 4), (3, 4), (4, 4), (5, 5)):
        model.chunk_batch = size
        assert model.chunks_per_batch == size
        with torch.no_grad():
            assert model.chunks_per_batch == at_once
    model.chunk_batch = 2
    with torch.no_grad():
        batches, plain = [], model.encode_layers
        model.encode_layers = lambda ids, *rest: batches.append(len(ids)) or plain(ids, *rest)
        memory, _ = encode_all(model, ids.view(7, 8))
        assert batches == [4, 3]
        model.checkpointing, model.chunk_batch = True, 1
        assert model.chunks_per_batch == 1
        one_by_one, _ = encode_all(model, ids.view(7, 8))
        at_once = encode_and_project_all(model, ids.view(7, 8))
        separate = project_all(model, memory)
    assert batches[2:] == [1] * 14
    found = [*memory, *at_once[0], *at_once[1]]
    expected = [*one_by_one, *separate[0], *separate[1]]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and relative_error(a, b) < PROVEN
    # The slots are filled in place, so joining them copies nothing.
    for slots in empty_slots(model, 7):
        assert join_slots(slots, 1).data_ptr() == slots.data_ptr()


def test_a_row_that_scores_nothing_changes_nothing():
    model = make_model()
    ids = random_ids(20)
    sample = Sample.language_modeling(ids, 8)
    idle = Row(ids[:8], torch.full((8,), -100), torch.ones(8), num_memories=2)
    uiollms.gradient_step(model, sample)
    expected = gradients(model)
    result = uiollms.gradient_step(model, Sample(sample.chunks, (*sample.rows, idle)))
    assert worst_error(gradients(model), expected) == 0 and result.losses[-1] == 0


def test_samples_past_the_capacity_are_refused():
    """The base has 64 positions, and chunks of 8 tokens have 2 slots. Rows that read ALL memories
    need positions after them: a copy of 28 chunks takes 28 * 2 + 8 = 64 positions, one of 29 takes
    66. After 29 memories a question of 6 tokens fits and one of 7 does not."""
    ids = random_ids(238)
    questions = [(ids[:2], ids[2:6]), (ids[:2], ids[2:7])]
    for sample, needed in (
        (Sample.copy(ids[:224], 8), None),
        (Sample.copy(ids[:232], 8), (29, 8, 66)),
        (Sample.questions(ids[:232], questions[:1], 8), None),
        (Sample.questions(ids[:232], questions, 8), (29, 7, 65)),
        (Sample.memory_utilization(ids[:232], ids[:6], 8), None),
        (Sample.memory_utilization(ids[:232], ids[:7], 8), (29, 7, 65)),
        (Sample.document(ids, 8), None),
        (Sample.beacon(ids, ids, 8), None),
    ):
        if needed is None:
            check_sample(make_model().limits, sample)
            continue
        message = (
            r"{} memories of num_memory 2 slots and the {} tokens that read them need {} "
            r"positions, past max_pos.* 64"
        )
        with pytest.raises(ValueError, match=message.format(*needed)):
            uiollms.gradient_step(make_model(), sample)
    result = uiollms.gradient_step(make_model(), Sample.document(ids, 8), estimator="exact")
    assert int(result.scored.sum()) == 237
    with pytest.raises(ValueError, match="239 tokens, the capacity is 238"):
        uiollms.gradient_step(make_model(), Sample.document(random_ids(239), 8))


def test_a_document_of_one_chunk_trains_nothing():
    model = make_model()
    for length in (1, 2, 8):
        result = uiollms.gradient_step(
            model, Sample.language_modeling(random_ids(length), 8), estimator="uio", rng=0
        )
        assert result.reencoded == () and torch.isfinite(result.losses).all()
    assert all(p.grad is None for p in model.trainable_parameters().values())


def test_chunks_with_gradient_are_those_that_a_scored_row_reads_with_weight():
    """The function is compared with plain loops. The rows of a copying sample read later chunks
    too."""
    for sample in (
        Sample.document(random_ids(45), 8),
        Sample.copy(random_ids(27), 8),
        protocols(random_ids(45))["beacon"],
    ):
        weights = (torch.rand(len(sample.rows), len(sample.rows) + 4) < 0.2).double()
        slow = [
            s
            for s in range(len(sample.chunks))
            if any(
                len(row.scored) and row.num_memories > s and weights[t, s] != 0
                for t, row in enumerate(sample.rows)
            )
        ]
        assert chunks_with_gradient(sample, weights) == slow


@pytest.mark.parametrize("chunk_batch, times", [(1, 3 + 3), (2, 0)])
def test_a_step_with_chunk_batch_1_trims_the_heap_before_every_backward(
    chunk_batch, times, monkeypatch
):
    """Three rows read memory, and the three chunks that they read are encoded again."""
    model, trimmed = make_model(), []
    model.chunk_batch = chunk_batch
    monkeypatch.setattr("uiollms.training.step.trim_heap", trimmed.append)
    sample = Sample.language_modeling(random_ids(1, 4 * 8)[0], 8)
    uiollms.gradient_step(model, sample, estimator="exact")
    assert trimmed == [model.device] * times


# ---- several documents in one pass ---------------------------------------------------------------


def several_samples() -> list[Sample]:
    """Returns samples of every kind, of different lengths, with and without a teacher."""
    ids = [random_ids(n, seed=n) for n in (30, 19, 8, 8, 41, 26, 23)]
    questions = [(ids[1][:3], ids[1][3:6]), (ids[0][:2], ids[0][5:8])]
    return [
        Sample.language_modeling(ids[0], 8),
        Sample.document(ids[1], 8),
        Sample.copy(ids[2], 8),
        Sample.copy(ids[3], 8),
        Sample.questions(ids[4], questions, 8),
        Sample.document(ids[5], 8).distilled(0.5),
        Sample.memory_utilization(ids[6], ids[0][:5], 8),
    ]


@pytest.mark.parametrize("recent_tokens", [0, 3])
@pytest.mark.parametrize("chunk_batch", [1, 3, 64])
@pytest.mark.parametrize("name", ["exact", "tbptt", "uio", "importance"])
def test_several_documents_together_give_the_gradients_of_separate_passes(
    name, chunk_batch, recent_tokens
):
    """Gradients and results equal those of one sample after the other, with dropout and one rng for
    each sample."""
    changes = dict(lora_dropout=0.3, recent_tokens=recent_tokens)
    model = make_model(config=MEMORY.model_copy(update=changes))
    model.train()
    model.chunk_batch = chunk_batch
    samples = several_samples()
    options = dict(estimator=name, S=1, scale=0.5)
    separate = [
        uiollms.gradient_step(model, sample, rng=i, **options) for i, sample in enumerate(samples)
    ]
    expected = gradients(model)
    together = uiollms.gradient_step(model, samples, rng=list(range(len(samples))), **options)
    found = gradients(model)
    for key in expected:
        assert relative_error(found[key], expected[key]) < PROVEN, key
    for one, other in zip(together, separate, strict=True):
        assert one.reencoded == other.reencoded and torch.equal(one.scored, other.scored)
        assert torch.allclose(one.losses, other.losses, rtol=1e-10)
        assert torch.allclose(one.nll, other.nll, rtol=1e-10)


def test_several_documents_accept_separate_weights():
    model, samples = make_model(), several_samples()[:3]
    weights = [torch.rand(len(s.rows), len(s.chunks) + 1, dtype=torch.float64) for s in samples]
    for sample, sample_weights in zip(samples, weights, strict=True):
        uiollms.gradient_step(model, sample, sample_weights)
    expected = gradients(model)
    uiollms.gradient_step(model, samples, weights)
    found = gradients(model)
    assert all(relative_error(found[key], expected[key]) < PROVEN for key in expected)


def test_rows_of_joined_samples_read_their_documents_memories():
    a, b = Sample.document(random_ids(20), 8), Sample.copy(random_ids(8, seed=1), 8)
    both = Sample.joined([a, b])
    assert both.documents == (2, 1) and both.chunk_numbers == [0, 1, 0]
    assert torch.equal(both.chunks, torch.cat([a.chunks, b.chunks]))
    assert [list(row.memories) for row in both.rows] == [[], [0], [0, 1], [2]]


def test_the_graph_of_a_batch_is_gone_before_the_next_is_built(monkeypatch):
    """A name that holds a batch's loss would keep the nodes of its graph, and what they hold."""
    model, sample = make_model(), Sample.language_modeling(random_ids(8 * 6), 8)
    model.chunk_batch = 1
    nodes = []

    def decode(*arguments):
        assert all(node() is None for node in nodes)
        losses = decode_rows(*arguments)
        if losses[0].grad_fn is not None:
            nodes.append(weakref.ref(losses[0].grad_fn))
        return losses

    monkeypatch.setattr("uiollms.training.step.decode_rows", decode)
    uiollms.gradient_step(model, sample, estimator="exact")
    assert len(nodes) == 5
