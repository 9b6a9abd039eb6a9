"""Every family and variant against an oracle: the base, raw texts, and memory.

All numbers are float64. TABLES is the tolerance where the library computes rotary tables in float32
and the oracle in float64. For angles of some 60 radians the tables differ by up to 60 * 2^-24 =
4e-6, and logits by as much (7e-6 of their standard deviation were measured). A wrong factor,
sliding window or mask changes them by more than 300 times the tolerance
(`test_the_oracle_distinguishes_variants`). TOLERANCE is used where both sides have the same tables
and only the order of sums differs.
"""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, gradients, random_ids, relative_error, worst_error
from oracle import Oracle, Variant
from test_commands import call
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import uiollms
from uiollms import MemoryConfig, MemoryLM, Sample
from uiollms.build import load_memory_lm
from uiollms.config.load import load_env_config
from uiollms.evaluation.scoring import score, token_losses
from uiollms.model.rope import find_rope_fault, num_positions
from uiollms.planning.planner import make_plan
from uiollms.training.step import empty_prefix, teacher_hidden
from uiollms.weights.fitness import window_fault

TABLES, TOLERANCE = 2e-5, 1e-11
MEMORY = MemoryConfig(num_memory=2, chunk_size=8, lora_rank=3, lora_alpha=6)


def rope(kind: str, **parameters) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0) | parameters)


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = dict(short_factor=[1.0, 1.1, 1.3, 1.4], long_factor=[1.0, 2.0, 4.0, 8.0])
ORIGINAL = "original_max_position_embeddings"
SLIDING = dict(use_sliding_window=True, sliding_window=8)
MIXED = ["full_attention", "sliding_attention", "full_attention"]

VARIANTS = {
    "plain": Variant("llama"),
    "tied, heads of 6": Variant(
        "llama",
        dict(
            hidden_size=36,
            num_attention_heads=6,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
    ),
    "theta": Variant("llama", rope("default", rope_theta=500.0) | dict(rms_norm_eps=1e-2)),
    "llama3": Variant("llama", rope("llama3", **LLAMA3, original_max_position_embeddings=16)),
    "linear": Variant("llama", rope("linear", factor=4.0)),
    "dynamic": Variant("llama", rope("dynamic", factor=4.0)),
    "yarn": Variant("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "yarn, as Qwen's model cards enable it": Variant(
        "qwen2",
        rope("yarn", factor=4.0, original_max_position_embeddings=64),
        positions=256,
    ),
    "yarn, more positions than the first training": Variant(
        "qwen3",
        rope("yarn", factor=4.0, original_max_position_embeddings=32)
        | dict(max_position_embeddings=40, head_dim=16),
        positions=128,
    ),
    "yarn, all options": Variant(
        "llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=4,
            beta_slow=0.5,
            mscale=1.4,
            mscale_all_dim=0.7,
            truncate=False,
        ),
    ),
    "yarn, attention factor": Variant(
        "mistral",
        rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.3)
        | dict(sliding_window=None),
    ),
    "longrope": Variant(
        "llama",
        rope("longrope", **LONG, factor=4.0, original_max_position_embeddings=16),
        num_short=16,
    ),
    "longrope, a ratio of positions": Variant(
        "llama",
        rope("longrope", **LONG) | {ORIGINAL: 24},
        num_short=24,
    ),
    "longrope, unchanged max_position_embeddings": Variant(
        "qwen2",
        rope("longrope", **LONG, factor=2.0, attention_factor=1.2) | {ORIGINAL: 64},
        positions=128,
        num_short=64,
    ),
    "longrope with sliding windows": Variant(
        "mistral",
        rope("longrope", **LONG, original_max_position_embeddings=16) | dict(sliding_window=12),
        windows=(12, 12, 12),
        num_short=16,
    ),
    "biases": Variant("llama", dict(attention_bias=True, mlp_bias=True)),
    "head_dim": Variant("llama", dict(head_dim=12)),
    "dropout": Variant("llama", dict(attention_dropout=0.5)),
    "several EOS": Variant("llama", dict(eos_token_id=[5, 2])),
    "MHA": Variant("llama", dict(num_key_value_heads=4)),
    "one key/value head": Variant("llama", dict(num_key_value_heads=1)),
    "mistral, all layers have a sliding window": Variant("mistral", dict(sliding_window=8), windows=(8, 8, 8)),
    "mistral without sliding windows": Variant("mistral", dict(sliding_window=None)),
    "mistral, head_dim": Variant("mistral", dict(sliding_window=10, head_dim=6), (10, 10, 10)),
    "qwen2": Variant("qwen2"),
    "qwen2, an unused sliding window": Variant("qwen2", dict(use_sliding_window=False, sliding_window=4)),
    "qwen2, the last layers have a sliding window": Variant(
        "qwen2",
        SLIDING | dict(max_window_layers=1, attention_dropout=0.3),
        windows=(None, 8, 8),
    ),
    "qwen2, layers by name": Variant("qwen2", SLIDING | dict(layer_types=MIXED), (None, 8, None)),
    "qwen3": Variant("qwen3", dict(head_dim=16)),
    "qwen3, biases and sliding windows": Variant(
        "qwen3",
        SLIDING | dict(head_dim=8, attention_bias=True, layer_types=MIXED[1:] + MIXED[1:2]),
        windows=(8, None, 8),
    ),
}  # fmt: skip


def make_config(variant: Variant):
    """Returns the transformers config of a variant."""
    config = {**SHAPE, **copy.deepcopy(variant.config)}
    return AutoConfig.for_model(variant.family, **config)


@cache
def models_of(name: str) -> tuple[MemoryLM, AutoModelForCausalLM, Oracle]:
    """Returns a random model with memory, an unchanged copy of its base, and the oracle of both.
    Biases, norms and trained parameters are far from their initial values."""
    torch.manual_seed(0)
    variant = VARIANTS[name]
    base = AutoModelForCausalLM.from_config(make_config(variant)).double().eval()
    for key, parameter in base.named_parameters():
        mean = float("norm" in key)
        torch.nn.init.normal_(parameter, mean, 0.3 if parameter.dim() == 1 else 0.2)
    model = MemoryLM(copy.deepcopy(base), MEMORY)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    shape = SHAPE | variant.config
    return model, base, Oracle(variant, shape, base.state_dict(), model.memory_state_dict(), MEMORY)


@pytest.fixture(params=VARIANTS)
def name(request) -> str:
    return request.param


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference divided by the standard deviation of the expected values."""
    return ((found - expected).abs().max() / expected.std()).item()


def nll_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


# Tokens of raw texts: more than every sliding window, and more than what longrope counts as short
# except in one variant.
LONGEST = 40
# Tokens that end as 12 slots and 5 tokens: more than the 16 positions that longrope counts as short.
LONG_STREAM = 53


# ---- the base ---------------------------------------------------------------------------------


@torch.no_grad()
def test_the_base_equals_the_oracle(name):
    _, base, oracle = models_of(name)
    for length in (1, 8, 17, LONGEST):
        ids = random_ids(length)
        # The norms of transformers compute in float32, with errors as large as those of its tables.
        assert error(base(ids[None]).logits[0], oracle.read(ids)) < TABLES


@torch.no_grad()
def test_raw_mode_no_memory_mode_and_teacher_equal_the_base(name):
    """The model is in training mode, in which a base alone would use attention dropout. Tables and
    norms (`promote_norms`) are the same on both sides."""
    model, _, oracle = models_of(name)
    model.train()
    ids = random_ids(LONGEST)
    whole = model.base(ids[None]).logits[0]
    alone = torch.cat([model.base(chunk[None]).logits[0] for chunk in ids.split(8)])
    for mode, logits in (("raw", whole), ("window", alone)):
        found = score(model, ids, "document", mode)
        nll = nll_of(logits, ids)
        assert relative_error(found.nll, nll) < TOLERANCE, mode
        sample = Sample.language_modeling(ids, 8)
        expected = nll[score(model, ids, "paper", mode).positions - 1]
        assert relative_error(token_losses(model, sample, mode)[1], expected) < TOLERANCE, mode
    sample = Sample.document(ids, 8).distilled(1.0)
    (teacher,) = teacher_hidden(model, sample)
    assert relative_error(model.logits(teacher), whole) < TOLERANCE
    student = model(ids[None]).logits[0].log_softmax(-1)[:-1]
    log_p = whole.log_softmax(-1)[:-1]
    kl = (log_p.exp() * (log_p - student)).sum(-1)
    assert relative_error(token_losses(model, sample)[0], kl) < TOLERANCE
    assert error(model.logits(teacher), oracle.read(ids)) < TABLES


@torch.no_grad()
def test_decoding_without_memory_equals_the_base_in_batches_and_in_parts(name):
    """The rows are decoded in one batch, and then in two parts, of which the second reads the keys
    and values of the first. With longrope, both parts use the same factors."""
    model, _, _ = models_of(name)
    ids = torch.stack([random_ids(LONGEST, seed=s) for s in range(2)])
    whole = model.base.model(ids).last_hidden_state
    assert relative_error(model.decode(ids, empty_prefix(model), [0, 0]), whole) < TOLERANCE
    cut = 27 if VARIANTS[name].num_short != 64 else 33
    prefix = replace(empty_prefix(model), num_local=cut)
    first = model.decode(ids[:, :cut], prefix, [0, 0])
    keys, values = ([[part[i]] for _, part in sorted(prefix.local.items())] for i in (0, 1))
    rest = model.decode(ids[:, cut:], replace(prefix, keys=keys, values=values), [0, 0], cut)
    assert relative_error(torch.cat([first, rest], dim=1), whole) < TOLERANCE


# ---- memory -----------------------------------------------------------------------------------


@torch.no_grad()
def test_streams_and_scores_equal_the_oracle(name):
    """Streams are split into calls in several ways. Scores are computed with several values of
    chunk_batch."""
    model, _, oracle = models_of(name)
    model.eval()
    ids = random_ids(LONG_STREAM)
    expected = oracle.stream(ids)
    memories = oracle.slots(ids.split(8)[:-1])
    for pieces in ([53], [1] * 53, [8] * 6 + [5], [3, 9, 1, 27, 13]):
        state, parts = None, []
        for piece in ids[None].split(pieces, dim=1):
            output = model(piece, state)
            state = output.past_key_values
            parts.append(output.logits[0])
        assert error(torch.cat(parts), expected) < TABLES, pieces
        for i, (keys, values) in enumerate(memories):
            assert error(state.memory_keys[i][0].transpose(0, 1), keys) < TABLES
            assert error(state.memory_values[i][0].transpose(0, 1), values) < TABLES
    for model.chunk_batch in (1, 2, 3, 16):
        found = score(model, ids, "document")
        assert error(found.nll, nll_of(expected, ids)) < TABLES, model.chunk_batch
    model.chunk_batch = 4


@torch.no_grad()
def test_batches_reconstruction_and_generation_equal_the_oracle(name):
    """Two documents are read in one batch, a chunk is reconstructed from its memory, and greedy
    tokens are generated across chunk boundaries."""
    model, _, oracle = models_of(name)
    model.eval()
    pair = torch.stack([random_ids(20, seed=s) for s in range(2)])
    logits = model(pair).logits
    for ids, found in zip(pair, logits, strict=True):
        assert error(found, oracle.stream(ids)) < TABLES
    chunk = random_ids(8)
    weights = dict(oracle.weights)
    table = weights["model.embed_tokens.weight"]
    row = torch.cat([torch.tensor([len(table)]), chunk[:-1]])
    repeat = oracle.trained["decoder.repeat_token"].view(1, -1)
    weights["model.embed_tokens.weight"] = torch.cat([table, repeat])
    copying = copy.copy(oracle)
    copying.weights = weights | {"lm_head.weight": weights.get("lm_head.weight", table)}
    expected = copying.read(row, oracle.slots([chunk]))
    assert error(model.reconstruct(chunk[None])[0], expected) < TABLES
    ids = random_ids(13)
    answer = model.generate(ids[None], max_new_tokens=9, do_sample=False, eos_token_id=None)[0]
    for i in range(13, 22):
        assert int(model(answer[None, :i]).logits[0, -1].argmax()) == int(answer[i])


def test_gradients_do_not_depend_on_batches(name):
    """The gradients of the two-pass step equal those of autograd for every chunk_batch. With a
    teacher they do not depend on chunk_batch either."""
    model, _, _ = models_of(name)
    model.eval()
    ids = random_ids(LONG_STREAM)
    loss = model(ids[None], labels=ids[None]).loss
    loss.backward()
    expected = gradients(model)
    sample = Sample.document(ids, 8)
    for model.chunk_batch in (1, 3):
        result = uiollms.gradient_step(model, sample, estimator="exact")
        assert (
            relative_error(result.losses.sum(), loss.detach()) < 1e-6
        )  # losses are reported in float32
        assert worst_error(gradients(model), expected) < 1e-9
    distilled = []
    for model.chunk_batch in (1, 4):
        uiollms.gradient_step(model, sample.distilled(0.5), estimator="exact")
        distilled.append(gradients(model))
    assert worst_error(*distilled) < 1e-9


@torch.no_grad()
def test_a_call_does_not_change_the_results_of_later_calls(name):
    """The base reads a text that is longer than its positions. With dynamic and longrope,
    transformers then stores other frequencies for the calls that follow."""
    model, _, _ = models_of(name)
    model.eval()
    ids = random_ids(model.config.max_position_embeddings)

    def results() -> list[torch.Tensor]:
        modes = [score(model, ids, "document", mode).nll for mode in ("memory", "window", "raw")]
        return [*modes, model(ids[None]).logits, model.encode(ids[None, :8])]

    first = results()
    model.base(random_ids(1, 2 * model.limits.positions))
    buffers = {key: buffer.clone() for key, buffer in model.base.named_buffers()}
    assert all(torch.equal(a, b) for a, b in zip(results(), first, strict=True))
    assert all(torch.equal(buffers[key], buffer) for key, buffer in model.base.named_buffers())
    model.base(random_ids(1, 3))  # a short text restores the short frequencies


# ---- the sensitivity of the oracle ------------------------------------------------------------


def without(fields: dict, name: str) -> dict:
    return {key: value for key, value in fields.items() if key != name}


CHANGES = {
    "windows": lambda v: replace(v, windows=(None, None, None)),
    "rope": lambda v: replace(v, config=without(v.config, "rope_parameters")),
}


CHANGED = [(n, w) for n, v in VARIANTS.items() for w, change in CHANGES.items() if change(v) != v]


@pytest.mark.parametrize("name, what", [case for case in CHANGED if case != ("dynamic", "rope")])
@torch.no_grad()
def test_the_oracle_distinguishes_variants(name, what):
    """Without its sliding windows, or with the default RoPE, the oracle of a variant gives quite
    different logits. dynamic is left out, because it equals the default within its positions."""
    _, _, oracle = models_of(name)
    changed = CHANGES[what](oracle.variant)
    other = Oracle(changed, SHAPE | changed.config, oracle.weights)
    ids = random_ids(LONGEST)
    assert error(other.read(ids), oracle.read(ids)) > 300 * TABLES


# ---- the number of positions, and invalid configs ------------------------------------------------


def test_capacity_follows_from_the_positions_of_the_model_card(name):
    model, _, _ = models_of(name)
    positions = VARIANTS[name].positions
    assert num_positions(model.base.config) == positions
    full = (positions - 8) // 2 + 1
    assert model.capacity == full * 8 + max(0, min(7, positions - full * 2))
    model.check_length(model.capacity)
    with pytest.raises(ValueError) as error:
        model.check_length(model.capacity + 1)
    assert f"the capacity is {model.capacity}: " in str(error.value)
    if positions == model.base.config.max_position_embeddings:
        assert f"max_position_embeddings {positions}, chunk_size 8" in str(error.value)
    else:
        parameters = model.base.config.rope_parameters
        product = (
            f"factor {parameters['factor']:g} * {ORIGINAL} {parameters[ORIGINAL]}), chunk_size 8"
        )
        assert f"{positions} positions ({parameters['rope_type']}: {product}" in str(error.value)
    raw = Sample.document(random_ids(positions), 8)
    assert len(token_losses(model, raw, "raw")[1]) == positions - 1
    raw = Sample.document(random_ids(positions + 1), 8)
    with pytest.raises(ValueError, match=f"{positions + 1} tokens, the base has {positions} pos"):
        token_losses(model, raw, "raw")


def test_variants_cover_all_families():
    assert len(VARIANTS) >= 17 and {v.family for v in VARIANTS.values()} == {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
    }


INVALID = {
    "another scheme": (
        "llama",
        rope("proportional", factor=2.0),
        "rope_type 'proportional' in rope_parameters; supported are default, linear, llama3, yarn,",
    ),
    "a scheme by kind of layer": (
        "qwen2",
        dict(rope_parameters={"full_attention": dict(rope_type="default", rope_theta=1e4)}),
        "no rope_type for all layers in rope_parameters; supported are default,",
    ),
    "no factor": (
        "llama",
        rope("yarn", factor=-4.0, original_max_position_embeddings=16),
        "factor -4.0 in rope_parameters must be more than 0; correct config.json",
    ),
    "no number": (
        "llama",
        rope("linear", factor="4"),
        "factor '4' in rope_parameters must be more than 0; correct config.json",
    ),
    "too few factors": (
        "llama",
        rope("longrope", **LONG | dict(long_factor=[1.0, 2.0])) | {ORIGINAL: 16},
        "long_factor in rope_parameters must be 4 numbers > 0; correct config.json",
    ),
    "a chunk with both sets of factors": (
        "llama",
        rope("longrope", **LONG, original_max_position_embeddings=7),
        "chunk_size 8 would need both; use chunks of at most 7 tokens",
    ),
    "a sliding window without width": (
        "qwen2",
        dict(layer_types=MIXED),
        "layer_types contains sliding_attention, but no window is set; set use_sliding_window and",
    ),
    "another kind of layer": (
        "qwen3",
        dict(layer_types=["full_attention", "chunked_attention", "full_attention"]),
        "layer_types contains 'chunked_attention'; allowed are full_attention and sliding_attention;",
    ),
    "a narrow sliding window": (
        "qwen2",
        SLIDING | dict(layer_types=MIXED, sliding_window=7),
        "the base attends to 7 tokens (sliding_window), fewer than chunk_size 8;",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_config_is_an_error_of_one_line(case):
    """The fault is found in the config alone, and making a model raises it."""
    family, fields, expected = INVALID[case]
    config = make_config(Variant(family, fields))
    fault = window_fault(config, 8) or find_rope_fault(config, 8)
    assert expected in fault and "\n" not in fault
    base = AutoModelForCausalLM.from_config(make_config(Variant(family)))
    base.config = config
    with pytest.raises(ValueError) as error:
        MemoryLM(base, MEMORY)
    assert str(error.value) == fault


@pytest.mark.parametrize("case", INVALID)
def test_commands_find_an_invalid_config_before_they_load_a_model(
    workspace,
    tiny_folder,
    capsys,
    monkeypatch,
    case,
):
    family, fields, expected = INVALID[case]
    config = make_config(Variant(family, fields | dict(vocab_size=259)))
    config.save_pretrained("other")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained("other")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    memory = json.loads(Path("memory.json").read_text()) | dict(chunk_size=8)
    Path("memory.json").write_text(json.dumps(memory))
    flags = ("--set=model.model_name=other", f"--set=model.model_structure={family}")
    for command in ("train.py", "test.py"):
        assert call(command, "--env_conf", "env.json", *flags) == 2
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert message.startswith("env.json: model.model_name: other: ") and expected in message


def test_sliding_windows_that_the_family_does_not_use_are_ignored():
    """A llama has no sliding windows, whatever its config contains, nor has a qwen2 whose layers
    all have full attention."""
    fully = SLIDING | dict(sliding_window=4, layer_types=["full_attention"] * 3)
    for family, fields in (("llama", dict(sliding_window=4)), ("qwen2", fully)):
        base = AutoModelForCausalLM.from_config(make_config(Variant(family, fields)))
        model, ids = MemoryLM(base.double().eval(), MEMORY), random_ids(30)
        with torch.no_grad():
            nll = nll_of(base(ids[None]).logits[0], ids)
        assert relative_error(score(model, ids, "document", "raw").nll, nll) < TOLERANCE


def test_a_saved_model_and_a_plan_have_the_same_capacity(workspace, tiny_folder):
    """The configs are written as model cards describe them."""
    families = {
        "qwen2": dict(rope_scaling=dict(type="yarn", factor=4.0) | {ORIGINAL: 64}),
        "llama": dict(rope_scaling=dict(type="longrope", **LONG)) | {ORIGINAL: 24},
    }
    for family, fields in families.items():
        # One embedding more than tokens, because transformers adds a token for qwen2.
        config = make_config(Variant(family, dict(vocab_size=260)))
        config.save_pretrained(family)
        path = Path(family) / "config.json"
        written = json.loads(path.read_text())
        written.pop("rope_parameters")
        path.write_text(json.dumps(written | dict(rope_theta=10000.0) | fields))
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(family)).save_pretrained(family)
        AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(family)
        changes = [f"model.model_name={family}", f"model.model_structure={family}"]
        changes += ["train.corpus.0.truncation=null", "train.tasks=[]"]
        config = load_env_config("env.json", changes)
        positions = 256 if family == "qwen2" else 64
        model, _ = load_memory_lm(config, "env.json")
        assert make_plan(config, "env.json").capacity == model.capacity
        assert model.capacity == model.memory_config.capacity(positions)
        flags = [f"--set={change}" for change in changes]
        assert call("train.py", "--env_conf", "env.json", *flags, "--restart") == 0
        model.save_pretrained(f"saved-{family}", include_base=True)
        assert MemoryLM.from_pretrained(f"saved-{family}").capacity == model.capacity
