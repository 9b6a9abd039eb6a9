"""The baseline: the straightforward algorithm, with three copies of the model, one chunk at a time
and retained graphs.

For every chunk t, all memories so far are projected again and read by the decoder. The loss goes
backward through the retained encoder graphs of the S chunks in the reservoir. Then chunk t is
encoded with its graph and may enter the reservoir. Masks are dense, all logits of a chunk exist at
once, and the loss is torch's cross-entropy. The gradients equal those of `uiollms.gradient_step`
with the same draws (tests/benchmarks/test_benchmarks.py).

Shapes: l chunk_size, m num_memory, T tokens of a chunk, L layers, D hidden size, H key/value
heads, K head size. Source: UIO-LLMs section 3.3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from uiollms.data.sample import IGNORED, Sample
from uiollms.model.memory_lm import MemoryLM
from uiollms.training.estimators import window_from_draws


class WithLoRA(nn.Module):
    """A frozen linear layer plus `alpha / rank * B A x`."""

    def __init__(self, linear: nn.Linear, lora: Any) -> None:
        super().__init__()
        self.linear, self.scaling = linear, lora.scaling
        self.lora_A, self.lora_B = (
            nn.Parameter(lora.lora_A.detach().clone()),
            nn.Parameter(lora.lora_B.detach().clone()),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = (weight.to(x.dtype) for weight in (self.lora_A, self.lora_B))
        return self.linear(x) + F.linear(F.linear(x, a), b) * self.scaling


class Baseline(nn.Module):
    """Encoder, decoder and teacher as three models, with trained weights copied from `model`, which
    must be a Llama.

    whole: whether the encoder also runs its last layer and LM head, whose results are not used. The
           released program runs them.
    """

    def __init__(self, model: MemoryLM) -> None:
        super().__init__()
        self.whole = False
        self.config = model.memory_config
        self.encoder, self.decoder, self.teacher = (copy.deepcopy(model.base) for _ in range(3))
        self.retrieval_token = nn.Parameter(
            model.encoder.get_parameter("retrieval_token").detach().clone()
        )
        self.transfer = nn.ModuleList()
        for i, (read, write) in enumerate(
            zip(self.encoder.model.layers, self.decoder.model.layers, strict=True)
        ):
            for name, lora in model.encoder.layers[i].items():
                setattr(read.self_attn, name, WithLoRA(getattr(read.self_attn, name), lora))
            pair = model.decoder.layers[i].items()
            self.transfer.append(
                nn.ModuleDict(
                    {name: WithLoRA(getattr(write.self_attn, name), lora) for name, lora in pair}
                )
            )

    def gradients(self) -> dict[str, Tensor]:
        """Returns the gradients, with the names of `MemoryLM.trainable_parameters`."""
        found: dict[str, Tensor | None] = {"encoder.retrieval_token": self.retrieval_token.grad}
        for i, (layer, pair) in enumerate(
            zip(self.encoder.model.layers, self.transfer, strict=True)
        ):
            for name in ("q_proj", "v_proj"):
                found |= {
                    f"encoder.layers.{i}.{name}.{p}": w.grad
                    for p, w in lora_of(getattr(layer.self_attn, name))
                }
            for name in ("k_proj", "v_proj"):
                found |= {f"decoder.layers.{i}.{name}.{p}": w.grad for p, w in lora_of(pair[name])}
        return {name: grad for name, grad in found.items() if grad is not None}

    def encode(self, ids: Tensor) -> list[Tensor]:
        """Encodes one chunk with a dense mask: [l] token ids -> L tensors [1, m, D]. Without
        `whole`, the last layer runs its input norm only."""
        l, m = self.config.chunk_size, self.config.num_memory
        model, device = self.encoder.model, self.encoder.device
        tokens = model.embed_tokens(ids[None].to(device))
        slots = self.retrieval_token.expand(1, m, -1).to(tokens.dtype)
        hidden = torch.cat([tokens, slots], dim=1)
        ends = (torch.arange(m) + 1) * (l // m)
        positions = torch.cat([torch.arange(l), ends])[None]
        mask = torch.zeros(l + m, l + m, dtype=torch.bool)
        mask[:l, :l] = torch.ones(l, l, dtype=torch.bool).tril()
        mask[l:, :l] = torch.arange(l) < ends[:, None]
        mask[l:, l:] = torch.eye(m, dtype=torch.bool)
        positions, mask = positions.to(device), mask.to(device)
        rotary = model.rotary_emb(hidden, positions)
        memory = []
        for i, layer in enumerate(model.layers):
            memory.append(layer.input_layernorm(hidden)[:, l:])
            if i + 1 < len(model.layers) or self.whole:
                hidden = layer(
                    hidden,
                    attention_mask=mask[None, None],
                    position_ids=positions,
                    position_embeddings=rotary,
                )
        if self.whole:
            self.encoder.lm_head(model.norm(hidden))
        return memory

    def project(self, memories: Sequence[list[Tensor]]) -> DynamicCache:
        """Projects all memories so far into a KV cache, which the next chunk reads."""
        cache = DynamicCache()
        if not memories:
            return cache
        slots = sum(memory[0].shape[1] for memory in memories)
        positions = torch.arange(slots, device=self.decoder.device)[None]
        rotary = self.decoder.model.rotary_emb(memories[0][0], positions)
        for i, (layer, pair) in enumerate(
            zip(self.decoder.model.layers, self.transfer, strict=True)
        ):
            joined = torch.cat([memory[i] for memory in memories], dim=1)
            shape = (1, slots, -1, layer.self_attn.head_dim)
            keys, values = (
                pair[name](joined).view(shape).transpose(1, 2) for name in ("k_proj", "v_proj")
            )
            cache.update(apply_rotary_pos_emb(keys, keys, *rotary)[1], values, i)
        return cache

    def nll(self, ids: Tensor, targets: Tensor, memories: Sequence[list[Tensor]]) -> Tensor:
        """NLL [T] of [T] tokens that read the memories, 0 where a token is not scored. All logits
        [T, V] exist at once."""
        ids, targets = (x.to(self.decoder.device) for x in (ids, targets))
        logits = self.decoder(ids[None], past_key_values=self.project(memories)).logits[0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORED, reduction="none")

    def train_step(self, sample: Sample, S: int, draws: Sequence[int]) -> Tensor:
        """Runs one training step of the `uio` estimator on a document and returns its loss. `draws`
        are those of `window_from_draws`."""
        weights = window_from_draws(draws, S, True, len(sample.rows))
        memories: list[list[Tensor]] = []  # with their graphs while in the reservoir
        reservoir: list[int] = []
        total = torch.zeros((), device=self.decoder.device)
        for t, row in enumerate(sample.rows):
            # w * m + (1 - w) * detach(m) has the value m and w times its gradient, which is the
            # compensation of the estimator.
            w = weights[t].max().item()
            read = [
                [w * m + (1 - w) * m.detach() if m.requires_grad else m for m in memory]
                for memory in memories
            ]
            with torch.set_grad_enabled(t > 0):
                nll = self.nll(row.input_ids, row.targets, read)
                loss = (nll * row.token_weights.to(nll)).sum()
            if t > 0:
                loss.backward(retain_graph=True)
            total = total + loss.detach()
            if t == len(sample.chunks):
                break
            memories.append(self.encode(row.input_ids))
            if t < S:
                reservoir.append(t)
            else:
                dropped = t
                if draws[t - S] < S:
                    dropped, reservoir[draws[t - S]] = reservoir[draws[t - S]], t
                memories[dropped] = [m.detach() for m in memories[dropped]]
        return total

    @torch.no_grad()
    def score(self, sample: Sample) -> Tensor:
        """NLL [T'] of all scored tokens of a document, computed chunk by chunk."""
        memories: list[list[Tensor]] = []
        parts = []
        for t, row in enumerate(sample.rows):
            nll = self.nll(row.input_ids, row.targets, memories)
            parts.append(nll[row.scored.to(nll.device)])
            if t < len(sample.chunks):
                memories.append(self.encode(row.input_ids))
        return torch.cat(parts)


def lora_of(module: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, getattr(module, name)) for name in ("lora_A", "lora_B")]
