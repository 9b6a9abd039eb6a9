"""The text that `generate` of transformers processes when prompts continue a state: processors and
streamers get the whole text, without padding, and the result contains the prompts alone.

Shapes: B prompts, R generated rows (a prompt has several with beams or several results), T tokens
of the prompts as given, W tokens of the whole texts, S tokens of a state's text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from uiollms.model.state import RowGroup


def prepend_texts(ids: Tensor, groups: Sequence[RowGroup], pad: int) -> tuple[Tensor, Tensor]:
    """Returns the whole text of each prompt in ids [B, T], padded on its left with `pad`, and the
    mask of the texts, [B, W] int64 each, W >= T. A whole text is the text of the state that the
    row starts from, then the row without its padding.

    ids [[7 8] [0 9]], texts [1 2] [3 4 5], num_padding 0 1 -> [[1 2 7 8] [3 4 5 9]], mask all 1
    """
    texts: dict[int, Tensor] = {}
    for rows, num_padding, state in groups:
        assert state.text is not None
        state_texts = state.text.to(ids.device).expand(len(rows), -1)
        for row, text in zip(rows.tolist(), state_texts, strict=True):
            texts[row] = torch.cat([text, ids[row, num_padding:]])
    width = max(ids.shape[1], *(len(text) for text in texts.values()))
    whole, mask = ids.new_full((len(ids), width), pad), ids.new_zeros(len(ids), width)
    for row, text in texts.items():
        whole[row, width - len(text) :] = text
        mask[row, width - len(text) :] = 1
    return whole, mask


def restore_prompts(result: Any, ids: Tensor, num_prepended: int) -> Any:
    """Replaces the whole texts in the result of `generate` by the prompts [B, T]. num_prepended:
    by how many columns the whole texts are wider than the prompts."""
    if not num_prepended:
        return result
    sequences = result if isinstance(result, Tensor) else result.sequences
    new = sequences[:, num_prepended + ids.shape[1] :]
    prompts = ids.to(new.device).repeat_interleave(len(new) // len(ids), 0)
    joined = torch.cat([prompts, new], dim=1)
    if isinstance(result, Tensor):
        return joined
    result.sequences = joined
    return result


class PromptStreamer(BaseStreamer):
    """Passes the tokens on to `streamer`, with `prompt` [B, T] in place of the whole text, which
    comes first."""

    def __init__(self, streamer: BaseStreamer, prompt: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = prompt.cpu()

    def put(self, value: Tensor) -> None:
        prompt, self.prompt = self.prompt, None
        self.streamer.put(value if prompt is None else prompt)

    def end(self) -> None:
        self.streamer.end()


class RowwiseProcessor(LogitsProcessor):
    """Calls `processor` for each row alone, without the `num_padding` [R] tokens before its
    text."""

    def __init__(self, processor: LogitsProcessor, num_padding: Sequence[int]) -> None:
        self.processor, self.num_padding = processor, num_padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Maps input_ids [R, W] and scores [R, V] to scores [R, V]."""
        rows = zip(input_ids, scores, self.num_padding, strict=True)
        return torch.cat(
            [self.processor(ids[None, padding:], row[None]) for ids, row, padding in rows]
        )


def skip_padding(processors: LogitsProcessorList, mask: Tensor) -> LogitsProcessorList:
    """Returns the processors, of which those of transformers that read the text skip the padding
    before each row (mask [R, W]). So a row is generated as if alone, whatever the lengths of the
    other rows."""
    num_padding = (mask == 0).sum(1).tolist()
    result = LogitsProcessorList()
    for processor in processors:
        if type(processor) is NoRepeatNGramLogitsProcessor:
            processor = RowwiseProcessor(processor, num_padding)
        elif type(processor) is RepetitionPenaltyLogitsProcessor:
            # With a `prompt_ignore_length` it is a processor of the user and stays as it is.
            if not isinstance(getattr(processor, "prompt_ignore_length", None), int):
                penalty = RepetitionPenaltyLogitsProcessor(processor.penalty)
                processor = RowwiseProcessor(penalty, num_padding)
        result.append(processor)
    return result
