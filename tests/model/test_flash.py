"""The flash-attn path: a float64 stand-in with flash-attn 2's signatures, shapes and alignment,
against the SDPA path.

1e-10 relative leaves room for another order of summation in float64, and for nothing else.
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
from uiollms.weights.base_models import load

PROVEN = 1e-10
FAMILIES = ["llama", "qwen3", "mistral"]


class StandIn(ModuleType):
    """`flash_attn`: one softmax a row, written out. aligned "top-left" is what flash-attn did
    before 2.1."""

    def __init__(self, aligned: str = "bottom-right") -> None:
        super().__init__("flash_attn")
        self.__spec__ = ModuleSpec("flash_attn", None)
        self.aligned = aligned
        self.calls: list[tuple[str, bool]] = []  # function, deterministic

    def row(self, q, k, v, scale, window=(-1, -1)):
        """[T, N, K], twice [S, H, K] -> [T, N, K]; window: keys before and behind a query's own,
        -1: all."""
        queries, keys = len(q), len(k)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("tnk,snk->nts", q, k) * scale
        behind = keys - queries if self.aligned == "bottom-right" else 0
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(behind + 1)
        if window[0] >= 0:
            hidden |= torch.ones(queries, keys, dtype=torch.bool).tril(behind - window[0] - 1)
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
def kernel(monkeypatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "DEVICE_TYPES", ("cpu",))
    return module


def dense_mask(*size):
    raise AssertionError(f"a dense mask was built: {size}")


@contextmanager
def asking(model: MemoryLM):
    """flash-attn asked of the base (transformers would not let a model without CUDA ask); dense
    masks cannot be built."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (base, attention_patterns):
            patch.setattr(module, "decoder_mask", dense_mask)
        patch.setattr(model.base.config, "_attn_implementation", flash.NAME)
        yield
        assert (
            model.base.config._attn_implementation
            == model.config._attn_implementation
            == flash.NAME
        )


def agree(model: MemoryLM, run) -> None:
    """run(model) -> tensors, with SDPA and with the stand-in."""
    expected = run(model)
    with asking(model):
        found = run(model)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < PROVEN


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [(29,), (3, 5, 1, 13, 7), (8, 20, 1)])
@torch.no_grad()
def test_a_stream(kernel, family, pieces):
    def run(model):
        state, logits = None, []
        for piece in random_ids(2, 29).split(pieces, dim=1):
            output = model(piece, state)
            state = output.past_key_values
            logits.append(output.logits)
        return [torch.cat(logits, dim=1), *state.memory_keys, *state.memory_values]

    agree(make_model(family), run)
    assert {name for name, _ in kernel.calls} == {"dense"}


@pytest.mark.parametrize(
    "family, settings",
    [("llama", dict(estimator=e)) for e in ("uio", "tbptt", "exact", "importance")],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_every_estimator(kernel, family, settings, checkpointing):
    step_agrees(kernel, make_model(family), settings, checkpointing)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_a_step_of_other_families(kernel, family):
    step_agrees(kernel, make_model(family), {}, False)


def step_agrees(kernel, model, settings, checkpointing):
    """Batches of rows that read unequally many slots, and a row that is shorter than its batch."""
    model.chunk_batch, model.checkpointing = 2, checkpointing
    sample = Sample.language_modeling(random_ids(37), 8)
    settings = settings | ({"S": 2} if settings.get("estimator") not in (None, "exact") else {})
    first = uiollms.gradient_step(model, sample, rng=3, **settings)
    expected = gradients(model)
    with asking(model):
        second = uiollms.gradient_step(model, sample, rng=3, **settings)
    assert worst_error(gradients(model), expected) < PROVEN
    assert (
        relative_error(second.losses, first.losses) < PROVEN and second.reencoded == first.reencoded
    )
    assert {name for name, _ in kernel.calls} == {"dense", "varlen"}


def test_recent_tokens(kernel):
    """In streams, in every mode, and in a step with an estimator."""
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

    agree(model, run)
    step_agrees(kernel, model, dict(estimator="uio"), False)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_in_every_mode(kernel, family):
    def run(model):
        model.chunk_batch = 3
        sample = Sample.document(random_ids(37), 8)
        other = random_ids(32, seed=1).view(4, 8)
        scores = [token_losses(model, sample, mode)[1] for mode in ("memory", "window", "raw")]
        copy = [token_losses(model, Sample.copy(random_ids(20), 8))[1], model.reconstruct(other)]
        return [*scores, token_losses(model, sample, "shuffled", other)[1], *copy]

    agree(make_model(family), run)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
@torch.no_grad()
def test_raw_texts_past_a_window(kernel, family):
    """All layers slide, or one of three; no dense mask is built."""
    changes = dict(sliding_window=8)
    if family == "qwen3":
        changes["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    model = MemoryLM(make_base(family, **changes), MEMORY)
    sample = Sample.document(random_ids(37), 8)
    agree(model, lambda model: [token_losses(model, sample, "raw")[1]])
    wide = MemoryLM(make_base(family), MEMORY)
    full, narrow = (token_losses(of, sample, "raw")[1] for of in (wide, model))
    assert relative_error(full[:7], narrow[:7]) < PROVEN
    assert relative_error(full, narrow) > 1e6 * PROVEN


def test_generation(kernel):
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

    agree(make_model(), run)


@pytest.mark.parametrize("num_memory", [1, 2, 8])
@torch.no_grad()
def test_the_encoder(kernel, num_memory):
    config = MemoryConfig(**MEMORY.model_dump() | dict(num_memory=num_memory))
    agree(make_model(config=config), lambda model: [model.encode(random_ids(3, 8))])


@pytest.mark.parametrize(
    "slots, past, length",
    [([1, 2], 0, 2), ([0, 3, 1], 4, 3), ([2, 2], 3, 2), ([0], 2, 3), ([4, 0], 2, 1)],
)
@pytest.mark.parametrize("window", [None, 2, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_rows_are_the_decoder_mask(kernel, slots, past, length, window, documents):
    """Values and gradients of one attention, 4 heads over 2 key/value heads. With a window that
    hides anything behind memory flash-attn is not asked."""
    first = (
        list(accumulate(slots[:-1], initial=0)) if documents else [0] * len(slots)
    )  # one behind the other
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
    assert relative_error(found, expected) < PROVEN
    of = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, tensors, of),
        torch.autograd.grad(expected, tensors, of),
        strict=True,
    )
    assert all(relative_error(*pair) < PROVEN for pair in pairs)
    called = ["varlen" if len(set(slots)) > 1 or any(first) else "dense"]
    assert [name for name, _ in kernel.calls] == (called if window is None or slots == [0] else [])


@torch.no_grad()
def test_another_alignment_would_be_seen(kernel):
    model, ids = make_model(), random_ids(1, 21)
    expected = model(ids).logits
    kernel.aligned = "top-left"
    with asking(model):
        found = model(ids).logits
    assert relative_error(found[:, :8], expected[:, :8]) < PROVEN  # as many keys as queries
    assert relative_error(found[:, 8:], expected[:, 8:]) > 1e-2


@torch.no_grad()
def test_the_base_is_what_was_loaded_in_a_call_too(kernel, monkeypatch):
    model, inside = make_model(), []
    monkeypatch.setattr(
        kernel, "row", lambda *_: inside.append(model.base.config._attn_implementation) or 1 / 0
    )
    with asking(model):  # checks the name afterwards
        with pytest.raises(ZeroDivisionError):
            model(random_ids(1, 5))
    assert inside == [flash.NAME]


@torch.no_grad()
def test_torchs_switch_for_deterministic_algorithms_is_handed_on(kernel):
    model = make_model()
    with asking(model):
        model(random_ids(1, 5))
        torch.use_deterministic_algorithms(True)
        try:
            model(random_ids(1, 5))
        finally:
            torch.use_deterministic_algorithms(False)
    half = len(kernel.calls) // 2
    assert kernel.calls == [("dense", False)] * half + [("dense", True)] * half


def test_layers_that_are_not_on_cuda_compute_as_with_sdpa(monkeypatch):
    """Without the package; to rounding, since SDPA alone leaves the memory where it lies."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises
    model, sample = make_model(), Sample.language_modeling(random_ids(37), 8)
    first = uiollms.gradient_step(model, sample, estimator="uio", S=2, rng=3)
    expected = gradients(model)
    monkeypatch.setattr(model.base.config, "_attn_implementation", flash.NAME)
    second = uiollms.gradient_step(model, sample, estimator="uio", S=2, rng=3)
    assert relative_error(second.losses, first.losses) < PROVEN
    assert worst_error(gradients(model), expected) < PROVEN


# ---- asked where it cannot run -------------------------------------------------------------------


def refused(call, pattern: str, error: type = ConfigError) -> None:
    with pytest.raises(error, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_said_in_one_line(monkeypatch, tmp_path):
    def asked(dtype=torch.bfloat16, device_map="auto", config=None):
        flash.check_request(
            flash.NAME, "env.json: model.attn_implementation", dtype, device_map, config
        )

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash.check_request("sdpa", "env.json: model.attn_implementation", torch.float32, "cpu")
    field = r'^env.json: model.attn_implementation: "flash_attention_2": '
    refused(
        asked,
        field
        + r'the package flash-attn is not installed; run: pip install .* flash-attn; or use "sdpa"$',
    )
    refused(
        lambda: asked(torch.float32),
        field + "flash-attn computes in bfloat16 and float16, found float32",
    )
    wide = make_base().config
    wide.head_dim = 320
    refused(lambda: asked(config=wide), "heads of at most 256 numbers, found 320")

    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol:\\n _ZN3c10')")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    refused(asked, r"cannot be imported \(undefined symbol: _ZN3c10\)")

    monkeypatch.setitem(sys.modules, "flash_attn", StandIn())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(asked, "needs a CUDA device, this machine has none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: False)
    refused(asked, "too old")
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    asked()
    refused(lambda: asked(device_map="cpu"), 'device_map is "cpu"')


def test_it_may_be_asked_for_wherever_a_base_is_loaded(workspace, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    changes = ["model.attn_implementation=flash_attention_2", "model.model_dtype=bf16"]
    field = r'^env.json: model.attn_implementation: "flash_attention_2": the package flash-attn is not installed'
    refused(lambda: load_memory_lm(load_env_config("env.json", changes), "env.json"), field)
    model, _ = load_memory_lm(load_env_config("env.json"), "env.json")
    assert model.base.config._attn_implementation == "sdpa"  # "auto"

    model.save_pretrained("saved")
    asked = dict(dtype="bf16", attn_implementation=flash.NAME)
    refused(
        lambda: MemoryLM.from_pretrained("saved", **asked),
        r'^saved: attn_implementation: "flash_attention_2": ',
    )
    own = load(AutoModelForCausalLM, str(tiny_folder), dtype=torch.float32)
    monkeypatch.setattr(own.config, "_attn_implementation", flash.NAME)
    refused(
        lambda: MemoryLM(own, MEMORY),
        "computes in bfloat16 and float16, found float32; load the base in",
        ValueError,
    )
    assert "model.attn_implementation" in MAY_CHANGE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_kernels(family):
    """bfloat16 keeps 8 bits: 3e-2 is a few roundings of each of three layers. A wrong alignment
    is off by tenths."""
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
