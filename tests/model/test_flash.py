"""Attention with flash-attn against attention with SDPA. A fake module in float64 has the signatures,
shapes and alignment of flash-attn 2.

The relative tolerance of 1e-10 allows for another order of summation in float64 and nothing else.
"""

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from itertools import accumulate
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import (
    MEMORY,
    gradients,
    make_base,
    make_model,
    random_ids,
    relative_error,
    worst_error,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import uiollms
from uiollms import ConfigError, MemoryConfig, MemoryLM
from uiollms.build import load_memory_lm
from uiollms.config.load import load_env_config
from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import token_losses
from uiollms.kernels import flash_attention as flash
from uiollms.model import attention, attention_patterns
from uiollms.model import layers as base
from uiollms.model.attention import decoder_mask
from uiollms.model.attention_patterns import PackedRowsPattern
from uiollms.runs.state import MAY_CHANGE
from uiollms.weights.base_models import load_pretrained

TOLERANCE = 1e-10
FAMILIES = ["llama", "qwen3", "mistral"]


class FakeFlashAttn(ModuleType):
    """A module `flash_attn` that computes one softmax for each row. The alignment "top-left" is
    that of flash-attn before 2.1."""

    def __init__(self, alignment: str = "bottom-right") -> None:
        super().__init__("flash_attn")
        self.__spec__ = ModuleSpec("flash_attn", None)
        self.alignment = alignment
        self.calls: list[tuple[str, bool]] = []  # function, deterministic

    def row(self, q, k, v, scale, window=(-1, -1)):
        """Attends from queries [T, N, K] to keys and values [S, H, K]. Returns [T, N, K]. window:
        how many keys before and after the one of the same position a query sees, -1 for all."""
        queries, keys = len(q), len(k)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("tnk,snk->nts", q, k) * scale
        offset = keys - queries if self.alignment == "bottom-right" else 0
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(offset + 1)
        if window[0] >= 0:
            hidden |= torch.ones(queries, keys, dtype=torch.bool).tril(offset - window[0] - 1)
        return torch.einsum("nts,snk->tnk", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)

    def check(
        self,
        name,
        dims,
        q,
        k,
        v,
        dropout_p,
        scale,
        causal,
        window_size,
        softcap,
        alibi,
        deterministic,
        probs,
    ):
        self.calls.append((name, deterministic))
        assert q.dtype == k.dtype == v.dtype == torch.float64  # bfloat16 or float16 in the real one
        assert q.dim() == k.dim() == v.dim() == dims and k.shape == v.shape
        assert q.shape[-1] == k.shape[-1] <= 256 and q.shape[-2] % k.shape[-2] == 0
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert (dropout_p, causal, softcap, alibi, probs) == (0.0, True, 0.0, None, False)
        slides = name == "dense" and window_size[0] >= 0 and window_size[1] == 0
        assert slides or window_size == (-1, -1)
        assert scale == q.shape[-1] ** -0.5 and type(deterministic) is bool

    def flash_attn_func(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        options = (
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )
        self.check("dense", 4, q, k, v, *options)
        assert q.shape[0] == k.shape[0]
        rows = zip(q, k, v, strict=True)
        return torch.stack([self.row(*row, softmax_scale, window_size) for row in rows])

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        options = (
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )
        self.check("varlen", 3, q, k, v, *options)
        lengths = []
        for starts, longest, packed in (
            (cu_seqlens_q, max_seqlen_q, q),
            (cu_seqlens_k, max_seqlen_k, k),
        ):
            assert starts.dtype == torch.int32 and starts.dim() == 1 and starts.is_contiguous()
            assert (
                starts[0] == 0
                and starts[-1] == len(packed)
                and type(longest) is int
                and longest == starts.diff().max()
            )
            lengths.append(starts.diff().tolist())
        assert len(lengths[0]) == len(lengths[1]) and block_table is None
        rows = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        return torch.cat([self.row(*row, softmax_scale) for row in rows])


@pytest.fixture
def kernel(monkeypatch) -> FakeFlashAttn:
    module = FakeFlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "DEVICE_TYPES", ("cpu",))
    return module


def dense_mask(*size):
    raise AssertionError(f"a dense mask was built: {size}")


@contextmanager
def flash_attention(model: MemoryLM):
    """Inside the context, the base is set to flash-attn, which transformers would refuse without
    CUDA, and building a dense mask is an error."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (base, attention_patterns):
            patch.setattr(module, "decoder_mask", dense_mask)
        patch.setattr(model.base.config, "_attn_implementation", flash.NAME)
        yield
        assert (
            model.base.config._attn_implementation
            == model.base.config._attn_implementation
            == flash.NAME
        )


def check_equal(model: MemoryLM, run) -> None:
    """Checks that run(model) returns the same tensors with SDPA and with the fake module."""
    expected = run(model)
    with flash_attention(model):
        found = run(model)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [(29,), (3, 5, 1, 13, 7), (8, 20, 1)])
@torch.no_grad()
def test_streams_are_equal(kernel, family, pieces):
    def run(model):
        state, logits = None, []
        for piece in random_ids(2, 29).split(pieces, dim=1):
            output = model(piece, state)
            state = output.past_key_values
            logits.append(output.logits)
        return [torch.cat(logits, dim=1), *state.memory_keys, *state.memory_values]

    check_equal(make_model(family), run)
    assert {name for name, _ in kernel.calls} == {"dense"}


@pytest.mark.parametrize(
    "family, settings",
    [("llama", dict(estimator=e)) for e in ("uio", "tbptt", "exact", "importance")],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_every_estimator_are_equal(kernel, family, settings, checkpointing):
    check_step(kernel, make_model(family), settings, checkpointing)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_gradients_of_other_families_are_equal(kernel, family):
    check_step(kernel, make_model(family), {}, False)


def check_step(kernel, model, settings, checkpointing):
    """Compares gradients and losses of a step. Its batches have rows that read different numbers of
    slots, and a row that is shorter than the others."""
    model.chunk_batch, model.checkpointing = 2, checkpointing
    sample = Sample.language_modeling(random_ids(37), 8)
    settings = settings | ({"S": 2} if settings.get("estimator") not in (None, "exact") else {})
    first = uiollms.gradient_step(model, sample, rng=3, **settings)
    expected = gradients(model)
    with flash_attention(model):
        second = uiollms.gradient_step(model, sample, rng=3, **settings)
    assert worst_error(gradients(model), expected) < TOLERANCE
    assert (
        relative_error(second.losses, first.losses) < TOLERANCE
        and second.reencoded == first.reencoded
    )
    assert {name for name, _ in kernel.calls} == {"dense", "varlen"}


def test_recent_tokens_are_supported(kernel):
    """Compares streams, scores in every mode, and the gradients of a step."""
    model = make_model(config=MEMORY.model_copy(update={"recent_tokens": 3}))

    @torch.no_grad()
    def run(model):
        state, logits = None, []
        for piece in random_ids(2, 29).split([3, 5, 1, 13, 7], dim=1):
            output = model(piece, state)
            state = output.past_key_values
            logits.append(output.logits)
        sample, other = Sample.document(random_ids(37), 8), random_ids(32, seed=1).view(4, 8)
        modes = ("memory", "window", "raw", "shuffled")
        scores = [token_losses(model, sample, mode, other)[1] for mode in modes]
        return [torch.cat(logits, 1), *scores]

    check_equal(model, run)
    check_step(kernel, model, dict(estimator="uio"), False)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_in_every_mode_are_equal(kernel, family):
    def run(model):
        model.chunk_batch = 3
        sample = Sample.document(random_ids(37), 8)
        other = random_ids(32, seed=1).view(4, 8)
        scores = [token_losses(model, sample, mode)[1] for mode in ("memory", "window", "raw")]
        copy = [token_losses(model, Sample.copy(random_ids(20), 8))[1], model.reconstruct(other)]
        return [*scores, token_losses(model, sample, "shuffled", other)[1], *copy]

    check_equal(make_model(family), run)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
@torch.no_grad()
def test_raw_texts_longer_than_a_sliding_window_are_equal(kernel, family):
    """All layers have a sliding window, or one of three has. No dense mask is built."""
    changes = dict(sliding_window=8)
    if family == "qwen3":
        changes["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    model = MemoryLM(make_base(family, **changes), MEMORY)
    sample = Sample.document(random_ids(37), 8)
    check_equal(model, lambda model: [token_losses(model, sample, "raw")[1]])
    wide = MemoryLM(make_base(family), MEMORY)
    full, narrow = (token_losses(of, sample, "raw")[1] for of in (wide, model))
    assert relative_error(full[:7], narrow[:7]) < TOLERANCE
    assert relative_error(full, narrow) > 1e6 * TOLERANCE


def test_generated_tokens_are_equal(kernel):
    def run(model):
        mask = torch.ones(2, 13, dtype=torch.int64)
        mask[0, :5] = 0
        options = dict(
            attention_mask=mask,
            max_new_tokens=9,
            output_logits=True,
            return_dict_in_generate=True,
            do_sample=False,
        )
        greedy = model.generate(random_ids(2, 13), **options)
        beams = model.generate(random_ids(1, 13), num_beams=2, max_new_tokens=9, do_sample=False)
        return [greedy.sequences, torch.stack(greedy.logits), beams]

    check_equal(make_model(), run)


@pytest.mark.parametrize("num_memory", [1, 2, 8])
@torch.no_grad()
def test_memories_are_equal(kernel, num_memory):
    config = MemoryConfig(**MEMORY.model_dump() | dict(num_memory=num_memory))
    check_equal(make_model(config=config), lambda model: [model.encode(random_ids(3, 8))])


@pytest.mark.parametrize(
    "slots, past, length",
    [([1, 2], 0, 2), ([0, 3, 1], 4, 3), ([2, 2], 3, 2), ([0], 2, 3), ([4, 0], 2, 1)],
)
@pytest.mark.parametrize("window", [None, 2, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_packed_rows_attend_as_the_decoder_mask_allows(
    kernel, slots, past, length, window, documents
):
    """Compares values and gradients of one attention, with 4 heads over 2 key/value heads.
    flash-attn is not called for rows that read memory in a layer whose sliding window hides
    tokens."""
    first = (
        list(accumulate(slots[:-1], initial=0)) if documents else [0] * len(slots)
    )  # documents are joined, one after another
    rows, keys = len(slots), max(map(sum, zip(first, slots, strict=True))) + past + length
    shapes = (rows, 4, length, 8), (rows, 2, keys, 8), (rows, 2, keys, 8)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    window = window if window is not None and window < past + length else None
    pattern = PackedRowsPattern.of(slots, first, past, length, torch.device("cpu"), window)
    module = SimpleNamespace(num_key_value_groups=2)
    found, _ = attention.attend(module, *tensors, None, 8**-0.5, pattern)
    query, key, value = tensors
    expected = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, 1),
        value.repeat_interleave(2, 1),
        decoder_mask(slots, past, length, pattern.device, window, first),
        is_causal=keys == length > 1 and window is None,
    ).transpose(1, 2)
    assert relative_error(found, expected) < TOLERANCE
    output_gradient = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, tensors, output_gradient),
        torch.autograd.grad(expected, tensors, output_gradient),
        strict=True,
    )
    assert all(relative_error(*pair) < TOLERANCE for pair in pairs)
    called = ["varlen" if len(set(slots)) > 1 or any(first) else "dense"]
    assert [name for name, _ in kernel.calls] == (called if window is None or slots == [0] else [])


@torch.no_grad()
def test_another_alignment_changes_the_logits(kernel):
    model, ids = make_model(), random_ids(1, 21)
    expected = model(ids).logits
    kernel.alignment = "top-left"
    with flash_attention(model):
        found = model(ids).logits
    assert (
        relative_error(found[:, :8], expected[:, :8]) < TOLERANCE
    )  # the first chunk has as many keys as queries
    assert relative_error(found[:, 8:], expected[:, 8:]) > 1e-2


@torch.no_grad()
def test_a_call_does_not_change_the_attention_implementation_of_the_base(kernel, monkeypatch):
    model, inside = make_model(), []
    monkeypatch.setattr(
        kernel, "row", lambda *_: inside.append(model.base.config._attn_implementation) or 1 / 0
    )
    with flash_attention(model):  # checks the name afterwards
        with pytest.raises(ZeroDivisionError):
            model(random_ids(1, 5))
    assert inside == [flash.NAME]


@torch.no_grad()
def test_torchs_deterministic_mode_is_passed_to_flash_attn(kernel):
    model = make_model()
    with flash_attention(model):
        model(random_ids(1, 5))
        torch.use_deterministic_algorithms(True)
        try:
            model(random_ids(1, 5))
        finally:
            torch.use_deterministic_algorithms(False)
    half = len(kernel.calls) // 2
    assert kernel.calls == [("dense", False)] * half + [("dense", True)] * half


def test_layers_on_a_cpu_use_sdpa(monkeypatch):
    """The package need not be installed. The results differ by rounding, because only a
    base that is set to SDPA reads memory in place."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises
    model, sample = make_model(), Sample.language_modeling(random_ids(37), 8)
    first = uiollms.gradient_step(model, sample, estimator="uio", S=2, rng=3)
    expected = gradients(model)
    monkeypatch.setattr(model.base.config, "_attn_implementation", flash.NAME)
    second = uiollms.gradient_step(model, sample, estimator="uio", S=2, rng=3)
    assert relative_error(second.losses, first.losses) < TOLERANCE
    assert worst_error(gradients(model), expected) < TOLERANCE


# ---- missing requirements ------------------------------------------------------------------------


def check_error(call, pattern: str, error: type = ConfigError) -> None:
    with pytest.raises(error, match=pattern) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_missing_requirements_are_errors_of_one_line(monkeypatch, tmp_path):
    def request(dtype=torch.bfloat16, device_map="auto", config=None):
        flash.check_request(
            flash.NAME, "env.json: model.attn_implementation", dtype, device_map, config
        )

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash.check_request("sdpa", "env.json: model.attn_implementation", torch.float32, "cpu")
    field = r'^env.json: model.attn_implementation: "flash_attention_2": '
    check_error(
        request,
        field
        + r'the package flash-attn is not installed; run: pip install .* flash-attn; or use "sdpa"$',
    )
    check_error(
        lambda: request(torch.float32),
        field + "flash-attn computes in bfloat16 and float16, found float32",
    )
    wide = make_base().config
    wide.head_dim = 320
    check_error(lambda: request(config=wide), "heads of at most 256 numbers, found 320")

    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol:\\n _ZN3c10')")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    check_error(request, r"cannot be imported \(undefined symbol: _ZN3c10\)")

    monkeypatch.setitem(sys.modules, "flash_attn", FakeFlashAttn())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_error(request, "needs a CUDA device, this machine has none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: False)
    check_error(request, "too old")
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    request()
    check_error(lambda: request(device_map="cpu"), 'device_map is "cpu"')


def test_every_way_of_loading_a_base_accepts_flash_attention(workspace, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    changes = ["model.attn_implementation=flash_attention_2", "model.model_dtype=bf16"]
    field = r'^env.json: model.attn_implementation: "flash_attention_2": the package flash-attn is not installed'
    check_error(lambda: load_memory_lm(load_env_config("env.json", changes), "env.json"), field)
    model, _ = load_memory_lm(load_env_config("env.json"), "env.json")
    assert model.base.config._attn_implementation == "sdpa"  # "auto"

    model.save_pretrained("saved")
    settings = dict(dtype="bf16", attn_implementation=flash.NAME)
    check_error(
        lambda: MemoryLM.from_pretrained("saved", **settings),
        r'^saved: attn_implementation: "flash_attention_2": ',
    )
    base_model = load_pretrained(AutoModelForCausalLM, str(tiny_folder), dtype=torch.float32)
    monkeypatch.setattr(base_model.config, "_attn_implementation", flash.NAME)
    check_error(
        lambda: MemoryLM(base_model, MEMORY),
        "computes in bfloat16 and float16, found float32; load the base in",
        ValueError,
    )
    assert "model.attn_implementation" in MAY_CHANGE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_kernels_give_the_same_gradients(family):
    """bfloat16 has 8 bits of precision. The tolerance 3e-2 is a few roundings in each of three
    layers. With a wrong alignment the error would be some tenths."""
    pytest.importorskip("flash_attn")
    model, sample = (
        make_model(family, torch.bfloat16).to("cuda"),
        Sample.document(random_ids(37), 8),
    )
    model.chunk_batch = 3
    first = uiollms.gradient_step(model, sample)
    expected = gradients(model)
    model.base.set_attn_implementation(flash.NAME)
    second = uiollms.gradient_step(model, sample)
    assert relative_error(second.losses, first.losses) < 3e-2
    found = gradients(model)
    joined = [torch.cat([g.flatten().double() for g in of.values()]) for of in (found, expected)]
    assert relative_error(*joined) < 3e-2
