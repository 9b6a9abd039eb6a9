"""Useful FLOPs: the operations that the mathematics of a pass needs, the same for every
implementation, fast or slow.

Counted are products of matrices, with 2 FLOPs per multiply-add: the base's linear layers, LoRA, the
LM head, and attention over the pairs of tokens that attend to each other (a causal triangle counts
as a triangle). Norms, softmax, rotary embedding, activations and the optimizer are not counted, nor
is anything that is computed twice (chunks encoded again, attention recomputed in a backward). So
utilisation = useful FLOPs / (seconds * GEMM peak) can only be too low.

Results that nothing reads are not counted either:

    encoder   The last layer is only a norm. In the last layer that runs, ordinary tokens need keys
              and values only.
    backward  Weights are frozen, so a linear layer costs the gradient of its input alone (as many
              FLOPs as forward). Nothing is counted where no trained parameter lies below: in layer
              0 of the decoder, and for ordinary tokens in layer 0 of the encoder (with slot_input
              "last" also for slots, whose input is the frozen embedding).

With t tokens, q = heads * head size, kv = key/value heads * head size, D hidden, I intermediate,
r rank, V vocabulary:

    queries(t)        2 t (2 D q + 3 D I)  q_proj, o_proj, gate, up, down
    keys_values(t)    2 t (2 D kv)
    lora(t, out)      2 t r (D + out)      backward: A, B, the product between them, and the input,
                                           twice as much
    attention(pairs)  4 pairs q            backward: dQ, dK, dV and dP, twice as much
    head(t)           2 t D V              backward: the same again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from uiollms.config.sections import MemoryConfig
from uiollms.data.sample import Row, Sample
from uiollms.model.memory_lm import MemoryLM


@dataclass(frozen=True)
class Flops:
    """Counts the FLOPs of one model. Methods return FLOPs unless their docstring says otherwise.

    q, kv:         widths of queries, and of keys or values
    chunk, slots:  tokens and memory slots of a chunk
    rank:          of LoRA
    learned_slots: whether slots start from trained embeddings
    recent:        recent tokens that a chunk reads again
    """

    layers: int
    hidden: int
    q: int
    kv: int
    intermediate: int
    vocab: int
    chunk: int
    slots: int
    rank: int
    transfer_head: bool = True
    learned_slots: bool = True
    recent: int = 0

    @classmethod
    def of(cls, model: MemoryLM) -> Flops:
        return cls.of_shape(model.base.config, model.memory_config)

    @classmethod
    def of_shape(cls, config: PreTrainedConfig, memory: MemoryConfig) -> Flops:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            q=config.num_attention_heads * size,
            kv=config.num_key_value_heads * size,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            chunk=memory.chunk_size,
            slots=memory.num_memory,
            rank=memory.lora_rank,
            transfer_head=memory.transfer_head,
            learned_slots=memory.slot_input == "token",
            recent=memory.recent_tokens,
        )

    # ---- parts -----------------------------------------------------------------------------------

    def q_proj(self, tokens: int) -> int:
        return 2 * tokens * self.hidden * self.q

    def o_proj_mlp(self, tokens: int) -> int:
        return 2 * tokens * self.hidden * (self.q + 3 * self.intermediate)

    def queries(self, tokens: int) -> int:
        return self.q_proj(tokens) + self.o_proj_mlp(tokens)

    def keys_values(self, tokens: int) -> int:
        return 4 * tokens * self.hidden * self.kv

    def lora(self, tokens: int, out: int) -> int:
        return 2 * tokens * self.rank * (self.hidden + out)

    def attention(self, pairs: int) -> int:
        return 4 * pairs * self.q

    def head(self, tokens: int) -> int:
        return 2 * tokens * self.hidden * self.vocab

    # ---- the encoder, one chunk ------------------------------------------------------------------

    @property
    def slot_pairs(self) -> int:
        """Pairs of slots and the tokens they attend to: slot i attends to (i + 1) * l / m tokens
        and to itself."""
        return self.chunk * (self.slots + 1) // 2 + self.slots

    def encoder_layers(self) -> list[tuple[int, int, int]]:
        """(tokens, queries, pairs) of every layer that runs, as counts."""
        l, m = self.chunk, self.slots
        full = [(l + m, l + m, l * (l + 1) // 2 + self.slot_pairs)] * (self.layers - 2)
        return full + [(l + m, m, self.slot_pairs)] * (self.layers > 1)

    def encoder_forward(self) -> int:
        return sum(
            self.keys_values(tokens)
            + self.queries(queries)
            + self.lora(queries, self.q)
            + self.lora(tokens, self.kv)
            + self.attention(pairs)
            for tokens, queries, pairs in self.encoder_layers()
        )

    def encoder_backward(self) -> int:
        total = 0
        for i, (tokens, queries, pairs) in enumerate(self.encoder_layers()):
            learned = self.slots * self.learned_slots
            # The keys and values, and the queries, whose gradient reaches a layer below.
            below = (learned, learned) if i == 0 else (tokens, queries)
            total += self.o_proj_mlp(queries) + self.keys_values(below[0]) + self.q_proj(below[1])
            # Layer 0 needs no dK if its input is frozen.
            total += 2 * self.attention(pairs) if any(below) else self.attention(pairs) * 3 // 2
            total += self.lora_backward(queries, self.q, below[1]) + self.lora_backward(
                tokens, self.kv, below[0]
            )
        return total

    def lora_backward(self, tokens: int, out: int, below: int) -> int:
        """The gradients of B and A and the product between them for `tokens` tokens, and the
        gradient of the input for `below` of them."""
        return (
            2 * tokens * self.rank * (self.hidden + 2 * out) + 2 * below * self.rank * self.hidden
        )

    # ---- the transfer head, one chunk's memory ---------------------------------------------------

    def project_forward(self) -> int:
        head = self.transfer_head * 2 * self.lora(self.slots, self.kv)
        return self.layers * (self.keys_values(self.slots) + head)

    def project_backward(self) -> int:
        """Sends one gradient to the decoder's LoRA and to the memory."""
        head = self.transfer_head * 2 * self.lora_backward(self.slots, self.kv, self.slots)
        return self.layers * (self.keys_values(self.slots) + head)

    # ---- the decoder, one row --------------------------------------------------------------------

    def decoder_forward(self, tokens: int, memories: int, scored: int, recent: int = 0) -> int:
        """recent: how many of the tokens are recent tokens. In the last layer they need keys and
        values only."""
        layer = (
            self.queries(tokens)
            + self.keys_values(tokens)
            + self.attention(self.row_pairs(tokens, memories))
        )
        unread = self.queries(recent) + self.attention(self.row_pairs(recent, memories))
        return self.layers * layer - unread + self.head(scored)

    def decoder_backward(self, tokens: int, memories: int, scored: int, recent: int = 0) -> int:
        """Sends gradients to the memories' keys and values in every layer."""
        unread = self.queries(recent) + 2 * self.attention(self.row_pairs(recent, memories))
        upper = (
            self.queries(tokens)
            + self.keys_values(tokens)
            + 2 * self.attention(self.row_pairs(tokens, memories))
        )
        # Layer 0 needs dP, and dV and dK of the slots.
        lowest = self.o_proj_mlp(tokens) + self.attention(tokens * memories * self.slots) * 3 // 2
        above = (self.layers - 1) * upper - unread if self.layers > 1 else 0
        return above + lowest + self.head(scored)

    def row_pairs(self, tokens: int, memories: int) -> int:
        return tokens * (tokens + 1) // 2 + tokens * memories * self.slots

    # ---- whole passes ----------------------------------------------------------------------------

    def scoring(self, sample: Sample) -> int:
        """Encodes and projects all chunks and decodes all rows of a sample."""
        chunks = len(sample.chunks) * (self.encoder_forward() + self.project_forward())
        rows = sample.with_recent(self.recent).rows
        return chunks + sum(self.decoder_forward(*sizes(row)) for row in rows)

    def training(self, sample: Sample, encoder_backwards: int) -> int:
        """One gradient step in which `encoder_backwards` chunks are encoded again for gradients."""
        rows = sample.with_recent(self.recent).rows
        backward = sum(self.decoder_backward(*sizes(row)) for row in rows if row.num_memories)
        projections = len(sample.chunks) * self.project_backward()
        return (
            self.scoring(sample)
            + backward
            + projections
            + encoder_backwards * self.encoder_backward()
        )

    def generation(self, slots: int) -> int:
        """Generates one token in the middle of a chunk that reads `slots` memory slots. This
        includes the token's part of encoding the chunk and of reading recent tokens again."""
        recent = self.recent if slots else 0
        pairs = slots + recent + self.chunk // 2
        row = self.layers * (
            self.queries(1) + self.keys_values(1) + self.attention(pairs)
        ) + self.head(1)
        recent_tokens = self.decoder_forward(recent, slots // self.slots, 0, recent)
        return row + (self.encoder_forward() + self.project_forward() + recent_tokens) // self.chunk


def sizes(row: Row) -> tuple[int, int, int, int]:
    """(tokens, memories, scored tokens, recent tokens) of a row, as counts."""
    return len(row.input_ids), row.num_memories, len(row.scored), row.recent


def gemm_shapes(flops: Flops, rows: int) -> Sequence[tuple[tuple[int, int, int], int]]:
    """The shapes (rows, in, out) of the matrix products of the layers and the head for `rows`
    tokens, and how often each occurs in the model."""
    D, n = flops.hidden, flops.layers
    return [
        ((rows, D, flops.q), n),
        ((rows, D, flops.kv), 2 * n),
        ((rows, flops.q, D), n),
        ((rows, D, flops.intermediate), 2 * n),
        ((rows, flops.intermediate, D), n),
        ((rows, D, flops.vocab), 1),
    ]
