"""The field `recent_tokens`: with w, the last w ids before a chunk are fed again before it, without
being scored.

All numbers are float64. ROUNDING and PROVEN are the tolerances between two computations with the
same rotary tables, TABLES where the library computes them in float32 and the oracle in float64.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import (
    MEMORY,
    SHAPE,
    gradients,
    make_base,
    make_model,
    random_ids,
    relative_error,
    worst_error,
)
from oracle import Oracle, Variant
from test_commands import call
from test_estimators import reservoir_outcomes
from test_step import PROVEN, expectation, plain_gradients, several_samples
from transformers.models.llama import modeling_llama

import uiollms
from uiollms import ConfigError, MemoryConfig, MemoryLM, Sample
from uiollms.build import check_env
from uiollms.cli.study import as_preset
from uiollms.config.load import load_env_config, parse
from uiollms.data import Document
from uiollms.data.builder import SampleBuilder
from uiollms.data.limits import check_sample
from uiollms.evaluation.attention_mass import attention_fractions
from uiollms.evaluation.scoring import score, token_losses
from uiollms.model.memory import Memory, compress, join
from uiollms.planning.planner import make_plan
from uiollms.training.estimators import window_from_draws

TABLES, ROUNDING = 1e-5, 1e-12
SIZES = [1, 3, 8]  # w; 8 is the whole chunk before
TRAIN = ["train.py", "--env_conf", "env.json"]


def config_of(recent: int, **changes) -> MemoryConfig:
    return MemoryConfig(**MEMORY.model_dump() | dict(recent_tokens=recent) | changes)


def model_of(recent: int, family: str = "llama", **changes) -> MemoryLM:
    return make_model(family, config=config_of(recent, **changes))


def oracle_of(model: MemoryLM, trained: dict | None = None) -> Oracle:
    weights = trained or model.memory_state_dict()
    return Oracle(Variant("llama"), SHAPE, model.base.state_dict(), weights, model.memory_config)


def stream_logits(model: MemoryLM, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Returns the logits [B, T, V] of ids [B, T], fed in several calls."""
    state, logits = None, []
    for piece in ids.split(pieces, dim=1):
        output = model(piece, state)
        state = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


# ---- rows, logits and gradients ---------------------------------------------------------------


@pytest.mark.parametrize("recent", SIZES)
def test_logits_and_gradients_equal_the_oracle(recent):
    """The oracle follows the definition position by position. Without recent tokens the logits are
    different."""
    model, ids = model_of(recent), random_ids(29)
    trained = {n: t.clone().requires_grad_() for n, t in model.memory_state_dict().items()}
    expected = oracle_of(model, trained).stream(ids)
    nll = torch.nn.functional.cross_entropy(expected[:-1], ids[1:], reduction="none")
    nll.mean().backward()
    with torch.no_grad():
        found = model(ids[None]).logits[0]
        assert relative_error(found, expected) < TABLES
        assert relative_error(score(model, ids, "document").nll, nll) < TABLES
        # The first chunk has no recent tokens, every other one has.
        plain = make_model()(ids[None]).logits[0]
        assert torch.equal(plain[:8], found[:8])
        assert all(relative_error(plain[t], found[t]) > 1e-3 for t in range(8, 29))
    uiollms.gradient_step(model, Sample.document(ids, 8), estimator="exact")
    expected = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in trained.items()}
    assert worst_error(gradients(model), expected) < 10 * TABLES


def test_rows_begin_with_the_recent_tokens():
    """The chunks are 0-3, 4-7 and 8 9, w is 3; in the paper's protocol and the document protocol."""
    ids = torch.arange(10)
    paper, document = (make(ids, 4) for make in (Sample.language_modeling, Sample.document))
    for sample, scored in ((paper, ([1, 2, 3], [5, 6, 7], [9])), (document, None)):
        rows = sample.with_recent(3).rows
        inputs = [[0, 1, 2, 3], [1, 2, 3, 4, 5, 6, 7], [5, 6, 7, 8, 9]]
        assert [row.input_ids.tolist() for row in rows] == inputs
        assert [row.recent for row in rows] == [0, 3, 3]
        targets = [row.targets[row.scored].tolist() for row in rows]
        assert targets == [*(scored or ([1, 2, 3, 4], [5, 6, 7, 8], [9]))]
        for row, before in zip(rows, sample.rows, strict=True):
            assert torch.equal(row.token_weights[row.scored], before.token_weights[before.scored])
            assert torch.equal(row.scored + row.start, before.scored + before.start)
        again = sample.with_recent(3).with_recent(3)
        assert [
            row.input_ids.tolist() for row in again.rows
        ] == inputs  # the second call adds nothing
        assert sample.with_recent(3).num_tokens == sample.num_tokens == 10
    assert document.with_recent(0).rows is document.rows
    copies = Sample.copy(ids, 4)
    assert copies.with_recent(3).rows == copies.rows


@torch.no_grad()
def test_questions_and_probes_follow_the_last_tokens_of_the_context():
    """They are read as a continuation of the text, after its last w tokens. The teacher reads the
    raw text."""
    model, ids = model_of(3), random_ids(16)
    oracle = oracle_of(model)
    slots = oracle.slots(ids.split(8))
    questions = [(random_ids(3, seed=s), random_ids(2, seed=9 + s)) for s in (1, 2)]
    rows = [torch.cat(pair) for pair in questions] + [random_ids(6, seed=3)]
    samples = Sample.questions(ids, questions, 8, 0.5), Sample.memory_utilization(ids, rows[2], 8)
    expected, divergences = [], []
    for row in rows:
        student = oracle.read(torch.cat([ids[-3:], row]), slots)[3:].log_softmax(-1)
        teacher = oracle.read(torch.cat([ids, row]))[16:].log_softmax(-1)
        start = 2 if len(row) == 5 else 0
        expected += [-student[i, row[i + 1]] for i in range(start, len(row) - 1)]
        kl = (teacher.exp() * (teacher - student)).sum(-1)
        divergences += [kl[i] for i in range(start, len(row) - 1)]
    expected, divergences = torch.stack(expected), torch.stack(divergences)
    parts = [token_losses(model, sample) for sample in samples]
    loss, nll = (torch.cat(column) for column in zip(*parts, strict=True))
    assert relative_error(nll, expected) < TABLES
    weights = torch.tensor([0.5] * 4 + [1.0] * 5)
    assert relative_error(loss, (1 - weights) * expected + weights * divergences) < TABLES


@torch.no_grad()
def test_controls_read_the_recent_tokens_of_the_document():
    """In no-memory mode (`window`), a row reads its w recent tokens and the chunk. In the mode
    shuffled, it reads another document's memories but its own document's tokens. In the mode raw,
    the base reads the text."""
    model, ids, other = model_of(3), random_ids(29), random_ids(24, seed=1)
    sample = Sample.document(ids, 8)

    def nll_of(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")

    alone = [model.base(ids[None, max(0, t - 3) : t + 8]).logits[0] for t in range(0, 29, 8)]
    window = torch.cat([logits[3 if t else 0 :] for t, logits in enumerate(alone)])
    assert relative_error(token_losses(model, sample, "window")[1], nll_of(window)) < ROUNDING
    raw = model.base(ids[None]).logits[0]
    assert relative_error(token_losses(model, sample, "raw")[1], nll_of(raw)) < ROUNDING
    shuffled = token_losses(model, sample, "shuffled", other.view(3, 8))[1]
    expected = nll_of(oracle_of(model).stream(ids, memories_of=other))
    assert relative_error(shuffled, expected) < TABLES
    assert torch.equal(score(model, ids, "document").positions, torch.arange(1, 29))


# ---- streams ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("recent", SIZES)
@pytest.mark.parametrize("pieces", [[1] * 27, [8, 8, 8, 3], [3, 13, 1, 10], [16, 11], [7, 2, 18]])
def test_any_split_of_calls_gives_the_same_logits(recent, pieces):
    model, ids = model_of(recent), random_ids(2, 27)
    assert relative_error(stream_logits(model, ids, pieces), model(ids).logits) < ROUNDING


@torch.no_grad()
def test_any_split_gives_the_same_logits_and_scores_in_every_family(family):
    model, ids = model_of(5, family), random_ids(2, 27)
    whole = model(ids).logits
    for pieces in ([1] * 27, [9, 7, 11]):
        assert relative_error(stream_logits(model, ids, pieces), whole) < ROUNDING
    rows = [score(model, row, "document").nll for row in ids]
    for nll, logits, row in zip(rows, whole, ids, strict=True):
        expected = torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none")
        assert relative_error(nll, expected) < ROUNDING


@torch.no_grad()
def test_a_sliding_window_counts_recent_tokens_as_tokens_of_the_chunk():
    """Mistral has a sliding window of 8 tokens, chunks have 8 tokens, and w is 5. The logits of
    several splits and the scores are compared with the oracle."""
    model = MemoryLM(make_base("mistral", sliding_window=8), config_of(5))
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = random_ids(1, 27)
    whole = model(ids).logits
    variant = Variant("mistral", {"sliding_window": 8}, windows=(8, 8, 8))
    shape = SHAPE | variant.config
    weights = model.base.state_dict()
    oracle = Oracle(variant, shape, weights, model.memory_state_dict(), model.memory_config)
    assert relative_error(whole[0], oracle.stream(ids[0])) < TABLES
    assert relative_error(stream_logits(model, ids, [1] * 27), whole) < ROUNDING
    expected = torch.nn.functional.cross_entropy(whole[0, :-1], ids[0, 1:], reduction="none")
    assert relative_error(score(model, ids, "document").nll, expected) < ROUNDING


@torch.no_grad()
def test_a_call_does_not_change_a_state_with_recent_tokens():
    """Several texts continue one state, before and after a chunk boundary, with rows in another
    order."""
    model, ids = model_of(3), random_ids(2, 30)
    for num_read in (8, 11, 16):
        state = model(ids[:, :num_read]).past_key_values
        assert torch.equal(state.recent_ids, ids[:, num_read // 8 * 8 - 3 : num_read // 8 * 8])
        for seed in (1, 2):
            more = random_ids(2, 7, seed=seed)
            expected = model(torch.cat([ids[:, :num_read], more], 1)).logits[:, num_read:]
            for rows in ([0, 1], [1, 0], [1, 1]):
                selected = state.select(torch.tensor(rows))
                found = []
                for i in range(7):
                    output = model(more[rows, i : i + 1], selected)
                    selected = output.past_key_values
                    found.append(output.logits)
                assert relative_error(torch.cat(found, 1), expected[rows]) < ROUNDING
    fresh = model(ids[:, :5]).past_key_values
    assert fresh.recent_ids.shape == (2, 0)  # the first chunk has none


@torch.no_grad()
def test_logits_to_keep_decodes_the_last_chunk_only():
    model, ids = model_of(3), random_ids(1, 27)
    decoded = []
    norm = model.base.model.norm
    handle = norm.register_forward_hook(lambda m, args, out: decoded.append(args[0].shape[1]))
    last = model(ids, logits_to_keep=1)
    handle.remove()
    assert decoded == [3 + 3]  # the open chunk and the recent tokens before it
    assert relative_error(last.logits, model(ids).logits[:, -1:]) < ROUNDING


@torch.no_grad()
def test_generation_continues_across_chunk_boundaries(family):
    model, ids = model_of(3, family), random_ids(2, 13)
    found = model.generate(ids, do_sample=False, max_new_tokens=14, eos_token_id=None)
    expected = ids
    for _ in range(14):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)
    beams = model.generate(ids, num_beams=3, do_sample=False, max_new_tokens=9, eos_token_id=None)
    assert beams.shape == (2, 22)
    state = model(ids[:, :8]).past_key_values  # at a boundary
    options = dict(do_sample=False, max_new_tokens=14, eos_token_id=None)
    again = model.generate(ids[:, 8:], state=state, **options)
    assert torch.equal(again[:, 5:], expected[:, 13:])
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids[:1, :9]], 1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 9)], 1).long()
    both = model.generate(
        torch.cat([ids[1:], padded]),
        attention_mask=torch.cat([torch.ones(1, 13).long(), mask]),
        **options,
    )
    assert torch.equal(both[0], expected[1])
    alone = model.generate(ids[:1, :9], **options)
    assert torch.equal(both[1, 13:], alone[0, 9:])


def test_the_gradients_of_a_step_equal_those_of_forward(family):
    """forward builds one graph over all chunks. Gradients pass between rows through memories only."""
    model, ids = model_of(5, family), random_ids(1, 29)
    model(ids, labels=ids).loss.backward()
    plain = gradients(model)
    for model.chunk_batch in (1, 2, 8):
        result = uiollms.gradient_step(model, Sample.document(ids, 8), estimator="exact")
        assert worst_error(gradients(model), plain) < PROVEN
        assert result.scored.tolist() == [8, 8, 8, 4]


# ---- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk_batch", [1, 3])
def test_the_step_equals_autograd_for_any_weights(chunk_batch, checkpointing):
    model = model_of(3, lora_dropout=0.3)
    model.chunk_batch, model.checkpointing = chunk_batch, checkpointing
    model.eval()
    for sample in several_samples():
        weights = torch.rand(len(sample.rows), len(sample.chunks) + 1, dtype=torch.float64)
        uiollms.gradient_step(model, sample, weights=weights)
        found = gradients(model)
        expected = plain_gradients(model, sample.with_recent(3), weights)
        assert worst_error(found, expected) < PROVEN


@pytest.mark.parametrize("name", ["exact", "tbptt", "uio", "importance"])
def test_a_step_on_several_documents_sums_their_gradients(name):
    model, samples = model_of(3, lora_dropout=0.3), several_samples()
    model.train()
    options = dict(estimator=name, S=1, scale=0.5)
    alone = [uiollms.gradient_step(model, s, rng=i, **options) for i, s in enumerate(samples)]
    expected = gradients(model)
    seeds = list(range(len(samples)))
    together = uiollms.gradient_step(model, samples, rng=seeds, **options)
    assert worst_error(gradients(model), expected) < PROVEN
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.losses, other.losses, rtol=1e-10)
        assert torch.equal(one.scored, other.scored) and one.reencoded == other.reencoded


def test_expected_uio_weights_are_one():
    model, sample = model_of(3), Sample.document(random_ids(30), 8)
    uiollms.gradient_step(model, sample, estimator="exact")
    exact = gradients(model)
    outcomes = [(window_from_draws(d, 1, True, 4), p) for d, p in reservoir_outcomes(4, 1)]
    assert worst_error(expectation(model, sample, outcomes), exact) < PROVEN


def test_memory_read_in_place_equals_joined_memory(monkeypatch):
    """The memory is read in place, or copied before the keys and values of every row."""
    found = []
    for in_place in (True, False):
        monkeypatch.setattr(
            "uiollms.training.step.supports_in_place", lambda base, in_place=in_place: in_place
        )
        monkeypatch.setattr(
            "uiollms.evaluation.scoring.supports_in_place", lambda base, in_place=in_place: in_place
        )
        model, sample = model_of(5), Sample.document(random_ids(45), 8)
        with torch.no_grad():
            losses = token_losses(model, sample)[1]
        uiollms.gradient_step(model, sample, estimator="uio", S=1, rng=0)
        found.append(gradients(model) | {"nll": losses})
    assert worst_error(*found) < PROVEN


@torch.no_grad()
def test_attention_fractions_leave_out_queries_of_recent_tokens(monkeypatch):
    """They are compared with the attention weights. Recent tokens count as keys, not as queries."""
    model, ids, recorded = model_of(3), random_ids(29), []
    eager = modeling_llama.eager_attention_forward

    def recording(*args, **kwargs):
        output, weights = eager(*args, **kwargs)
        recorded.append(weights[0])
        return output, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", recording)
    fractions = attention_fractions(model, ids)
    assert torch.allclose(fractions.sum(-1), torch.ones(3, 3))
    for t, length in ((1, 8), (2, 8), (3, 5)):
        for layer in range(3):
            weights = recorded[3 * (t - 1) + layer]  # [H, queries, keys]
            assert weights.shape[1:] == (3 + length, 2 * t + 3 + length)
            local = weights[:, 3:, 2 * t :].sum(-1).mean().float()
            assert abs(fractions[layer, t - 1, 0] - local) < 1e-6


# ---- the capacity -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_memory, chunk_size, recent, positions",
    [(32, 1024, 64, 4096), (2, 8, 0, 64), (2, 8, 3, 64), (2, 8, 8, 64), (8, 8, 8, 24)]
    + [(2, 8, 8, 16), (4, 8, 5, 13), (4, 8, 5, 8), (1, 4, 2, 9), (4, 4, 4, 12)],
)
def test_capacity_follows_the_formula_and_the_definition(num_memory, chunk_size, recent, positions):
    """The capacity is one less than the first length at which a row needs more positions."""
    sizes = dict(num_memory=num_memory, chunk_size=chunk_size, recent_tokens=recent)
    memory = MemoryConfig(**sizes, lora_rank=1, lora_alpha=1)
    n = 1 + max(0, (positions - recent - chunk_size) // num_memory)
    rest = max(0, min(chunk_size - 1, positions - recent - n * num_memory))
    assert memory.capacity(positions) == n * chunk_size + rest

    def fits(length: int) -> bool:
        count = -(-length // chunk_size)
        rows = [(t, min(chunk_size, length - t * chunk_size)) for t in range(count)]
        return all(t * num_memory + (t > 0) * recent + r <= positions for t, r in rows)

    assert fits(memory.capacity(positions)) and not fits(memory.capacity(positions) + 1)


def test_longer_texts_than_the_capacity_raise_an_error():
    """With 64 positions, 2 slots, chunks of 8 and w 3, 27 full chunks fit (26 * 2 + 3 + 8 = 63), and
    then 64 - 57 = 7 tokens."""
    model = model_of(3)
    assert model.capacity == 27 * 8 + 7 == 223
    ids = random_ids(1, 223)
    with torch.no_grad():
        whole = model(ids, logits_to_keep=9)
        state = model(ids[:, :214], logits_to_keep=1).past_key_values
        logits = logits_token_by_token(model, state, ids[:, 214:])
        assert relative_error(logits, whole.logits) < ROUNDING
        message = (
            "224 tokens, the capacity is 223: .* num_memory 2 and recent_tokens 3 allow 27 full"
        )
        with pytest.raises(ValueError, match=message):
            model(random_ids(1, 1), whole.past_key_values)
    with pytest.raises(ValueError, match="prompt and new tokens come to 224"):
        model.generate(ids, max_new_tokens=2)
    uiollms.gradient_step(model, Sample.document(ids, 8), estimator="exact")
    with pytest.raises(ValueError, match=message):
        uiollms.gradient_step(model, Sample.document(random_ids(224), 8))


def logits_token_by_token(model: MemoryLM, state, ids: torch.Tensor) -> torch.Tensor:
    logits = []
    for i in range(ids.shape[1]):
        output = model(ids[:, i : i + 1], state)
        state = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


def test_recent_tokens_before_questions_count_as_positions():
    """There are 64 positions. A copy of 28 chunks needs 28 * 2 + 8 = 64 of them, and so does a
    question of 7 tokens after 27 memories and 3 recent tokens."""
    model, ids = model_of(3), random_ids(232)
    check_sample(model.limits, Sample.copy(ids[:224], 8))
    check_sample(model.limits, Sample.questions(ids[:216], [(ids[:2], ids[2:7])], 8))
    message = r"28 memories .* and the 9 tokens \(3 of them recent_tokens\) that read them need 65"
    with pytest.raises(ValueError, match=message):
        check_sample(model.limits, Sample.questions(ids[:224], [(ids[:2], ids[2:6])], 8))
    with pytest.raises(ValueError, match="29 memories .* and the 8 tokens that read them need 66"):
        check_sample(model.limits, Sample.copy(ids, 8))


def test_recent_tokens_reduce_the_length_that_documents_are_cut_to(monkeypatch):
    """There are 64 positions and 8 slots for each chunk of 8 tokens. With w 8, a probe of 8 tokens
    follows 6 chunks, and a copy follows 7. Without recent tokens, a probe follows 7."""
    monkeypatch.setattr("uiollms.data.builder.tokenize", lambda tokenizer, text: random_ids(80))
    cases = (8, "memory utilization", 6), (8, "longdata copy", 7), (0, "memory utilization", 7)
    for recent, task, chunks in cases:
        builder = SampleBuilder(model_of(recent, num_memory=8), tokenizer=None)
        sample = builder.make(Document("", "book", task=task), None, random.Random(0))
        assert len(sample.chunks) == chunks


def test_longropes_short_texts_must_be_as_long_as_a_chunk_and_its_recent_tokens():
    """A row without memory is rotated as a short text, whatever the other rows are."""
    half = SHAPE["hidden_size"] // SHAPE["num_attention_heads"] // 2
    rope = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * half)
    rope |= dict(long_factor=[2.0] * half, original_max_position_embeddings=12, factor=4.0)
    base = make_base(rope_parameters=rope)
    MemoryLM(base, config_of(4))
    message = "recent_tokens 5 would need both; use chunks of at most 12 .* both together"
    with pytest.raises(ValueError, match=message):
        MemoryLM(base, config_of(5))


# ---- files ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("recent", SIZES)
def test_loaded_and_joined_memories_continue_as_the_text_does(tmp_path, recent):
    """The texts end with a full or an open chunk. Joined, all full chunks come first and then the
    remaining tokens."""
    model, ids, more = model_of(recent), random_ids(1, 40), random_ids(1, 11, seed=1)
    for length in (16, 21):
        compress(model, ids[:, :length], "text").save(tmp_path / "text.mem")
        state = Memory.load(tmp_path / "text.mem", model).state(model)
        expected = model(torch.cat([ids[:, :length], more], 1)).logits[:, length:]
        assert relative_error(model(more, state).logits, expected) < PROVEN
        options = dict(do_sample=False, max_new_tokens=9, eos_token_id=None)
        answer = model.generate(more, state=state, **options)
        whole = model.generate(torch.cat([ids[:, :length], more], 1), **options)
        assert torch.equal(answer[:, 11:], whole[:, length + 11 :])
    for first, second in ((16, 16), (19, 21), (16, 5), (3, 18)):
        parts = ids[:, :first], ids[:, first : first + second]
        joined = join([compress(model, part, "part") for part in parts])
        joined.save(tmp_path / "both.mem")
        state = Memory.load(tmp_path / "both.mem", model).state(model)
        order = [part[:, : part.shape[1] // 8 * 8] for part in parts]
        order += [part[:, part.shape[1] // 8 * 8 :] for part in parts]
        expected = model(torch.cat([*order, more], 1)).logits[:, first + second :]
        assert relative_error(model(more, state).logits, expected) < PROVEN


def test_a_memory_with_another_w_or_without_its_text_raises_an_error(tmp_path):
    model = model_of(3)
    memory = compress(model, random_ids(1, 19), "text")
    memory.save(tmp_path / "text.mem")
    with pytest.raises(ConfigError, match="compressor"):
        Memory.load(tmp_path / "text.mem", make_model())
    bare = Memory(memory.slots, memory.open_ids, memory.sources, memory.made_by)
    with pytest.raises(ConfigError, match="holds no chunk_ids, whose last 3 are fed again"):
        bare.state(model)


def test_invalid_values_of_recent_tokens_raise_an_error():
    base = dict(num_memory=2, chunk_size=8, lora_rank=1, lora_alpha=1)
    for value, message in (
        (9, "m.json: recent_tokens 9 must be at most chunk_size 8"),
        (-1, "m.json: recent_tokens: Input should be greater than or equal to 0, found -1"),
        (2.5, "m.json: recent_tokens: Input should be a valid integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(MemoryConfig, base | dict(recent_tokens=value), "m.json")
    with pytest.raises(ConfigError) as error:
        parse(MemoryConfig, base | dict(num_memory=3, recent_tokens=9), "m.json")
    assert len(str(error.value).splitlines()) == 2
    assert parse(MemoryConfig, base | dict(recent_tokens=8), "m.json").recent_tokens == 8


def test_a_stage_with_chunks_shorter_than_w_raises_an_error(workspace):
    memory = json.loads(Path("memory.json").read_text())
    Path("memory.json").write_text(json.dumps(memory | dict(recent_tokens=9)))
    stages = [[[16, 2], [8, 2]], [[9, 3]]]
    stages = json.dumps([dict(share=0.5, sizes=sizes) for sizes in stages])
    config = load_env_config("env.json", [f"train.stages={stages}"])
    with pytest.raises(ConfigError) as error:
        check_env(config, "env.json")
    message = "chunk_size 8 is less than the compressor's recent_tokens 9; use at least that"
    assert str(error.value) == f"env.json: train.stages[0].sizes[1]: {message}"


def test_a_preset_of_a_study_limits_recent_tokens_to_its_chunk_size():
    model = model_of(8)
    with as_preset(model, dict(chunk_size=4, num_memory=2)):
        assert model.memory_config == config_of(4, chunk_size=4)
    assert model.memory_config.recent_tokens == 8


def test_a_run_with_recent_tokens(workspace, capsys):
    """It trains, resumes, evaluates in every mode and plans. It cannot resume, and its weights
    cannot be loaded, without recent tokens."""
    memory = json.loads(Path("memory.json").read_text())
    Path("memory.json").write_text(json.dumps(memory | dict(recent_tokens=6)))
    assert call(*TRAIN) == 0
    assert call(*TRAIN, "--resume", "--set=train.train_iters=4") == 0
    tasks = [
        dict(task_type="perplexity", compare=["window", "raw", "shuffled"], truncation=100),
        dict(task_type="longdata copy", truncation=64),
        dict(task_type="auto encoding", truncation=64),
        dict(task_type="memory utilization", truncation=64),
        dict(task_type="passkey", truncation=300),
    ]
    common = dict(task_name="files:book*.txt", num_instance=2)
    Path("test.json").write_text(json.dumps(dict(tasks=[common | task for task in tasks])))
    assert call("test.py", "--env_conf", "env.json") == 0
    plan = make_plan(load_env_config("env.json"), "env.json")
    (need,) = plan.need.values()
    capsys.readouterr()
    assert call(*TRAIN, "--dry_run", "--set=train.corpus.0.truncation=1000") == 2
    # 128 positions: 54 full chunks (53 * 2 + 6 + 16 = 128), then 128 - 6 - 108 = 14 tokens
    message = "past the capacity 878 (chunk_size 16, num_memory 2, recent_tokens 6, 128"
    assert message in capsys.readouterr().err
    Path("memory.json").write_text(json.dumps(memory))
    less = make_plan(load_env_config("env.json"), "env.json")
    assert plan.flops > less.flops and plan.capacity == 878 < less.capacity
    assert need.activations > next(iter(less.need.values())).activations
    assert call(*TRAIN, "--resume", "--set=train.train_iters=5") == 2
    assert "compressor.recent_tokens: 6 -> 0" in capsys.readouterr().err
    assert call("test.py", "--env_conf", "env.json") == 2
    assert "recent_tokens 6, the config has 0" in capsys.readouterr().err
