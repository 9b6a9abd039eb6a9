"""The loss head: the losses of tokens from their hidden states, without ever holding all logits.

Shapes: N scored tokens, D hidden size, V vocabulary, w tokens of one slice of it, b rows of one
block. Source of going through the vocabulary slice by slice: Wijmans et al. 2024 (Cut
Cross-Entropy, arXiv 2411.09009), without its filter; of the running maximum: Milakov and
Gimelshein 2018 (arXiv 1805.02867).
"""

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

from uiollms.kernels.devices import offload_lock
from uiollms.kernels.frozen_linear import choose_linear, count_padding_rows

# The most logits that exist at a time: on a CPU they stay in a core's cache, on a GPU they keep it
# busy (not measured). A slice has at least SLICE tokens of the vocabulary, so that a product with
# all N rows is large enough for full speed.
LOGITS_CPU, LOGITS = 2**18, 2**25
SLICE = 1024
BLOCK = 128  # with a teacher: rows of logits that exist at a time; on a GPU more, up to LOGITS


def linear_nll(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Computes the NLL [N] in nats of targets [N] int64 from hidden states [N, D], in float32
    (float64 for a float64 base)."""
    return linear_losses(hidden, head, targets)[0]


def shifted_nll(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """Computes the mean NLL of labels [B, T], each from the hidden state before it in [B, T, D].
    Labels of -100, and the first label of every row, are not scored."""
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
    """Computes the loss [N] and the NLL [N] of targets [N] int64 from hidden states [N, D]. With a
    teacher's hidden states [N, D], which go through the same head, the loss is (1 - kl_weight) *
    NLL + kl_weight * KL(teacher || student). The NLL has no gradient.

    The head is frozen, so the hidden states are all that has a gradient. It is computed with the
    logits and saved, [N, D], in their place, [N, V]. The logits of a slice or a block are freed
    with it.
    """
    with offload_lock(head), align_module_device(head):  # its weights may be on disk
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
            num_rows, padding = len(hidden), count_padding_rows(hidden, weight, bias)
            if padding:
                hidden, targets = F.pad(hidden, (0, 0, 0, padding)), F.pad(targets, (0, padding))
            loss, grad = streaming_nll(hidden, weight, bias, targets, with_grad)
            loss, nll = loss[:num_rows], loss[:num_rows].clone()
            grad = None if grad is None else grad[:num_rows]
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
    """Computes the NLL [N] and the gradient of the hidden states [N, D], slice by slice of the
    vocabulary and for all rows at once, so that the head is read once.

    With l the logits, m their maximum so far and e = exp(l - m), two sums are kept: `rest`, the sum
    of e over all tokens except the target, and `pull`, the sum of e times the token's row of the
    head. Both are scaled down where m grows. At the end

        NLL = log(rest + e[target]) + m - l[target]
        gradient = (pull - rest * head[target]) / (rest + e[target])

    The target is not part of the sums, because its e, rounded to half precision, would not cancel
    against the 1 of a nearly certain token.
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
        head_slice = weight[tokens]
        logits = multiply(hidden, head_slice, None if bias is None else bias[tokens]).to(wide)
        previous, most = most, torch.maximum(most, logits.amax(-1, keepdim=True))
        # A row whose target is in another slice writes back the value that it has read.
        index = (target - start).clamp(0, len(head_slice) - 1)
        found, inside = logits.gather(-1, index), index == target - start
        at_target = torch.where(inside, found, at_target)
        logits.scatter_(-1, index, found.masked_fill(inside, -torch.inf))
        e = logits.sub_(most).exp_()
        shrink = (previous - most).exp_()
        rest = rest * shrink + e.sum(-1, keepdim=True)
        if pull is not None:
            pull *= shrink
            pull += multiply(e.to(weight.dtype), head_slice.T)
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
    """Computes the loss [b], the NLL [b] and the gradient of the hidden states [b, D] of one block
    of rows from all their logits. Where student and teacher agree, the difference of their
    probabilities must be taken before it is multiplied with the head."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    target = targets[:, None]
    multiply = choose_linear(len(hidden))
    logits = multiply(hidden, weight, bias).to(wide)
    logits -= logits.amax(-1, keepdim=True)
    at_target = logits.gather(-1, target).squeeze(-1)
    log_q = multiply(teacher, weight, bias).to(wide).log_softmax(-1)
    kl = (log_q.exp() * (log_q - logits)).sum(-1)  # except for log(total)
    p = logits.exp_()  # in place; divided by `total` below
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
