"""A stand-in for torch's flash kernels on CUDA, for a CPU and float64.

It has the signatures and layouts of `aten._flash_attention_forward` and `_backward`, checks its
arguments as the kernels do, and computes every row alone with dense matrices.
"""

import pytest
import torch

from uiollms.kernels import flash_calls


class FlashStandIn:
    """Replaces `torch.ops.aten` in kernels/flash_calls.py. calls: how many kernels were called."""

    def __init__(self):
        self.calls = 0

    def rows(self, query, key, starts_q, starts_k, max_q, max_k):
        self.calls += 1
        for starts, packed, longest in ((starts_q, query, max_q), (starts_k, key, max_k)):
            assert packed.dim() == 3 and packed.stride(-1) == 1
            assert starts.dtype == torch.int32 and starts.dim() == 1
            lengths = starts.diff()
            assert starts[0] == 0 and starts[-1] == len(packed) and lengths.max() == longest
            assert lengths.min() > 0  # a row without keys has no softmax
        pairs = zip(starts_q.tolist(), starts_q.tolist()[1:], strict=False)
        keys = zip(starts_k.tolist(), starts_k.tolist()[1:], strict=False)
        for (a, b), (c, d) in zip(pairs, keys, strict=True):
            yield slice(a, b), slice(c, d)

    def scores(self, query, key, causal, scale):
        """[T, N, K], [S, H, K] -> [N, T, S], aligned at the bottom right."""
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = torch.einsum("tnk,snk->nts", query, keys) * scale
        if causal:
            T, S = scores.shape[1:]
            hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores

    def _flash_attention_forward(
        self, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, *, scale=None,
    ):  # fmt: skip
        assert dropout_p == 0 and return_debug_mask is False
        out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
        for q, k in self.rows(query, key, cum_seq_q, cum_seq_k, max_q, max_k):
            scores = self.scores(query[q], key[k], is_causal, scale)
            values = value[k].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            out[q] = torch.einsum("nts,snk->tnk", scores.softmax(-1), values)
            lse[:, q] = scores.logsumexp(-1)
        return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    def _flash_attention_backward(
        self, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
        dropout_p, is_causal, rng_state, unused, *, scale=None,
    ):  # fmt: skip
        assert dropout_p == 0 and grad_out.stride(-1) == out.stride(-1) == 1
        assert logsumexp.shape == (query.shape[1], len(query))
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        for q, k in self.rows(query, key, cum_seq_q, cum_seq_k, max_q, max_k):
            scores = self.scores(query[q], key[k], is_causal, scale)
            p = (scores - logsumexp[:, q, None]).exp()  # [N, T, S]
            keys, values = (x[k].repeat_interleave(groups, dim=1) for x in (key, value))
            d_p = torch.einsum("tnk,snk->nts", grad_out[q], values)
            delta = (grad_out[q] * out[q]).sum(-1).T[..., None]  # [N, T, 1]
            d_scores = p * (d_p - delta) * scale
            d_query[q] = torch.einsum("nts,snk->tnk", d_scores, keys)
            for d, per_head in (
                (d_key, torch.einsum("nts,tnk->snk", d_scores, query[q])),
                (d_value, torch.einsum("nts,tnk->snk", p, grad_out[q])),
            ):
                d[k] = per_head.unflatten(1, (-1, groups)).sum(2)
        return d_query, d_key, d_value


def use_stand_in(monkeypatch: pytest.MonkeyPatch) -> FlashStandIn:
    """Runs the CUDA code of kernels/flash_calls.py on a CPU."""
    stand_in = FlashStandIn()
    monkeypatch.setattr(flash_calls, "aten", stand_in)
    monkeypatch.setitem(flash_calls.KERNELS, "cpu", flash_calls.KERNELS["cuda"])
    return stand_in
