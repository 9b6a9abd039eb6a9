"""The method `generate` of a MemoryLM: that of transformers, on a stream that may continue a state,
and for prompts of different lengths.

Shapes: B prompts, T tokens of the prompts as given (padding included), W tokens of the whole
texts, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from uiollms.model.generation_options import (
    DEFAULT_NEW_TOKENS,
    check_left_padding,
    check_options,
    check_start,
    find_option,
    find_text_option,
    infer_padding_mask,
    needs_default_length,
)
from uiollms.model.generation_text import (
    PromptStreamer,
    prepend_texts,
    restore_prompts,
    skip_padding,
)
from uiollms.model.padding import check_token_types
from uiollms.model.sampling import IsolatedSampling
from uiollms.model.state import MemoryState, RaggedState, expand_state, row_groups


class Generation:
    """Mixin of MemoryLM with `generate` and what it overrides of transformers' GenerationMixin,
    which must follow it in the list of base classes."""

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
        """Generates as the `generate` of transformers does: greedily, by sampling or with beams,
        with stop strings and streamers. Prompts [B, T] may be padded on the left if an
        `attention_mask` marks the padding. Each row is then the same as if generated alone.

        state: a state to continue; `inputs` are the tokens after it. A state of one row serves a
        batch of prompts. The state that a padded batch returns can be continued too, each row from
        its row. past_key_values: a state in the sense of transformers: `inputs` are all tokens
        from the start, those that the state contains included. Both arguments stay unchanged, so
        several calls may continue one state. generator: seeds the random numbers of `do_sample`,
        by one draw; None draws from torch's global generator. So a call neither uses nor changes
        the random numbers that others draw while it runs.

        Processors, penalties and stopping criteria get the whole text, with the tokens that a
        state has read. Lengths (`max_length`, `min_length`) and the result do not count these
        tokens. With `return_dict_in_generate=True`, the `.past_key_values` of the result contains
        every token except the last. If no length is set, 20 tokens are generated, also after
        prompts that are longer than the base's positions.

        Raises ValueError for options that a stream does not support
        (`generation_options.UNSUPPORTED`), for padding that is not on the left, for options that
        need the whole text if the state does not contain it (a `.mem` of version 0.1), and if
        prompt and new tokens may exceed the capacity.
        """
        check_options(options, generation_config, self.generation_config)
        check_token_types(options.pop("token_type_ids", None))
        ids: Any = options.pop("input_ids", None) if inputs is None else inputs
        check_start(state, past_key_values, ids)

        if attention_mask is None and ids is not None:
            attention_mask = infer_padding_mask(
                ids, options, generation_config, self.generation_config
            )
        if attention_mask is not None and not attention_mask.all():
            check_left_padding(attention_mask, ids, past_key_values)
            options["attention_mask"] = attention_mask
            batch = len(attention_mask)
            start = self.new_state(batch) if state is None else expand_state(state, batch)
            state = RaggedState.from_mask(attention_mask.bool(), start)

        if needs_default_length(options, generation_config, self.generation_config, ids):
            options["max_new_tokens"] = DEFAULT_NEW_TOKENS
        sources = options, generation_config, self.generation_config
        texts = ids
        if state is not None:
            texts, changes = self._whole_texts(ids, state, *sources)
            options |= changes | {"state": state}
        if past_key_values is not None:
            options["past_key_values"] = past_key_values

        device = self.device if ids is None else ids.device
        samples = find_option("do_sample", *sources)
        with IsolatedSampling(device, generator) if samples else nullcontext():
            result = super().generate(texts, generation_config, **options)  # type: ignore[misc]
        return restore_prompts(result, ids, options.get("num_prepended", 0))

    def _whole_texts(
        self: Any, ids: Tensor, state: MemoryState | RaggedState, *sources: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the whole texts [B, W] of prompts [B, T] that continue `state`, and the options
        that change with them. sources: where options are looked up. If the state does not contain
        its text, it returns the prompts."""
        if state.get_seq_length() == 0:
            return ids, {}
        groups = row_groups(state, len(ids))
        if any(group.state.text is None for group in groups):
            if name := find_text_option(*sources):
                raise ValueError(
                    f"generate: {name} needs the whole text, which this state does not contain "
                    "(its memory was written by version 0.1); compress the text again, or switch "
                    f"{name} off"
                )
            return ids, {}
        texts, mask = prepend_texts(ids, groups, find_option("pad_token_id", *sources) or 0)
        num_prepended = texts.shape[1] - ids.shape[1]
        changes: dict[str, Any] = {"num_prepended": num_prepended, "attention_mask": mask}
        # The lengths count the result's tokens, which the text of the state is no part of.
        for name in ("max_length", "min_length"):
            if length := find_option(name, *sources):
                changes[name] = length + num_prepended
        if streamer := find_option("streamer", *sources):
            changes["streamer"] = PromptStreamer(streamer, ids)
        return texts, changes

    def _get_logits_processor(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the processors of transformers, except that they do not count padding as
        text."""
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        mask = (kwargs.get("model_kwargs") or {}).get("attention_mask")
        return processors if mask is None or mask.all() else skip_padding(processors, mask)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError. `generate_batch` and `continuous_batching_context_manager`
        start with this method, so they are not supported either."""
        raise NotImplementedError(
            "generate_batch (continuous batching) is not supported with memory: it uses a paged "
            "cache; give generate a left-padded batch"
        )

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: MemoryState | RaggedState | None = None,
        attention_mask: Tensor | None = None,  # the state contains what of the prompts is padding
        is_first_iteration: bool = False,
        state: MemoryState | RaggedState | None = None,
        num_prepended: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the arguments of the next call: the tokens that the stream has not read yet, and
        the stream. num_prepended: by how many columns the whole texts are wider than the prompts
        as given."""
        if not is_first_iteration:
            return {"input_ids": input_ids[:, -1:], "state": past_key_values, "logits_to_keep": 1}
        if isinstance(past_key_values, MemoryState):
            state, input_ids = past_key_values, input_ids[:, past_key_values.num_tokens :]
        if state is not None:
            state = expand_state(state, len(input_ids))
            input_ids = input_ids[:, num_prepended:]
        return {"input_ids": input_ids, "state": state, "logits_to_keep": 1}

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Checks the length instead of building a cache, as transformers would. The stream starts
        in `prepare_inputs_for_generation`.

        max_cache_length: the greatest length of a row without its last token, which is never an
        input. Raises ValueError if a stream may exceed the capacity.
        """
        num_inputs = max_cache_length - model_kwargs.get("num_prepended", 0)
        state = model_kwargs.get("state")
        groups = [] if state is None else row_groups(state, state.batch_size)
        lengths = [
            (group.state.num_tokens + num_inputs - group.num_padding, group.state.num_tokens)
            for group in groups
        ]
        total, num_past = max(lengths, default=(num_inputs, 0))
        if total > self.capacity:
            raise ValueError(
                f"prompt and new tokens come to {total} tokens ({num_past} of them in the state), "
                f"the capacity is {self.capacity}; lower max_new_tokens or max_length, or shorten "
                "the prompt"
            )
