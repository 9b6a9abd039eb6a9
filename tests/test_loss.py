"""The blockwise loss head against the plain one."""

import weakref

import pytest
import torch
from conftest import relative_error
from torch.nn import functional as F

from uiollms import loss


@pytest.mark.parametrize("rows", [1, 5, 2 * loss.BLOCKS[0] + 3, 4 * loss.BLOCKS[0] + 50])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_nll_is_cross_entropy(rows, bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=bias).double().requires_grad_(False)
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (rows,))
    weights = torch.rand(rows, dtype=torch.float64)

    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), hidden)
    found = loss.linear_nll(hidden, head, targets)
    (found_grad,) = torch.autograd.grad((found * weights).sum(), hidden)
    assert relative_error(found, expected) < 1e-10
    assert relative_error(found_grad, expected_grad) < 1e-10


@pytest.mark.parametrize("rows, blocks", [(137, [128, 9]), (1000, [250] * 4), (4000, [512] * 7 + [416])])
def test_logits_of_one_block_at_a_time(monkeypatch, rows, blocks):
    """A quarter of the rows at once, at least 128, at most 512."""
    seen = []
    plain = F.linear
    monkeypatch.setattr(loss.F, "linear", lambda x, *rest: seen.append(len(x)) or plain(x, *rest))
    head = torch.nn.Linear(4, 7)
    loss.linear_nll(torch.randn(rows, 4), head, torch.zeros(rows, dtype=torch.int64))
    assert seen == blocks


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_block_of_logits_dies_before_the_next_is_made(monkeypatch, with_teacher):
    made, plain = [], F.linear

    def linear(x, *rest):
        assert all(block() is None for block in made[: len(made) // (1 + with_teacher) * (1 + with_teacher)])
        logits = plain(x, *rest)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(loss.F, "linear", linear)
    head = torch.nn.Linear(4, 7).requires_grad_(False)
    hidden = torch.randn(3 * loss.BLOCKS[0], 4, requires_grad=True)
    teacher = torch.randn_like(hidden).detach() if with_teacher else None
    loss.linear_losses(hidden, head, torch.zeros(len(hidden), dtype=torch.int64), teacher, 0.5)
    assert len(made) == 3 * (1 + with_teacher)


def test_half_precision_hidden_states_give_float32_nll():
    head = torch.nn.Linear(4, 7).bfloat16()
    assert loss.linear_nll(torch.randn(3, 4).bfloat16(), head, torch.tensor([0, 1, 2])).dtype == torch.float32


@pytest.mark.parametrize("kl_weight", [0.3, 0.9, 1.0])
def test_linear_losses_with_a_teacher(kl_weight):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11).double().requires_grad_(False)
    hidden = torch.randn(loss.BLOCKS[0] + 5, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn_like(hidden).detach()
    targets = torch.randint(0, 11, (len(hidden),))
    weights = torch.rand(len(hidden), dtype=torch.float64)

    nll = F.cross_entropy(head(hidden), targets, reduction="none")
    kl = F.kl_div(head(hidden).log_softmax(-1), head(teacher).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    expected = (1 - kl_weight) * nll + kl_weight * kl
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), hidden)
    found, found_nll = loss.linear_losses(hidden, head, targets, teacher, kl_weight)
    (found_grad,) = torch.autograd.grad((found * weights).sum(), hidden)
    assert relative_error(found, expected) < 1e-10 and relative_error(found_nll, nll) < 1e-10
    assert relative_error(found_grad, expected_grad) < 1e-10
    assert not found_nll.requires_grad
