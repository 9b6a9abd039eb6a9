"""The loss head: losses of tokens from hidden states, never holding all logits at once.

Shapes: N scored tokens, D hidden size, V vocabulary, w tokens of a slice of it, b rows of a
block. Source of walking along the vocabulary: Wijmans et al. 2024 (Cut Cross-Entropy, arXiv
2411.09009), without its filter; of the running maximum: Milakov and Gimelshein 2018 (arXiv
1805.02867).
"""

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

from uiollms.kernels.devices import loading
from uiollms.kernels.frozen_linear import choose_linear, count_padding_rows

# Logits alive at once: on a CPU what stays in a core's cache, elsewhere what keeps a GPU busy (not
# measured). But always SLICE tokens of the vocabulary, so that a product with all N rows is large
# enough for full speed.
LOGITS_CPU, LOGITS = 2**18, 2**25
SLICE = 1024
BLOCK = 128  # rows of logits alive at once where there is a teacher, on a GPU more if LOGITS allow


def linear_nll(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """hidden [N, D], targets [N] int64 -> NLL in nats [N], float32 (float64 for a float64 base)."""
    return linear_losses(hidden, head, targets)[0]


def shifted_nll(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """hidden [B, T, D], labels [B, T] of the same tokens, -100 = not scored -> the mean NLL of the
    scored ones but the first of a row, each from the hidden state before it."""
    targets = labels[:, 1:].to(hidden.device)
    scored = targets != -100
    return linear_nll(hidden[:, :-1][scored], head, targets[scored]).mean()


def linear_losses(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    teacher: Tensor | None = None,
    kl_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `linear_nll`, with a teacher's hidden states [N, D] under the same head: loss [N] = (1
    - kl_weight) * NLL + kl_weight * KL(teacher || student), and the NLL [N] itself, without a
    gradient.

    The head is frozen, so the only gradient is the hidden states'. It is known as soon as the
    logits are, and is kept ([N, D]) in place of them ([N, V]): the logits of a slice or a block
    die with it.
    """
    with loading(head), align_module_device(head):  # it may rest on disk
        return _LinearLosses.apply(hidden, head.weight, head.bias, targets, teacher, kl_weight)


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, weight, bias, targets, teacher, kl_weight
    ):
        with_grad = ctx.needs_input_grad[0]
        loss: Any
        grad: Any
        if teacher is None:
            count, spare = len(hidden), count_padding_rows(hidden, weight, bias)
            rows, aims = (
                (F.pad(hidden, (0, 0, 0, spare)), F.pad(targets, (0, spare)))
                if spare
                else (hidden, targets)
            )
            loss, grad = streaming_nll(rows, weight, bias, aims, with_grad)
            loss, nll, grad = (
                loss[:count],
                loss[:count].clone(),
                None if grad is None else grad[:count],
            )
        else:
            size = BLOCK if hidden.device.type == "cpu" else max(BLOCK, LOGITS // len(weight))
            blocks = [slice(start, start + size) for start in range(0, max(1, len(hidden)), size)]
            parts = [
                distillation_block(
                    hidden[b], weight, bias, targets[b], teacher[b], kl_weight, with_grad
                )
                for b in blocks
            ]
            loss, nll, grad = (
                None if column[0] is None else torch.cat(column)
                for column in zip(*parts, strict=True)
            )
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, grad_loss, grad_nll):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return (grad * grad_loss[:, None]).to(grad.dtype), None, None, None, None, None


def streaming_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """NLL [N] and the hidden states' gradient [N, D], slice by slice of the vocabulary, for all
    rows at once, so that the head is read once. With l the logits, m their maximum so far and e
    = exp(l - m), kept are `rest`, the sum of e over all tokens but the target, and `pull`, the
    sum of e times the token's row of the head; both shrink where m grows. At the end

        NLL = log(rest + e[target]) + m - l[target]
        gradient = (pull - rest * head[target]) / (rest + e[target])

    The target stays out of the sums: its e, rounded to half precision, would not cancel against
    the 1 of a nearly certain token.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    width = max(
        SLICE, (LOGITS_CPU if hidden.device.type == "cpu" else LOGITS) // max(1, len(hidden))
    )
    target = targets[:, None]
    most = hidden.new_full((len(hidden), 1), -torch.inf, dtype=wide)
    rest, at_target = torch.zeros_like(most), torch.zeros_like(most)
    pull = torch.zeros_like(hidden, dtype=wide) if with_grad else None
    multiply = choose_linear(len(hidden))
    for start in range(0, len(weight), width):
        tokens = slice(start, start + width)
        here = weight[tokens]
        logits = multiply(hidden, here, None if bias is None else bias[tokens]).to(wide)
        before, most = most, torch.maximum(most, logits.amax(-1, keepdim=True))
        # A row whose target is elsewhere writes back what it has read.
        place = (target - start).clamp(0, len(here) - 1)
        found, inside = logits.gather(-1, place), place == target - start
        at_target = torch.where(inside, found, at_target)
        logits.scatter_(-1, place, found.masked_fill(inside, -torch.inf))
        e = logits.sub_(most).exp_()
        shrink = (before - most).exp_()
        rest = rest * shrink + e.sum(-1, keepdim=True)
        if pull is not None:
            pull *= shrink
            pull += multiply(e.to(weight.dtype), here.T)
    at_target -= most
    total = rest + at_target.exp()
    nll = (total.log() - at_target).squeeze(-1)
    return nll, None if pull is None else pull.addcmul_(rest, weight[targets], value=-1).div_(
        total
    ).to(hidden.dtype)


def distillation_block(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher: Tensor,
    kl_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss [b], NLL [b] and the hidden states' gradient [b, D] of a block of rows, with all
    their logits: where student and teacher agree, their difference must be taken before it is
    multiplied with the head."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    target = targets[:, None]
    multiply = choose_linear(len(hidden))
    logits = multiply(hidden, weight, bias).to(wide)
    logits -= logits.amax(-1, keepdim=True)
    at_target = logits.gather(-1, target).squeeze(-1)
    log_q = multiply(teacher, weight, bias).to(wide).log_softmax(-1)
    kl = (log_q.exp() * (log_q - logits)).sum(-1)  # but for log(total)
    p = logits.exp_()  # in place, and to be divided by `total`
    total = p.sum(-1)
    nll = total.log() - at_target
    loss = (1 - kl_weight) * nll + kl_weight * (kl + total.log())
    if not with_grad:
        return loss, nll, None
    # d loss / d logits = p - ((1 - kl_weight) * onehot + kl_weight * teacher's p)
    residue = p.div_(total[:, None])
    residue -= kl_weight * log_q.exp_()
    residue.scatter_add_(-1, target, torch.full_like(target, kl_weight - 1, dtype=wide))
    return loss, nll, multiply(residue.to(weight.dtype), weight.T)
