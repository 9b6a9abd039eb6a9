"""The options of `generate` on a stream: which are supported, which need the whole text, and the
checks of prompts, states and masks.

Shapes: B prompts, T tokens of the prompts as given, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from uiollms.model.state import MemoryState, RaggedState

_ONE_STEP = "a stream cannot take tokens back"
_NO_RECORD = "the intermediate results of layers are not recorded"
# Options that have no meaning on a compressed stream, or that need what it does not contain -> why.
UNSUPPORTED = {
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
    "custom_generate": "it would get a cache of another kind",
}
SWITCHED_OFF = {"guidance_scale": 1, "num_beam_groups": 1}  # values that change nothing
# Options that process the text before a new token -> a value that changes nothing.
TEXT_OPTIONS: Mapping[str, Any] = {
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
DEFAULT_NEW_TOKENS = 20  # as in transformers


# ---- values of options ---------------------------------------------------------------------------


def find_option(name: str, *sources: Any) -> Any:
    """Returns the first value of an option that is not None in `sources`, dictionaries and
    generation configs, or None."""
    for source in sources:
        value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
        if value is not None:
            return value
    return None


def find_text_option(*sources: Any) -> str | None:
    """Returns the name of the first option that is set and processes the text so far, or None."""
    for name, neutral in TEXT_OPTIONS.items():
        value = find_option(name, *sources)
        is_empty = value is None or (isinstance(value, list | dict | tuple) and not value)
        if not is_empty and value != neutral:
            return name
    return None


def needs_default_length(
    options: Mapping[str, Any],
    config: GenerationConfig | None,
    model_config: GenerationConfig,
    ids: Tensor | None,
) -> bool:
    """Returns whether nothing limits the length of the result of `ids` [B, T].

    The `max_length` of the model's generation config is no limit for prompts of that length and
    more. Llama 2 sets it to the number of its positions, which do not limit a stream.
    """
    if any(
        find_option(name, options, config) is not None for name in ("max_length", "max_new_tokens")
    ):
        return False
    if model_config.max_new_tokens is not None:
        return False
    length = model_config.max_length
    return length is None or (ids is not None and ids.shape[1] >= length)


# ---- checks --------------------------------------------------------------------------------------


def check_options(options: Mapping[str, Any], *configs: GenerationConfig | None) -> None:
    """Raises ValueError for the first option that is set and that a stream does not support."""
    for name, reason in UNSUPPORTED.items():
        for value in (options.get(name), *(getattr(config, name, None) for config in configs)):
            if isinstance(value, Tensor) or value not in (None, False, SWITCHED_OFF.get(name)):
                raise ValueError(
                    f"generate: {name} is not supported with memory: {reason}; leave it out"
                )


def check_start(state: Any, past_key_values: Any, ids: Tensor | None) -> None:
    """Raises ValueError if `ids` [B, T] cannot continue the state that is given as one of the two
    arguments, or if both are given."""
    if state is not None and past_key_values is not None:
        raise ValueError(
            "give `state` (inputs are the new tokens) or `past_key_values` (inputs are all "
            "tokens), not both"
        )
    for name, start in (("state", state), ("past_key_values", past_key_values)):
        if start is None:
            continue
        if name == "past_key_values" and isinstance(start, RaggedState):
            raise ValueError(
                "generate: past_key_values is the state of a padded batch, whose rows contain "
                "different numbers of tokens; pass it as state=..., and only the tokens after it "
                "as input_ids"
            )
        if not isinstance(start, MemoryState | RaggedState):
            found = type(start).__name__
            raise ValueError(f"generate: {name} must be a MemoryState, found {found}")
        if ids is None:
            raise ValueError(f"generate: {name} needs input_ids that continue it")
        if start.batch_size not in (1, len(ids)):
            raise ValueError(
                f"generate: {name} has {start.batch_size} rows, the prompts {len(ids)}"
            )
    if past_key_values is not None:
        check_beginning(past_key_values, ids)


def check_beginning(past: MemoryState, ids: Any) -> None:
    """Raises ValueError unless `ids` [B, T] begin with the tokens of `past` and are longer. If the
    state does not contain its text, only the tokens of its open chunk are compared."""
    end = past.num_tokens
    text = (past.open_ids if past.text is None else past.text).to(ids.device)
    if ids.shape[1] <= end or not (ids[:, end - text.shape[1] : end] == text).all():
        raise ValueError(
            f"generate: past_key_values contains {end} tokens, and input_ids {list(ids.shape)} do "
            "not begin with them and continue; to pass only the tokens after them, use state=..."
        )


# ---- padding -------------------------------------------------------------------------------------


def infer_padding_mask(
    ids: Tensor,
    options: Mapping[str, Any],
    config: GenerationConfig | None,
    model_config: GenerationConfig,
) -> Tensor | None:
    """Returns the mask [B, T] of a batch that is padded on the left and was given without a mask,
    or None. It is inferred as in transformers: never if the padding token is also an end of
    sequence."""
    fields = {} if config is None else config.to_dict()
    settings = model_config.to_dict()
    settings |= {name: value for name, value in fields.items() if value is not None}
    settings |= options
    pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
    if pad is None or pad in (eos if isinstance(eos, list | tuple) else [eos]):
        return None
    return (ids != pad).cumsum(1) > 0


def check_left_padding(mask: Tensor, ids: Tensor | None, past_key_values: Any) -> None:
    """Raises ValueError if a mask with zeros has another shape than ids [B, T], has zeros that are
    not on the left, or comes with `past_key_values`."""
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
            "generate: attention_mask must have the shape of the prompts, with zeros only before a "
            "prompt (tokenizer.padding_side = 'left')"
        )
