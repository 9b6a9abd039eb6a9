"""transformers' generate() on a stream: what may be asked of it, what it goes on from, prompts
of different lengths.

Shapes: B rows, T tokens of the prompts as given (padding included), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from uiollms.model.padding import check_segments
from uiollms.model.request import (
    OwnDraws,
    PromptStreamer,
    looks_at_text,
    setting,
    texts_of,
    whole_text,
    with_prompts,
    without_padding,
)
from uiollms.model.state import MemoryState

# Options of generate() that have no meaning on a compressed stream or need what it does not keep ->
# why.
_ONE_STEP = "a stream cannot take tokens back"
_NO_RECORD = "layers are run for their result only"
REFUSED = {
    "assistant_model": _ONE_STEP,
    "assistant_early_exit": _ONE_STEP,
    "prompt_lookup_num_tokens": _ONE_STEP,
    "speculation_type": _ONE_STEP,
    "penalty_alpha": _ONE_STEP,
    "dola_layers": _NO_RECORD,
    "output_attentions": _NO_RECORD,
    "output_hidden_states": _NO_RECORD,
    "cache_implementation": "the memory state is the cache",
    "prefill_chunk_size": "the model cuts its input into chunks itself",
    "guidance_scale": "there is no second stream for an unconditional prompt",
    "negative_prompt_ids": "there is no second stream for an unconditional prompt",
    "inputs_embeds": "chunks are compressed from token ids",
    "token_healing": "the prompt is read before it could be changed",
    "num_beam_groups": "transformers has moved it out of its library",
    "custom_generate": "it would be handed a cache of another kind",
}
NEUTRAL = {"guidance_scale": 1, "num_beam_groups": 1}  # as good as not given
DEFAULT_NEW_TOKENS = 20  # transformers' own


class RaggedState(Cache):
    """Streams of different lengths side by side, for left-padded prompts: rows of equal length
    share one state.

    groups: (rows [B'] int64, how many leading tokens of the next call are padding, their state).
    Chunk boundaries of rows of different lengths never meet, so each group is one call of its
    own: right for any lengths, and as fast as the number of different lengths allows.
    """

    is_croppable = False

    def __init__(self, groups: list[tuple[Tensor, int, MemoryState]]) -> None:
        super().__init__(layers=[])
        self.groups = groups

    @classmethod
    def start(cls, mask: Tensor, state: MemoryState | RaggedState) -> RaggedState:
        """mask [B, T] bool, false where a prompt is padded, on its left; state: what its B rows
        go on from."""
        padding = (~mask).sum(1).cpu()
        groups = []
        for rows, _, own in (
            state.groups
            if isinstance(state, RaggedState)
            else [(torch.arange(len(mask)), 0, state)]
        ):
            for skip in padding[rows].unique().tolist():
                places = (padding[rows] == skip).nonzero().squeeze(1)
                groups.append((rows[places], skip, own.select(places)))
        return cls(groups)

    @property
    def batch_size(self) -> int:
        """B, as many prompts side by side."""
        return sum(len(rows) for rows, _, _ in self.groups)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row."""
        return max(state.num_tokens for _, _, state in self.groups)

    def forward(
        self,
        model: Any,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """[B, T] -> logits of the last position [B, 1, V] and the advanced state. Raises ValueError
        for labels and for padding."""
        if labels is not None or not (attention_mask is None or attention_mask.all()):
            given = "attention_mask with zeros" if labels is None else "labels"
            what = f"state: rows of different lengths cannot be combined with {given}"
            raise ValueError(f"{what}; give each row alone")
        logits, groups = [], []
        for rows, skip, state in self.groups:
            output = model(input_ids[rows.to(input_ids.device), skip:], state, logits_to_keep=1)
            logits.append(output.logits)
            groups.append((rows, 0, output.past_key_values))
        order = torch.cat([rows for rows, _, _ in groups]).argsort()
        joined = torch.cat(logits)
        return CausalLMOutputWithPast(
            logits=joined[order.to(joined.device)], past_key_values=RaggedState(groups)
        )

    def select(self, rows: Tensor) -> RaggedState:
        """A new state of the rows [B'] int64, in that order; a row may be taken several times."""
        groups = []
        for own, skip, state in self.groups:  # `own` ascends
            places = torch.isin(rows, own).nonzero().squeeze(1)
            if len(places):
                groups.append((places, skip, state.select(torch.searchsorted(own, rows[places]))))
        return RaggedState(groups)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order (beam search); in place, as transformers asks."""
        self.groups = self.select(beam_idx.cpu()).groups


class Generation:
    """`generate` of a MemoryLM, in front of transformers' GenerationMixin."""

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        state: MemoryState | RaggedState | None = None,
        past_key_values: MemoryState | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Any:
        """transformers' generate: greedy, sampling, beams, stop strings, streamers; prompts [B,
        T], left-padded if an `attention_mask` says so (each row is then what it would be alone).

        state: goes on from there; `inputs` are the tokens after it. A state of one row serves a
        batch of prompts. The state that a padded batch left goes on too, each row from its own.
        past_key_values: the same in transformers' terms: `inputs` hold all tokens from the
        start, those that the state has seen included. Either is left as it was: ask it as often
        as you like. generator: what `do_sample` draws from: one draw, which seeds a generator of
        the request's own; None takes that draw from torch's global one. So a request neither
        sees nor changes what others draw while it runs. Processors, penalties and stopping
        criteria see the whole text, that which a state has read included; lengths (`max_length`,
        `min_length`) and the result are without it. Raises ValueError where they need it and the
        state does not know it (a `.mem` of version 0.1). With `return_dict_in_generate=True` the
        result's `.past_key_values` has seen every token but the last. Without any length, 20 new
        tokens, also behind prompts past the base's positions. Raises ValueError for options that
        a stream cannot serve (`REFUSED`), for padding that is not on the left, and where the
        tokens that may be generated would pass the capacity.
        """
        refuse(options, generation_config, self.generation_config)
        check_segments(options.pop("token_type_ids", None))
        ids = options.pop("input_ids", None) if inputs is None else inputs
        if state is not None and past_key_values is not None:
            raise ValueError(
                "give `state` (inputs are the new tokens) or `past_key_values` (inputs hold all "
                "tokens), not both"
            )
        for name, given in (("state", state), ("past_key_values", past_key_values)):
            if given is not None:
                check_start(name, given, ids)
        if attention_mask is None and ids is not None:
            attention_mask = leading_padding(
                ids,
                {**self.generation_config.to_dict(), **set_fields(generation_config), **options},
            )
        if attention_mask is not None:
            mask = left_padded(attention_mask, ids, past_key_values)
            if mask is not None:
                options["attention_mask"] = mask
                start: Any = (
                    self.new_state(len(mask)) if state is None else expanded(state, len(mask))
                )
                state = RaggedState.start(mask.bool(), start)
        if (
            not wants_length(generation_config, options)
            and self.generation_config.max_new_tokens is None
        ):
            total = (
                self.generation_config.max_length
            )  # Llama 2's names its positions: no limit for a stream
            if total is None or (ids is not None and ids.shape[1] >= total):
                options["max_new_tokens"] = DEFAULT_NEW_TOKENS
        places = options, generation_config, self.generation_config
        prompts: Any = ids
        if state is not None:
            ids = self._with_text(prompts, state, options, places)
            options["state"] = state
        if past_key_values is not None:
            options["past_key_values"] = past_key_values
        if setting("do_sample", *places):
            with OwnDraws(self.device if ids is None else ids.device, generator):
                result = super().generate(ids, generation_config, **options)  # type: ignore[misc]
        else:
            result = super().generate(ids, generation_config, **options)  # type: ignore[misc]
        return result if state is None else with_prompts(result, prompts, options["num_earlier"])

    def _with_text(
        self: Any, ids: Tensor, state: Any, options: dict[str, Any], places: Any
    ) -> Tensor:
        """ids [B, T] that go on from a state -> the whole texts [B, W]; `options` are changed to
        fit. Where the state does not know its text, the same ids."""
        options["num_earlier"] = 0
        if state.get_seq_length() == 0:
            return ids
        groups = state.groups if isinstance(state, RaggedState) else [(None, 0, state)]
        if any(own.text is None for _, _, own in groups):
            if name := looks_at_text(*places):
                raise ValueError(
                    f"generate: {name} looks at the whole text, which this state does not know (of "
                    "a memory of "
                    f"version 0.1); compress the text again, or switch {name} off"
                )
            return ids
        pad = setting("pad_token_id", *places)
        whole, mask = whole_text(ids, *texts_of(groups, len(ids)), pad=0 if pad is None else pad)
        earlier = options["num_earlier"] = whole.shape[1] - ids.shape[1]
        options["attention_mask"] = mask
        for name in (
            "max_length",
            "min_length",
        ):  # of the result, which is without the state's text
            if length := setting(name, *places):
                options[name] = length + earlier
        if options.get("streamer") is not None:
            options["streamer"] = PromptStreamer(options["streamer"], ids)
        return whole

    def _get_logits_processor(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers', for which padding is a part of the text."""
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        mask = (kwargs.get("model_kwargs") or {}).get("attention_mask")
        return processors if mask is None or mask.all() else without_padding(processors, mask)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, and with it `generate_batch` and `continuous_batching_context_manager`, which
        begin here."""
        raise NotImplementedError(
            "generate_batch (continuous batching) is not supported with memory: it keeps a paged "
            "cache of its own; give "
            "generate a left-padded batch"
        )

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: MemoryState | RaggedState | None = None,
        attention_mask: Tensor | None = None,  # the state says what of the prompts is padding
        is_first_iteration: bool = False,
        state: MemoryState | RaggedState | None = None,
        num_earlier: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the stream has not seen yet, and the stream. num_earlier: columns of the
        whole texts in front of the prompts as they were given."""
        if not is_first_iteration:
            return {"input_ids": input_ids[:, -1:], "state": past_key_values, "logits_to_keep": 1}
        if isinstance(past_key_values, MemoryState):
            state, input_ids = past_key_values, input_ids[:, past_key_values.num_tokens :]
        if state is not None:
            state, input_ids = expanded(state, len(input_ids)), input_ids[:, num_earlier:]
        return {"input_ids": input_ids, "state": state, "logits_to_keep": 1}

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        mode: Any,
        batch_size: int,
        num_fed: int,
    ) -> None:
        """transformers would build its own cache here; a stream starts in
        `prepare_inputs_for_generation`. num_fed: tokens of the longest row when all that may be
        generated is, less the last, which is never fed."""
        num_fed -= model_kwargs.get("num_earlier", 0)
        state = model_kwargs.get("state")
        groups = (
            state.groups
            if isinstance(state, RaggedState)
            else [(None, 0, state)]
            if state is not None
            else []
        )
        ends = [(own.num_tokens + num_fed - skip, own.num_tokens) for _, skip, own in groups]
        total, seen = max(ends, default=(num_fed, 0))
        if total > self.capacity:
            raise ValueError(
                f"prompt and new tokens come to {total} tokens ({seen} of them in the state), the "
                "capacity is "
                f"{self.capacity}; lower max_new_tokens or max_length, or shorten the prompt"
            )


def refuse(options: Mapping[str, Any], *configs: GenerationConfig | None) -> None:
    """Raises ValueError for the first option that is set and that a stream cannot serve."""
    for name, reason in REFUSED.items():
        for value in (options.get(name), *(getattr(config, name, None) for config in configs)):
            if isinstance(value, Tensor) or value not in (None, False, NEUTRAL.get(name)):
                raise ValueError(
                    f"generate: {name} is not supported with memory: {reason}; leave it out"
                )


def check_start(name: str, state: Any, ids: Tensor | None) -> None:
    """Raises ValueError if `ids` [B, T] cannot go on from the state given as the argument
    `name`."""
    if name == "past_key_values" and isinstance(state, RaggedState):
        raise ValueError(
            "generate: past_key_values is the state of a padded batch, whose rows have seen "
            "different numbers of tokens; "
            "give it as state=..., and only the tokens after it as input_ids"
        )
    if not isinstance(state, MemoryState | RaggedState):
        raise ValueError(f"generate: {name} must be a MemoryState, found {type(state).__name__}")
    if ids is None:
        raise ValueError(f"generate: {name} needs input_ids to go on with")
    if state.batch_size not in (1, len(ids)):
        raise ValueError(f"generate: {name} has {state.batch_size} rows, the prompts {len(ids)}")
    if isinstance(state, MemoryState) and name == "past_key_values":
        seen = state.num_tokens
        known = (state.open_ids if state.text is None else state.text).to(ids.device)
        if ids.shape[1] <= seen or not (ids[:, seen - known.shape[1] : seen] == known).all():
            raise ValueError(
                f"generate: past_key_values has seen {seen} tokens, and input_ids [{ids.shape[0]}, "
                f"{ids.shape[1]}] do not "
                f"start with them and go on; to give only the tokens after them, use state=..."
            )


def expanded(state: MemoryState | RaggedState, num_rows: int) -> MemoryState | RaggedState:
    """One state for many prompts, or beams: every row as often as `num_rows` asks."""
    times = num_rows // state.batch_size
    return (
        state
        if times == 1
        else state.select(torch.arange(state.batch_size).repeat_interleave(times))
    )


def leading_padding(ids: Tensor, settings: Mapping[str, Any]) -> Tensor | None:
    """[B, T] -> mask of a batch that was padded on the left and given without one, as
    transformers infers it: never where padding and end of sequence are one token."""
    pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
    if pad is None or pad in (eos if isinstance(eos, list | tuple) else [eos]):
        return None
    return (ids != pad).cumsum(1) > 0


def left_padded(
    mask: Tensor, ids: Tensor | None, past_key_values: MemoryState | None
) -> Tensor | None:
    """The mask, or None where nothing is padded. Raises ValueError for zeros that are not on the
    left."""
    if mask.all():
        return None
    if past_key_values is not None:
        raise ValueError(
            "generate: padded prompts cannot be combined with past_key_values; use state=..."
        )
    if (
        ids is None
        or mask.shape != ids.shape
        or not mask[:, -1].all()
        or (mask[:, 1:].bool() < mask[:, :-1].bool()).any()
    ):
        raise ValueError(
            "generate: attention_mask must have the prompts' shape, with zeros only in front of a "
            "prompt "
            "(tokenizer.padding_side = 'left')"
        )
    return mask


def set_fields(config: GenerationConfig | None) -> dict[str, Any]:
    return (
        {}
        if config is None
        else {name: value for name, value in config.to_dict().items() if value is not None}
    )


def wants_length(config: GenerationConfig | None, options: Mapping[str, Any]) -> bool:
    """Whether the caller said how long the result may be."""
    given = set_fields(config) | {
        name: value for name, value in options.items() if value is not None
    }
    return bool(given.keys() & {"max_length", "max_new_tokens"})
