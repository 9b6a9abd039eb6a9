"""The loss head: losses of tokens from hidden states, never holding all logits at once.

Shapes: N scored tokens, D hidden size, V vocabulary.
"""

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

# Rows of logits alive at once: a quarter of the tokens, within these bounds. 128 x 49,152 float32 is 25 MB, small beside a chunk;
# products of 512 rows are within a few percent of full GEMM speed (of 128 rows, 15 to 25 % below it on an EPYC).
BLOCKS = 128, 512


def linear_nll(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """hidden [N, D], targets [N] int64 -> NLL in nats [N], float32 (float64 for a float64 base)."""
    return linear_losses(hidden, head, targets)[0]


def linear_losses(
    hidden: Tensor, head: nn.Linear, targets: Tensor, teacher: Tensor | None = None, kl_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `linear_nll`, with a teacher's hidden states [N, D] under the same head:
    loss [N] = (1 - kl_weight) * NLL + kl_weight * KL(teacher || student), and the NLL [N] itself, without a gradient.

    The head is frozen, so the only gradient is the hidden states'. It is known as soon as the logits are, and is kept
    ([N, D]) in place of them ([N, V]): the logits of a block die with the block.
    """
    with align_module_device(head):  # it may rest on disk
        return _LinearLosses.apply(hidden, head.weight, head.bias, targets, teacher, kl_weight)


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, teacher, kl_weight):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        nll = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        loss = nll if teacher is None else torch.empty_like(nll)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        least, most = BLOCKS
        block = min(most, max(least, hidden.shape[0] // 4))
        for start in range(0, hidden.shape[0], block):
            rows = slice(start, start + block)
            taught = None if teacher is None else teacher[rows]
            into = None if grad is None else grad[rows]
            _block_losses(hidden[rows], weight, bias, targets[rows, None], taught, kl_weight, loss[rows], nll[rows], into)
        ctx.save_for_backward(grad)
        nll_out = nll.clone() if loss is nll else nll
        ctx.mark_non_differentiable(nll_out)
        return loss, nll_out

    @staticmethod
    def backward(ctx, grad_loss, grad_nll):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return (grad * grad_loss[:, None]).to(grad.dtype), None, None, None, None, None


def _block_losses(  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, teacher, kl_weight, loss, nll, grad
) -> None:
    """One block of rows [b, D], target [b, 1]: writes loss [b], nll [b] and, unless None, the hidden states' gradient [b, D]. All
    that is [b, V] dies with the call, before the next block is begun."""
    logits = F.linear(hidden, weight, bias).to(nll.dtype)
    logits -= logits.amax(-1, keepdim=True)
    at_target = logits.gather(-1, target).squeeze(-1)
    log_q = kl = None
    if teacher is not None:
        log_q = F.linear(teacher, weight, bias).to(nll.dtype).log_softmax(-1)
        kl = (log_q.exp() * (log_q - logits)).sum(-1)  # but for log(total)
    p = logits.exp_()  # in place, and to be divided by `total`: the block is never held twice
    total = p.sum(-1)
    torch.sub(total.log(), at_target, out=nll)
    if kl is not None:
        loss.copy_((1 - kl_weight) * nll + kl_weight * (kl + total.log()))
    if grad is not None:
        # d loss / d logits = p - ((1 - kl_weight) * onehot + kl_weight * teacher's p)
        residue = p.div_(total[:, None])
        if log_q is not None:
            residue -= kl_weight * log_q.exp_()
        onehot = 1.0 if teacher is None else 1 - kl_weight
        residue.scatter_add_(-1, target, torch.full_like(target, -1, dtype=nll.dtype) * onehot)
        grad.copy_(residue.to(weight.dtype) @ weight)
