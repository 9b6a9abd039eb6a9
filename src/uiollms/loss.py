"""The loss head: negative log-likelihood of tokens from hidden states, never holding all logits at once.

Shapes: N scored tokens, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rows of logits alive at once. 128 x 49,152 float32 is 25 MB: large enough for full GEMM speed, small beside a chunk.
BLOCK = 128


def linear_nll(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """hidden [N, D], targets [N] int64 -> NLL in nats [N], float32 (float64 for a float64 base).

    The head is frozen, so the only gradient is the hidden states'. It is known as soon as the logits are, and is kept
    ([N, D]) in place of them ([N, V]): the logits of a block die with the block.
    """
    return _LinearNLL.apply(hidden, head.weight, head.bias, targets)


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        nll = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, hidden.shape[0], BLOCK):
            rows = slice(start, start + BLOCK)
            logits = F.linear(hidden[rows], weight, bias).to(wide)
            log_z = logits.logsumexp(-1, keepdim=True)
            target = targets[rows, None]
            nll[rows] = (log_z - logits.gather(-1, target)).squeeze(-1)
            if grad is not None:
                # d nll / d logits = softmax - onehot
                probs = logits.sub_(log_z).exp_()
                probs.scatter_add_(-1, target, torch.full_like(target, -1, dtype=wide))
                grad[rows] = probs.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return (grad * grad_nll[:, None]).to(grad.dtype), None, None, None
