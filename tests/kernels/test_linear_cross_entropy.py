"""The loss head that computes slices of the vocabulary, compared with the plain one."""

from functools import partial

import pytest
import torch
from conftest import relative_error
from torch.nn import functional as F

from uiollms.kernels import linear_cross_entropy as loss
from uiollms.kernels.frozen_linear import choose_linear


@pytest.fixture(params=[3, 4, 11])
def small_slices(request, monkeypatch):
    """Slices of a vocabulary of 11 tokens: several, of which the last is shorter, or one."""
    monkeypatch.setattr(loss, "SLICE", request.param)
    monkeypatch.setattr(loss, "LOGITS_CPU", 1)


@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_nll_is_cross_entropy(small_slices, rows, bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=bias).double().requires_grad_(False)
    hidden = (5 * torch.randn(rows, 6, dtype=torch.float64)).requires_grad_()
    targets = torch.arange(rows) % 11
    weights = torch.rand(rows, dtype=torch.float64)

    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), hidden)
    found = loss.linear_nll(hidden, head, targets)
    (found_grad,) = torch.autograd.grad((found * weights).sum(), hidden)
    assert found.shape == (rows,) and found_grad.shape == (rows, 6)
    if rows:
        assert relative_error(found, expected) < 1e-10
        assert relative_error(found_grad, expected_grad) < 1e-10


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_large_logits_do_not_overflow(small_slices, scale):
    """The largest logit may be far larger than the others and in any slice. The error of a float32
    logit is about 1e-7 of its size, so that of the loss is 1e-7 * scale, and so is the relative
    error of the gradient, through exp. A hundred times that is allowed."""
    torch.manual_seed(1)
    head = torch.nn.Linear(6, 11).requires_grad_(False)
    hidden = (scale * torch.randn(40, 6)).requires_grad_()
    targets = torch.randint(0, 11, (40,))
    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), hidden)
    found = loss.linear_nll(hidden, head, targets)
    (found_grad,) = torch.autograd.grad(found.sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(found_grad, expected_grad, rtol=min(1e-5 * scale, 1e-3), atol=1e-5)


def test_the_gradient_of_a_nearly_certain_token_survives_half_precision(small_slices):
    """The probability of the target is above 0.999. bfloat16 has 8 bits, so exp, the product and
    the result have an error of 0.4 % each. The direction of the gradient may differ by 2 % from
    that in float64."""
    torch.manual_seed(2)
    head = torch.nn.Linear(32, 11, bias=False).bfloat16().requires_grad_(False)
    target = torch.tensor([7])
    direction = head.weight[7].double()
    hidden = (20 * direction / direction.norm() ** 2).bfloat16()[None].requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ head.weight.double().T
    nll = F.cross_entropy(logits, target)
    assert nll < 1e-3
    (expected,) = torch.autograd.grad(nll, exact)
    (found,) = torch.autograd.grad(loss.linear_nll(hidden, head, target).sum(), hidden)
    # Directions are compared because rounding the logits to bfloat16 scales the gradient.
    assert F.cosine_similarity(found.double(), expected).item() > 1 - 0.02**2


@pytest.mark.parametrize(
    "rows, widths", [(70, [3744, 1256]), (128, [2048, 2048, 904]), (1088, [1024] * 4 + [904])]
)
def test_logits_of_one_slice_at_a_time(monkeypatch, rows, widths):
    """A slice has all rows, and as many tokens of the vocabulary as 2**18 logits allow, but at
    least 1,024."""
    products = []

    def record(linear, *args):
        products.append(linear(*args))
        return products[-1]

    head = torch.nn.Linear(4, 5000, bias=False).requires_grad_(False)
    monkeypatch.setattr(loss, "choose_linear", lambda rows: partial(record, choose_linear(rows)))
    hidden = torch.randn(rows, 4, requires_grad=True)
    loss.linear_nll(hidden, head, torch.zeros(rows, dtype=torch.int64))
    # Each slice needs a product for its logits and one for the gradient of the hidden states.
    assert [tuple(logits.shape) for logits in products[::2]] == [(rows, width) for width in widths]
    assert all(gradient.shape == (rows, 4) for gradient in products[1::2])


def test_half_precision_hidden_states_give_float32_nll():
    head = torch.nn.Linear(4, 7).bfloat16()
    nll = loss.linear_nll(torch.randn(3, 4).bfloat16(), head, torch.tensor([0, 1, 2]))
    assert nll.dtype == torch.float32


@pytest.mark.parametrize("rows", [0, loss.BLOCK + 5])
@pytest.mark.parametrize("kl_weight", [0.3, 0.9, 1.0])
def test_linear_losses_with_a_teacher(kl_weight, rows):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11).double().requires_grad_(False)
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn_like(hidden).detach()
    targets = torch.randint(0, 11, (len(hidden),))
    weights = torch.rand(len(hidden), dtype=torch.float64)

    nll = F.cross_entropy(head(hidden), targets, reduction="none")
    kl = F.kl_div(
        head(hidden).log_softmax(-1),
        head(teacher).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    expected = (1 - kl_weight) * nll + kl_weight * kl
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), hidden)
    found, found_nll = loss.linear_losses(hidden, head, targets, teacher, kl_weight)
    (found_grad,) = torch.autograd.grad((found * weights).sum(), hidden)
    assert relative_error(found, expected) < 1e-10 and relative_error(found_nll, nll) < 1e-10
    assert relative_error(found_grad, expected_grad) < 1e-10
    assert not found_nll.requires_grad
