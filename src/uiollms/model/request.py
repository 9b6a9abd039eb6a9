"""What a request to `generate` has of its own: the whole text that processors look at, and its
random draws.

Shapes: B prompts, R rows that are generated (beams and several answers included), T tokens of
the prompts as given, W of the whole texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

# Options that look at the text in front of a new token -> the value that is as good as none.
LOOKING: Mapping[str, Any] = {
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "watermarking_config": None,
    "logits_processor": None,
    "prefix_allowed_tokens_fn": None,
    "stopping_criteria": None,
}


def setting(name: str, *places: Any) -> Any:
    """The first value that is not None of an option, in dictionaries and generation configs."""
    for place in places:
        value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
        if value is not None:
            return value
    return None


def looks_at_text(*places: Any) -> str | None:
    """The first option that is set and looks at the text so far; None if there is none."""
    for name, neutral in LOOKING.items():
        value = setting(name, *places)
        empty = value is None or (isinstance(value, list | dict | tuple) and not value)
        if not empty and value != neutral:
            return name
    return None


def whole_text(
    ids: Tensor, texts: Sequence[Tensor], skips: Sequence[int], pad: int
) -> tuple[Tensor, Tensor]:
    """ids [B, T], whose rows go on from `texts`, B tensors [S], behind `skips` leading tokens of
    padding -> each row's whole text, padded on its left, and its mask, [B, W] int64 each; W >= T.

    ids [[7 8] [0 9]], texts [1 2] [3 4 5], skips 0 1 -> [[1 2 7 8] [3 4 5 9]], all of it text
    """
    rows = [
        torch.cat([text.to(ids.device), row[skip:]])
        for row, text, skip in zip(ids, texts, skips, strict=True)
    ]
    width = max(ids.shape[1], *(len(row) for row in rows))
    whole, mask = ids.new_full((len(ids), width), pad), ids.new_zeros(len(ids), width)
    for i, row in enumerate(rows):
        whole[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return whole, mask


def texts_of(groups: Any, num_rows: int) -> tuple[list[Tensor], list[int]]:
    """The text [S] that each of B = `num_rows` prompts goes on from, and how many of its leading
    tokens are padding. groups: of a RaggedState; the rows None are all, of one state for all or
    one for each."""
    texts: dict[int, Tensor] = {}
    skips: dict[int, int] = {}
    for rows, skip, own in groups:
        for place, row in enumerate(range(num_rows) if rows is None else rows.tolist()):
            texts[row] = own.text[place if len(own.text) > 1 else 0]
            skips[row] = skip
    return [texts[row] for row in range(num_rows)], [skips[row] for row in range(num_rows)]


def with_prompts(result: Any, ids: Tensor, num_earlier: int) -> Any:
    """What transformers has generated behind the whole texts, as if behind the prompts [B, T]
    alone."""
    if not num_earlier:
        return result
    sequences = result if isinstance(result, Tensor) else result.sequences
    new = sequences[:, num_earlier + ids.shape[1] :]
    prompts = ids.to(new.device).repeat_interleave(len(new) // len(ids), 0)
    joined = torch.cat([prompts, new], dim=1)
    if isinstance(result, Tensor):
        return joined
    result.sequences = joined
    return result


class PromptStreamer(BaseStreamer):
    """Hands on what is streamed, but shows `prompt` [B, T] in place of the whole text in front
    of the new tokens."""

    def __init__(self, streamer: BaseStreamer, prompt: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = prompt.cpu()

    def put(self, value: Tensor) -> None:
        first, self.prompt = self.prompt, None
        self.streamer.put(value if first is None else first)

    def end(self) -> None:
        self.streamer.end()


class PerRow(LogitsProcessor):
    """A processor that looks at each row alone, without the padding [R] in front of it."""

    def __init__(self, processor: LogitsProcessor, padding: Sequence[int]) -> None:
        self.processor, self.padding = processor, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [R, W], scores [R, V] -> [R, V]"""
        rows = zip(input_ids, scores, self.padding, strict=True)
        return torch.cat([self.processor(ids[None, skip:], row[None]) for ids, row, skip in rows])


def without_padding(processors: LogitsProcessorList, mask: Tensor) -> LogitsProcessorList:
    """The same, but padding in front of a row (mask [R, W]) is no text of it: a row is generated as
    if alone, whatever its neighbours' lengths."""
    padding = (mask == 0).sum(1).tolist()
    found = LogitsProcessorList()
    for processor in processors:
        if type(processor) is NoRepeatNGramLogitsProcessor:
            processor = PerRow(processor, padding)
        elif type(processor) is RepetitionPenaltyLogitsProcessor:
            ignored = getattr(processor, "prompt_ignore_length", None)
            if not isinstance(ignored, int):  # else somebody's own
                processor = PerRow(RepetitionPenaltyLogitsProcessor(processor.penalty), padding)
        found.append(processor)
    return found


class OwnDraws(TorchFunctionMode):
    """Inside, and in this thread only, `torch.multinomial`, with which transformers samples, draws
    from a generator of the request's own, on `device`; its seed is one draw from `source` (None:
    torch's global generator on the CPU, so that `torch.manual_seed` decides)."""

    def __init__(self, device: torch.device, source: torch.Generator | None) -> None:
        super().__init__()
        place = "cpu" if source is None else source.device
        seed = torch.randint(2**63 - 1, (1,), generator=source, device=place)
        self.generator = torch.Generator(device).manual_seed(int(seed))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.multinomial and kwargs.get("generator") is None:
            kwargs = kwargs | {"generator": self.generator}
        return func(*args, **kwargs)
