"""The flash kernels of torch have the signatures and layouts that kernels/flash_calls.py assumes,
and its CPU functions compute what the stand-in computes.

1e-12 relative leaves room for another order of summation in float64, and for nothing else.
"""

import pytest
import torch
from conftest import relative_error
from flash_stand_in import FlashStandIn, use_stand_in

from uiollms.kernels.flash_calls import Packing, flash_backward, flash_forward, supports_flash

EXACT = 1e-12
aten = torch.ops.aten
FORWARD = (
    "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask".split()
)
BACKWARD = (
    "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
    "rng_state unused".split()
)


@pytest.mark.parametrize(
    "name, arguments, num_returns",
    [("_flash_attention_forward", FORWARD, 5), ("_flash_attention_backward", BACKWARD, 3)],
)
def test_the_operators_have_the_arguments_that_the_calls_pass(name, arguments, num_returns):
    schema = getattr(aten, name).default._schema
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    assert positional == arguments
    keywords = {argument.name: argument for argument in schema.arguments if argument.kwarg_only}
    assert "scale" in keywords and all(a.has_default_value() for a in keywords.values())
    assert len(schema.returns) == num_returns


def test_the_operators_return_the_layouts_that_the_calls_expect():
    """By the shape functions of torch: out [Q, N, K], the log-sum-exp [N, Q] in float32."""
    query, key = (
        torch.empty(n, heads, 16, dtype=torch.bfloat16, device="meta")
        for n, heads in ((7, 4), (9, 2))
    )
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    call = (starts, starts, 4, 5, 0.0, True)
    out, lse, *_ = aten._flash_attention_forward(query, key, key, *call, False, scale=1.0)
    assert out.shape == query.shape and lse.shape == (4, 7) and lse.dtype == torch.float32
    unused = torch.empty(2, dtype=torch.uint64, device="meta")
    grads = aten._flash_attention_backward(
        out, query, key, key, out, lse, *call, unused, unused, scale=1.0
    )
    assert [g.shape for g in grads] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(
    "causal, num_queries, num_keys",
    [
        (True, (5, 5, 5), (5, 5, 5)),
        (True, (5, 5, 5), (7, 5, 11)),
        (True, (5,), (9,)),
        (False, (5, 10), (3, 1)),
        (False, (6,), (4,)),
    ],
)
def test_the_cpu_computes_what_the_stand_in_computes(
    heads, causal, num_queries, num_keys, monkeypatch
):
    torch.manual_seed(0)
    packing = Packing.of(num_queries, num_keys, torch.device("cpu"))
    N, H = heads
    query, grad = (torch.randn(sum(num_queries), N, 8, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(sum(num_keys), H, 8, dtype=torch.float64) for _ in range(2))

    def run():
        out, lse = flash_forward(query, key, value, packing, causal, 0.3)
        return out, lse, *flash_backward(
            grad, query, key, value, out, lse, packing, causal, 0.3
        )  # fmt: skip

    on_cpu = run()
    stand_in = use_stand_in(monkeypatch)
    for a, b in zip(on_cpu, run(), strict=True):
        assert a.shape == b.shape and relative_error(a, b) < EXACT
    assert stand_in.calls == 2


def test_the_stand_in_computes_what_autograd_computes():
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (5, 8, 8)
    )
    scores = FlashStandIn().scores(query, key, True, 0.3)
    expected = torch.einsum("nts,snk->tnk", scores.softmax(-1), value)
    grad = torch.randn_like(expected)
    starts = [torch.tensor([0, n], dtype=torch.int32) for n in (5, 8)]
    call = (*starts, 5, 8, 0.0, True)
    with torch.no_grad():
        out, lse, *_ = FlashStandIn()._flash_attention_forward(
            query, key, value, *call, False, scale=0.3
        )
        found = FlashStandIn()._flash_attention_backward(
            grad, query, key, value, out, lse, *call, None, None, scale=0.3
        )
    assert relative_error(out, expected) < EXACT
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad)
    for a, b in zip(found, expected_grads, strict=True):
        assert relative_error(a, b) < EXACT


def test_cards_are_used_in_half_precision_alone(monkeypatch):
    class OnCard:
        device, shape = torch.device("cuda", 0), (2, 4, 64)

        def __init__(self, dtype, head=64):
            self.dtype, self.shape = dtype, (2, 4, head)

    assert supports_flash(torch.empty(1))
    assert supports_flash(OnCard(torch.bfloat16)) and supports_flash(OnCard(torch.float16))
    assert not supports_flash(OnCard(torch.float32))
    assert not supports_flash(OnCard(torch.bfloat16, head=264))
    assert not supports_flash(OnCard(torch.bfloat16, head=60))
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert not supports_flash(OnCard(torch.bfloat16))
    assert not supports_flash(torch.empty(1, device="meta"))
