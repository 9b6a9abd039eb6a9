"""What a model of the supported families computes, written from the definitions in float64, without
transformers' layers: norms, rotary positions of every scheme, grouped queries, windows, and the
memory of the paper's sections 3.1 and 3.2. One row at a time, masks written out pair by pair.

Shapes: T tokens, D hidden size, N attention heads, H key/value heads, K head size, M slots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Variant:
    """A small model: family, what its config.json says beyond SHAPE, and what that means.

    windows: by layer, the last so many tokens that are seen; None = all. positions: that it
    serves. near: the longest text that longrope calls short."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    windows: Sequence[int | None] = (None, None, None)
    positions: int = 64
    near: int | None = None


def frequencies(
    rope: dict[str, Any],
    size: int,
    positions: int,
    far: bool,
) -> tuple[list[float], float]:
    """Radians by which one position turns each pair of a head's numbers, and what cosines and
    sines are multiplied by. rope: the config's parameters; positions: max_position_embeddings."""
    theta, factor = rope.get("rope_theta", 10000.0), rope.get("factor")
    plain = [theta ** (-2 * i / size) for i in range(size // 2)]
    original = rope.get("original_max_position_embeddings", positions)
    kind = rope.get("rope_type", "default")
    if kind in ("default", "dynamic"):  # dynamic NTK up to max_position_embeddings: base unchanged
        return plain, 1.0
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        found = []
        for f in plain:
            turns = original * f / (2 * math.pi)  # of this pair over the original context
            blend = min(1.0, max(0.0, (turns - low) / (high - low)))
            found.append((1 - blend) * f / factor + blend * f)
        return found, 1.0
    if kind == "longrope":
        scale = positions / original if factor is None else factor
        grown = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
        by = rope["long_factor"] if far else rope["short_factor"]
        found = [f / x for f, x in zip(plain, by, strict=True)]
        return found, rope.get("attention_factor") or grown
    assert kind == "yarn"

    def pair_that_turns(times: float) -> float:
        """At which pair (not a whole number) a head turns so often over the original context."""
        return size * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    start = pair_that_turns(rope.get("beta_fast", 32))
    stop = pair_that_turns(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        start, stop = math.floor(start), math.ceil(stop)
    start, stop = max(start, 0), min(stop, size - 1)
    stop += 0.001 if start == stop else 0
    found = []
    for i, f in enumerate(plain):
        slowed = min(1.0, max(0.0, (i - start) / (stop - start)))
        found.append(slowed * f / factor + (1 - slowed) * f)

    def temperature(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1

    scaled = temperature(1)
    if "mscale" in rope:
        scaled = temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return found, rope.get("attention_factor") or scaled


class Oracle:
    """weights: the base's, by their names in its file; variant: as it was made; shape: of its
    config, by the names there; memory: what is trained, by name, and the compressor's fields."""

    def __init__(
        self,
        variant: Variant,
        shape: dict[str, Any],
        weights: dict[str, Tensor],
        trained: dict[str, Tensor] | None = None,
        memory: Any = None,
    ) -> None:
        self.variant, self.shape, self.memory = variant, shape, memory
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.trained = {name: tensor.double() for name, tensor in (trained or {}).items()}
        self.heads, self.kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.size = shape.get("head_dim") or shape["hidden_size"] // self.heads

    # ---- parts --------------------------------------------------------------------------------

    def linear(self, name: str, x: Tensor, role: str | None = None) -> Tensor:
        """A projection, with the LoRA of a role."""
        y = x @ self.weights[f"model.{name}.weight"].T
        y = y + self.weights.get(f"model.{name}.bias", torch.zeros(()))
        if role:
            where = f"{role}.{name.replace('.self_attn', '')}"
            a, b = self.trained[f"{where}.lora_A"], self.trained[f"{where}.lora_B"]
            y = y + self.memory.lora_alpha / self.memory.lora_rank * (x @ a.T @ b.T)
        return y

    def norm(self, name: str, x: Tensor) -> Tensor:
        size = x.pow(2).mean(-1, keepdim=True) + self.shape.get("rms_norm_eps", 1e-6)
        return x / size.sqrt() * self.weights[f"model.{name}.weight"]

    def split(self, x: Tensor, heads: int) -> Tensor:
        """[T, heads * K] -> [T, heads, K]"""
        return x.view(len(x), heads, self.size)

    def head_norm(self, layer: int, which: str, x: Tensor) -> Tensor:
        name = f"layers.{layer}.self_attn.{which}_norm"
        return self.norm(name, x) if f"model.{name}.weight" in self.weights else x

    def rotated(self, x: Tensor, positions: Sequence[int], far: bool) -> Tensor:
        """[T, heads, K], token by token: pair i is number i and number i + K / 2 of a head."""
        original = "original_max_position_embeddings"  # may stand beside the others, as in Phi-3
        beside = {original: self.shape[original]} if original in self.shape else {}
        rope = self.shape.get("rope_parameters", {}) | beside
        turns, scale = frequencies(rope, self.size, self.shape["max_position_embeddings"], far)
        rows = []
        for vectors, position in zip(x, positions, strict=True):
            first, second = vectors.chunk(2, dim=-1)
            cos = torch.tensor([scale * math.cos(position * f) for f in turns], dtype=torch.float64)
            sin = torch.tensor([scale * math.sin(position * f) for f in turns], dtype=torch.float64)
            rows.append(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))
        return torch.stack(rows) if rows else x

    def attention(self, q: Tensor, k: Tensor, v: Tensor, sees: list[list[bool]]) -> Tensor:
        """[T, N, K], twice [S, H, K] -> [T, N * K]; query head n reads key head n // (N / H)"""
        outputs = []
        hidden = ~torch.tensor(sees)
        for n in range(self.heads):
            h = n // (self.heads // self.kv_heads)
            scores = q[:, n] @ k[:, h].T / math.sqrt(self.size)
            outputs.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, h])
        return torch.cat(outputs, dim=-1)

    def layer(
        self,
        i: int,
        x: Tensor,
        positions: Sequence[int],
        far: bool,
        sees: list[list[bool]],
        role: str | None,
        front: tuple[Tensor, Tensor],
    ) -> Tensor:
        """front: keys and values that stand before the tokens' own, [M, H, K] each."""
        at = f"layers.{i}"
        normed = self.norm(f"{at}.input_layernorm", x)
        q = self.split(self.linear(f"{at}.self_attn.q_proj", normed, role), self.heads)
        k = self.split(self.linear(f"{at}.self_attn.k_proj", normed), self.kv_heads)
        v = self.split(self.linear(f"{at}.self_attn.v_proj", normed, role), self.kv_heads)
        q = self.rotated(self.head_norm(i, "q", q), positions, far)
        k = self.rotated(self.head_norm(i, "k", k), positions, far)
        k, v = (torch.cat([before, own]) for before, own in zip(front, (k, v), strict=True))
        x = x + self.linear(f"{at}.self_attn.o_proj", self.attention(q, k, v, sees))
        normed = self.norm(f"{at}.post_attention_layernorm", x)
        gate, up = (self.linear(f"{at}.mlp.{name}_proj", normed) for name in ("gate", "up"))
        return x + self.linear(f"{at}.mlp.down_proj", F.silu(gate) * up)

    # ---- passes -------------------------------------------------------------------------------

    def read(self, ids: Tensor, slots: Any = None) -> Tensor:
        """[T] -> logits [T, V]. slots: by layer keys, rotated, and values [M, H, K] in front of
        the tokens, all of which they see, whatever window a layer has."""
        count = self.shape["num_hidden_layers"]
        nothing = torch.zeros(0, self.kv_heads, self.size, dtype=torch.float64)
        slots = slots or [(nothing, nothing)] * count
        M, T = len(slots[0][0]), len(ids)
        x = self.weights["model.embed_tokens.weight"][ids]
        for i, window in enumerate(self.variant.windows):
            reach = T if window is None else window
            sees = [[True] * M + [q - reach < k <= q for k in range(T)] for q in range(T)]
            x = self.layer(i, x, range(M, M + T), self.far(M, T), sees, None, slots[i])
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.norm("norm", x) @ head.T

    def far(self, num_slots: int, length: int) -> bool:
        """Whether a row is rotated by longrope's long factors."""
        near = self.variant.near
        if near is None:
            return False
        return self.variant.positions > near if num_slots else length > near

    def encode(self, ids: Tensor) -> list[Tensor]:
        """A chunk [l] -> what every layer's attention reads at the slots, [m, D] each."""
        l, m = self.memory.chunk_size, self.memory.num_memory
        tokens = self.weights["model.embed_tokens.weight"][ids]
        ends = [(i + 1) * (l // m) for i in range(m)]
        if self.memory.slot_input == "last":  # slot i sees tokens 0 .. ends[i] - 1
            x = torch.cat([tokens, *(tokens[end - 1 : end] for end in ends)])
        else:
            token = self.trained["encoder.retrieval_token"].view(1, -1)
            x = torch.cat([tokens, token.expand(m, -1)])
        sees = [[k <= q for k in range(l)] + [False] * m for q in range(l)]
        for i, end in enumerate(ends):
            sees.append([k < end for k in range(l)] + [j == i for j in range(m)])
        nothing = (torch.zeros(0, self.kv_heads, self.size, dtype=torch.float64),) * 2
        found = []
        for i in range(self.shape["num_hidden_layers"]):
            found.append(self.norm(f"layers.{i}.input_layernorm", x)[l:])
            x = self.layer(i, x, [*range(l), *ends], False, sees, "encoder", nothing)
        return found

    def slots(self, chunks: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """By layer keys, rotated, and values [M, H, K] of the memories of a document's chunks."""
        m, memories = self.memory.num_memory, [self.encode(chunk) for chunk in chunks]
        found = []
        for i in range(self.shape["num_hidden_layers"] if chunks else 0):
            whole = torch.cat([memory[i] for memory in memories])
            at = f"layers.{i}.self_attn"
            k = self.split(self.linear(f"{at}.k_proj", whole, "decoder"), self.kv_heads)
            v = self.split(self.linear(f"{at}.v_proj", whole, "decoder"), self.kv_heads)
            k = self.head_norm(i, "k", k)
            found.append((self.rotated(k, range(m * len(chunks)), self.far(m, 0)), v))
        return found

    def stream(self, ids: Tensor, memories_of: Tensor | None = None) -> Tensor:
        """[T] -> logits [T, V]: every chunk behind the memories of all before it (of another
        document's chunks, if given) and the last tokens before it, read again."""
        chunks = ids.split(self.memory.chunk_size)
        read = chunks if memories_of is None else memories_of.split(self.memory.chunk_size)
        rows = []
        for t, chunk in enumerate(chunks):
            front = ids[max(0, t * self.memory.chunk_size - self.memory.recent_tokens) :]
            front = front[: self.memory.recent_tokens if t else 0]
            rows.append(self.read(torch.cat([front, chunk]), self.slots(read[:t]))[len(front) :])
        return torch.cat(rows)
