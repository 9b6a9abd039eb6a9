"""How much of the decoder's attention an answer paid to each chunk of the memories.

Shapes: T prompt tokens, A answer tokens, R chunks of the memories, l chunk_size, m num_memory, w
recent tokens, H heads, M slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uiollms.evaluation.attention_mass import RecordingPattern
from uiollms.model.attention import decoder_mask
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState, SharedPrefix


@torch.no_grad()
def chunk_attention(
    model: MemoryLM,
    start: MemoryState,
    prompt: Tensor,
    answer: Tensor,
    pass_on: Callable[[], None] = lambda: None,
) -> Tensor:
    """Returns [R] float64: the fraction of attention that goes to the slots of each chunk of
    `start`, averaged over layers, heads and the A positions from which the answer was predicted
    (the prompt's last token and all of the answer but its last). The rest, up to 1, goes to tokens
    that are read as they are and to chunks of the conversation.

    prompt [T] and answer [A], both int64, follow `start`. The chunks that these positions are in
    are decoded once more, with the eager attention function of the base's family, which returns
    the probabilities. pass_on: is called before each of them.
    """
    l, m, w = (
        model.memory_config.chunk_size,
        model.memory_config.num_memory,
        model.memory_config.recent_tokens,
    )
    read = torch.cat([prompt, answer[:-1]])
    num_past, num_chunks = start.open_ids.shape[1], start.num_slots // m
    text = torch.cat([start.recent_ids[0].cpu(), start.open_ids[0].cpu(), read])
    num_recent = start.recent_ids.shape[1]
    first = num_past + len(prompt) - 1  # the first position, from the start of the open chunk
    end = len(text) - num_recent
    state = start if end <= l else model(read[None], start, logits_to_keep=1).past_key_values
    received = torch.zeros(num_chunks, dtype=torch.float64)
    for begin in range(first // l * l, end, l):
        pass_on()
        stop = min(begin + l, end)
        before = num_recent if begin == 0 else w
        ids = text[num_recent + begin - before : num_recent + stop]
        slots = start.num_slots + begin // l * m
        query = before + max(0, first - begin)

        def record(layer: int, weights: Tensor, query: int = query) -> None:
            """weights: [1, H, w + tokens, M + w + tokens]"""
            to_slots = weights[0, :, query:, : num_chunks * m].double().mean(0).sum(0)
            received.add_(to_slots.view(num_chunks, m).sum(1).cpu())

        prefix = SharedPrefix(
            [k[:, :, :slots] for k in state.memory_keys],
            [v[:, :, :slots] for v in state.memory_values],
            in_place=False,
        )
        mask = decoder_mask([slots], 0, len(ids), model.device)
        model.decode(ids[None], prefix, [slots], pattern=RecordingPattern(mask, record))
    return received / (len(answer) * len(start.memory_keys))
