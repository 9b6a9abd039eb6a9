"""Products that oneDNN computes are compared with the same products in float64. Other tests check
which products are left to torch.

The tolerance is 1e-6 of the largest entry, which is some ten roundings to float32 (6e-8) along sums
of a few hundred terms.
"""

from functools import partial

import pytest
import torch
from conftest import gradients, make_base, make_model, random_ids, relative_error, worst_error
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile

import uiollms
from uiollms import MemoryConfig, MemoryLM
from uiollms.kernels.frozen_linear import count_padding_rows, linear, supports_onednn, use_onednn
from uiollms.kernels.linear_cross_entropy import linear_nll

ROUNDING = 1e-6
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"
)
MEMORY = MemoryConfig(num_memory=4, chunk_size=64, lora_rank=3, lora_alpha=6)


@pytest.fixture
def without_onednn(monkeypatch):
    """A function that turns torch's switch for oneDNN off."""
    return lambda: monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


def chunked_model(dtype: torch.dtype) -> MemoryLM:
    """Returns a small random model with chunks of 64 tokens and the same weights in every dtype."""
    torch.manual_seed(0)
    base = make_base("llama", torch.float32, max_position_embeddings=256).to(dtype)
    model = MemoryLM(base, MEMORY)
    torch.manual_seed(1)
    for parameter in model.trainable_parameters().values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape))
    return model


def count_onednn_products(call) -> int:
    with profile() as profiler:
        call()
    return sum(event.name == "mkldnn::_linear_pointwise" for event in profiler.events())


def inputs(*shape: int, outputs: int = 48, bias: bool = False):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(outputs, shape[-1])
    return x, weight, torch.randn(outputs) if bias else None


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 200), (2, 70, 200), (1, 1, 200), (5, 1, 200), (0, 1, 200)])
def test_values_and_gradients_equal_those_of_float64(shape, bias):
    x, weight, b = inputs(*shape, bias=bias)
    assert count_onednn_products(lambda: linear(x, weight, b)) == 1
    out, wide = linear(x, weight, b), x.detach().double().requires_grad_()
    expected = F.linear(wide, weight.double(), None if b is None else b.double())
    # The gradient is not contiguous, as it may be in a backward pass.
    out_grad = torch.randn_like(out).transpose(0, -1).contiguous().transpose(0, -1)
    (found_grad,) = torch.autograd.grad(out, x, out_grad)
    (expected_grad,) = torch.autograd.grad(expected, wide, out_grad.double())
    for found, twin in ((out, expected), (found_grad, expected_grad)):
        assert found.shape == twin.shape and found.dtype == torch.float32
        assert not twin.numel() or (found - twin).abs().max() < ROUNDING * twin.abs().max()
    with torch.no_grad():
        assert torch.equal(linear(x, weight, b), out)


def test_tensors_that_onednn_does_not_multiply():
    x, weight, bias = inputs(2, 40, 32, bias=True)
    few = torch.randn(2, 31, 32)
    learned = nn.Parameter(weight.clone())
    assert not supports_onednn(x, learned) and not supports_onednn(x, weight, nn.Parameter(bias))
    assert not supports_onednn(few, weight)
    assert not supports_onednn(x.double(), weight.double())
    assert not supports_onednn(x.bfloat16(), weight.bfloat16())
    assert not supports_onednn(x.to("meta"), weight.to("meta"))
    assert not supports_onednn(x.as_subclass(type("Quantised", (torch.Tensor,), {})), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not supports_onednn(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    assert torch.equal(linear(few, weight, bias), F.linear(few, weight, bias))
    linear(x, learned).sum().backward()
    assert learned.grad is not None


def test_torchs_switch_turns_onednn_off(without_onednn):
    x, weight, bias = inputs(2, 40, 32, bias=True)
    without_onednn()
    assert not supports_onednn(x, weight)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@needs_onednn
def test_tensors_that_onednn_multiplies():
    x, weight, bias = inputs(2, 40, 32, bias=True)
    assert supports_onednn(x, weight, bias)
    assert supports_onednn(x[:1, :1], weight)
    assert supports_onednn(x, nn.Parameter(weight, requires_grad=False))
    with torch.no_grad():
        assert supports_onednn(x, nn.Parameter(weight))


@needs_onednn
def test_layers_use_onednn_only_in_a_call_of_use_onednn():
    layer = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32)).requires_grad_(False)
    x = torch.randn(1, 64, 32)
    assert count_onednn_products(lambda: layer(x)) == 0
    assert count_onednn_products(lambda: use_onednn(layer, layer)(x)) == 2
    assert count_onednn_products(lambda: layer(x)) == 0


@needs_onednn
@pytest.mark.parametrize("checkpointing", [False, True])
def test_onednn_computes_the_frozen_products_of_a_step_within_rounding(
    checkpointing, without_onednn
):
    """oneDNN computes the products of every full row of the decoder, of every chunk and of the
    head. The gradients are compared with those of a float64 model."""
    narrow, wide = chunked_model(torch.float32), chunked_model(torch.float64)
    narrow.checkpointing = checkpointing
    narrow.chunk_batch = 1
    sample = uiollms.Sample.language_modeling(random_ids(3 * 64 + 20), 64)
    step = partial(uiollms.gradient_step, narrow, sample, estimator="exact")
    products = count_onednn_products(step)
    layers = len(narrow.base.model.layers)
    # Three full rows need this many forward and backward, the encoder and the head some more.
    assert products > 3 * layers * 7 * 2
    uiollms.gradient_step(wide, sample, estimator="exact")
    found, expected = gradients(narrow), gradients(wide)
    # This is the rounding of float32. The last lines show that it is not much less without oneDNN.
    assert worst_error(found, expected) < 1e-4
    without_onednn()
    assert count_onednn_products(step) == 0
    assert worst_error(gradients(narrow), expected) > 0.1 * worst_error(found, expected)


@needs_onednn
def test_partial_rows_and_rows_without_memory_do_not_use_onednn():
    model = chunked_model(torch.float32)
    l, m = model.memory_config.chunk_size, model.memory_config.num_memory
    state = model(random_ids(1, l)).past_key_values

    def count_products_of_row(length, slots):
        prefix = state.prefix(slots, with_local=False)
        return count_onednn_products(lambda: model.decode(random_ids(1, length), prefix, [slots]))

    assert count_products_of_row(l, m) > 0
    assert count_products_of_row(l - 1, m) == 0
    # Without memory the row is computed with the kernels of the base.
    assert count_products_of_row(l, 0) == 0
    hidden, targets = torch.randn(128, 32), random_ids(128)
    head = model.base.lm_head
    assert count_onednn_products(lambda: linear_nll(hidden, head, targets)) > 0
    assert count_onednn_products(lambda: linear_nll(hidden[:100], head, targets[:100])) == 0


@needs_onednn
@pytest.mark.parametrize(
    "rows, added", [(128, 0), (127, 1), (1020, 4), (500, 12), (450, 0), (63, 0)]
)
def test_the_head_pads_rows_to_a_multiple_of_64_where_few_are_missing(rows, added):
    head, targets = nn.Linear(32, 50).requires_grad_(False), torch.arange(rows) % 50
    hidden = torch.randn(rows, 32, requires_grad=True)
    assert count_padding_rows(hidden, head.weight, head.bias) == added
    products = count_onednn_products(lambda: linear_nll(hidden, head, targets))
    assert products == (2 if (rows + added) % 64 == 0 else 0)
    found, wide = linear_nll(hidden, head, targets), hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(
        F.linear(wide, head.weight.double(), head.bias.double()), targets, reduction="none"
    )
    weights = torch.rand(rows)
    (found_grad,) = torch.autograd.grad(found @ weights, hidden)
    (expected_grad,) = torch.autograd.grad(expected @ weights.double(), wide)
    for one, twin in ((found, expected), (found_grad, expected_grad)):
        assert one.shape == twin.shape and (one - twin).abs().max() < ROUNDING * twin.abs().max()


@needs_onednn
def test_onednn_computes_a_new_token():
    model = chunked_model(torch.float32)
    with torch.no_grad():
        state = model(random_ids(1, 70)).past_key_values
        layers = len(model.base.model.layers)
        assert count_onednn_products(lambda: model(random_ids(1, 1), state)) == 7 * layers + 1


def overwritten(call) -> set[str]:
    """The names of the operations that wrote their result over their input."""
    with profile() as profiled:
        call()
    return {event.name for event in profiled.events()} & {"aten::silu_", "aten::mul_"}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_without_a_graph_an_mlp_writes_over_its_gate(family):
    model, ids = make_model(family), random_ids(2, 8)

    def encoded():
        with torch.no_grad():
            return model.encode(ids)

    in_place = encoded()
    assert overwritten(encoded) == {"aten::silu_", "aten::mul_"}
    assert not overwritten(lambda: model.encode(ids))  # with a graph
    gate, kept = model.base.model.layers[0].mlp.gate_proj, []
    handle = gate.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    assert torch.equal(encoded(), in_place)
    for given, output in kept:  # what the hook received has not been overwritten
        assert torch.equal(output, F.linear(given, gate.weight))
    handle.remove()
    assert kept and overwritten(encoded)
    shown = []
    handle = model.base.model.layers[0].mlp.act_fn.register_forward_pre_hook(
        lambda module, args: shown.append((args[0], args[0].clone()))
    )
    encoded()
    assert all(torch.equal(given, copy) for given, copy in shown)
    handle.remove()
    assert shown and overwritten(encoded)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not overwritten(encoded)
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: None):
        assert not overwritten(encoded)
    assert torch.equal(encoded(), in_place)


def test_only_a_gate_without_other_references_is_written_over():
    """silu of an input, a product times something else and silu(gate) * silu(gate) are not."""
    first, second = (nn.Linear(8, 8, bias=False).requires_grad_(False) for _ in range(2))
    x = torch.randn(1, 8, 8)

    def run(hidden):
        early = F.silu(hidden) * first(hidden)
        gate = F.silu(first(hidden))
        return early, gate * gate, gate * 2.0, gate * hidden

    with torch.no_grad():
        expected = run(x)
        found = use_onednn(run, first)(x)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < ROUNDING
    with torch.no_grad():
        gate, up = first(x), second(x)
        assert (
            relative_error(
                use_onednn(lambda h: F.silu(first(h)) * second(h), first)(x), F.silu(gate) * up
            )
            < ROUNDING
        )
