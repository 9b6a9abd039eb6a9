"""An oracle: a model of the supported families, written from the definitions in float64, without the
layers of transformers.

It has norms, RoPE of every scheme, grouped queries, sliding windows, and the memory of the paper's
sections 3.1 and 3.2. It computes one row at a time, with masks given for every pair of tokens.

Shapes: T tokens, S keys, D hidden size, N attention heads, H key/value heads, K head size, M slots,
l chunk_size, m num_memory, V vocabulary.
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
    """A small model: its family, the fields of its config.json that differ from SHAPE, and their
    meaning.

    windows: for each layer how many of the last tokens a token sees, None for all. positions: how
    many positions the model serves. num_short: the length of the longest text that longrope
    rotates by its short factors; None for other schemes.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    windows: Sequence[int | None] = (None, None, None)
    positions: int = 64
    num_short: int | None = None


def frequencies(
    rope: dict[str, Any],
    size: int,
    positions: int,
    use_long: bool,
) -> tuple[list[float], float]:
    """Returns the angle in radians by which one position rotates each pair of a head's numbers, and
    the factor of cosines and sines. rope: the config's rope_parameters. size: K. positions:
    max_position_embeddings. use_long: whether longrope uses its long factors."""
    theta, factor = rope.get("rope_theta", 10000.0), rope.get("factor")
    plain = [theta ** (-2 * i / size) for i in range(size // 2)]
    original = rope.get("original_max_position_embeddings", positions)
    kind = rope.get("rope_type", "default")
    if kind in ("default", "dynamic"):  # dynamic changes nothing up to max_position_embeddings
        return plain, 1.0
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        found = []
        for f in plain:
            turns = original * f / (2 * math.pi)  # rotations of this pair in the original context
            blend = min(1.0, max(0.0, (turns - low) / (high - low)))
            found.append((1 - blend) * f / factor + blend * f)
        return found, 1.0
    if kind == "longrope":
        scale = positions / original if factor is None else factor
        grown = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
        by = rope["long_factor"] if use_long else rope["short_factor"]
        found = [f / x for f, x in zip(plain, by, strict=True)]
        return found, rope.get("attention_factor") or grown
    assert kind == "yarn"

    def pair_with_rotations(times: float) -> float:
        """Returns the fractional index of the pair that rotates so often in the original context."""
        return size * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    start = pair_with_rotations(rope.get("beta_fast", 32))
    stop = pair_with_rotations(rope.get("beta_slow", 1))
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
    """A model that computes the expected results.

    variant: the model that is imitated. shape: the fields of its config. weights: the tensors of
    the base by name. trained: the tensors of `memory_state_dict`. memory: the compressor config.
    """

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
        """Applies a projection, with the LoRA of a role if one is given."""
        y = x @ self.weights[f"model.{name}.weight"].T
        y = y + self.weights.get(f"model.{name}.bias", torch.zeros(()))
        if role:
            prefix = f"{role}.{name.replace('.self_attn', '')}"
            a, b = self.trained[f"{prefix}.lora_A"], self.trained[f"{prefix}.lora_B"]
            y = y + self.memory.lora_alpha / self.memory.lora_rank * (x @ a.T @ b.T)
        return y

    def norm(self, name: str, x: Tensor) -> Tensor:
        size = x.pow(2).mean(-1, keepdim=True) + self.shape.get("rms_norm_eps", 1e-6)
        return x / size.sqrt() * self.weights[f"model.{name}.weight"]

    def split(self, x: Tensor, heads: int) -> Tensor:
        """Maps [T, heads * K] to [T, heads, K]."""
        return x.view(len(x), heads, self.size)

    def head_norm(self, layer: int, which: str, x: Tensor) -> Tensor:
        name = f"layers.{layer}.self_attn.{which}_norm"
        return self.norm(name, x) if f"model.{name}.weight" in self.weights else x

    def rotate(self, x: Tensor, positions: Sequence[int], use_long: bool) -> Tensor:
        """Rotates x [T, heads, K] to positions. Pair i consists of the numbers i and i + K / 2 of a
        head."""
        original = "original_max_position_embeddings"  # in some configs outside rope_parameters
        outside = {original: self.shape[original]} if original in self.shape else {}
        rope = self.shape.get("rope_parameters", {}) | outside
        positions_served = self.shape["max_position_embeddings"]
        turns, scale = frequencies(rope, self.size, positions_served, use_long)
        rows = []
        for vectors, position in zip(x, positions, strict=True):
            first, second = vectors.chunk(2, dim=-1)
            cos = torch.tensor([scale * math.cos(position * f) for f in turns], dtype=torch.float64)
            sin = torch.tensor([scale * math.sin(position * f) for f in turns], dtype=torch.float64)
            rows.append(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))
        return torch.stack(rows) if rows else x

    def attention(self, q: Tensor, k: Tensor, v: Tensor, sees: list[list[bool]]) -> Tensor:
        """Attends from queries [T, N, K] to keys and values [S, H, K] where `sees` [T, S] is true.
        Returns [T, N * K]. Query head n reads key head n // (N / H)."""
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
        use_long: bool,
        sees: list[list[bool]],
        role: str | None,
        slots: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Runs layer i on hidden states x [T, D]. slots: keys and values [M, H, K] before those of
        the tokens."""
        name = f"layers.{i}"
        normed = self.norm(f"{name}.input_layernorm", x)
        q = self.split(self.linear(f"{name}.self_attn.q_proj", normed, role), self.heads)
        k = self.split(self.linear(f"{name}.self_attn.k_proj", normed), self.kv_heads)
        v = self.split(self.linear(f"{name}.self_attn.v_proj", normed, role), self.kv_heads)
        q = self.rotate(self.head_norm(i, "q", q), positions, use_long)
        k = self.rotate(self.head_norm(i, "k", k), positions, use_long)
        k, v = (torch.cat(pair) for pair in zip(slots, (k, v), strict=True))
        x = x + self.linear(f"{name}.self_attn.o_proj", self.attention(q, k, v, sees))
        normed = self.norm(f"{name}.post_attention_layernorm", x)
        gate, up = (self.linear(f"{name}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        return x + self.linear(f"{name}.mlp.down_proj", F.silu(gate) * up)

    # ---- passes -------------------------------------------------------------------------------

    def read(self, ids: Tensor, slots: Any = None) -> Tensor:
        """Returns the logits [T, V] of ids [T]. slots: for each layer rotated keys, and values,
        [M, H, K] before those of the tokens. All tokens see them, whatever the sliding window."""
        count = self.shape["num_hidden_layers"]
        empty = torch.zeros(0, self.kv_heads, self.size, dtype=torch.float64)
        slots = slots or [(empty, empty)] * count
        M, T = len(slots[0][0]), len(ids)
        x = self.weights["model.embed_tokens.weight"][ids]
        for i, window in enumerate(self.variant.windows):
            reach = T if window is None else window
            sees = [[True] * M + [q - reach < k <= q for k in range(T)] for q in range(T)]
            x = self.layer(i, x, range(M, M + T), self.uses_long(M, T), sees, None, slots[i])
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.norm("norm", x) @ head.T

    def uses_long(self, num_slots: int, length: int) -> bool:
        """Returns whether a row is rotated by the long factors of longrope."""
        num_short = self.variant.num_short
        if num_short is None:
            return False
        return self.variant.positions > num_short if num_slots else length > num_short

    def encode(self, ids: Tensor) -> list[Tensor]:
        """Returns the memory of a chunk [l], for each layer the input of its attention at the slots,
        [m, D]."""
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
        empty = (torch.zeros(0, self.kv_heads, self.size, dtype=torch.float64),) * 2
        found = []
        for i in range(self.shape["num_hidden_layers"]):
            found.append(self.norm(f"layers.{i}.input_layernorm", x)[l:])
            x = self.layer(i, x, [*range(l), *ends], False, sees, "encoder", empty)
        return found

    def slots(self, chunks: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Returns for each layer the rotated keys, and the values, [M, H, K] of the memories of a
        document's chunks."""
        m, memories = self.memory.num_memory, [self.encode(chunk) for chunk in chunks]
        found = []
        for i in range(self.shape["num_hidden_layers"] if chunks else 0):
            whole = torch.cat([memory[i] for memory in memories])
            name = f"layers.{i}.self_attn"
            k = self.split(self.linear(f"{name}.k_proj", whole, "decoder"), self.kv_heads)
            v = self.split(self.linear(f"{name}.v_proj", whole, "decoder"), self.kv_heads)
            k = self.head_norm(i, "k", k)
            found.append((self.rotate(k, range(m * len(chunks)), self.uses_long(m, 0)), v))
        return found

    def stream(self, ids: Tensor, memories_of: Tensor | None = None) -> Tensor:
        """Returns the logits [T, V] of ids [T]. Every chunk reads the memories of the chunks before
        it and the recent tokens before it. memories_of: another document, whose memories are read
        instead."""
        chunks = ids.split(self.memory.chunk_size)
        read = chunks if memories_of is None else memories_of.split(self.memory.chunk_size)
        rows = []
        for t, chunk in enumerate(chunks):
            recent = ids[max(0, t * self.memory.chunk_size - self.memory.recent_tokens) :]
            recent = recent[: self.memory.recent_tokens if t else 0]
            rows.append(self.read(torch.cat([recent, chunk]), self.slots(read[:t]))[len(recent) :])
        return torch.cat(rows)
