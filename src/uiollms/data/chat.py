"""Tokenise conversations with the tokenizer's chat template, and mark the assistant's tokens.

Shapes: T tokens of a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2
import torch
from torch import Tensor

from uiollms.data.sample import IGNORED
from uiollms.data.tokens import common_prefix_length, plain_ids, prefix_ids
from uiollms.files.errors import ConfigError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_template(tokenizer: Any, name: str, prefix: str = "") -> None:
    """Raises ConfigError if a tokenizer has no chat template. name: the tokenizer's model; prefix:
    the start of the message."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{prefix}the tokenizer of {name} has no chat template, which documents of messages "
            "need; use the chat model of the same family, set tokenizer.chat_template and save the "
            "tokenizer in the model's folder, or write the documents as fields input and output"
        )


def tokenize_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Tokenises a conversation as its chat template writes it. Returns input_ids and labels, both
    [T] int64. Labels are not shifted. They are -100 except for the tokens of the assistant's turns.

    A template with `{% generation %}` marks these tokens itself. With any other template a turn is
    what the conversation up to it has more than the conversation before it with the start of an
    answer (`add_generation_prompt`), so that the mark which ends a turn is scored and the mark
    which starts it is not. An assistant's message that opens the conversation answers nothing and
    is no label.

    BOS comes first if the tokenizer adds one to texts, whether or not the template writes it.
    Raises ValueError if the template refuses the messages, or if it writes the beginning of a
    conversation otherwise once more messages follow.
    """
    check_template(tokenizer, tokenizer.name_or_path)
    try:
        if _GENERATION.search(tokenizer.get_chat_template()):
            ids, labels = marked_tokens(tokenizer, messages)
        else:
            ids, labels = prefix_tokens(tokenizer, messages)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    first = prefix_ids(tokenizer)
    if ids[: len(first)] != first:
        ids, labels = first + ids, [IGNORED] * len(first) + labels
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)


def marked_tokens(
    tokenizer: Any, messages: Sequence[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Returns the tokens and labels of a conversation by the marks of its template."""
    if not tokenizer.is_fast:
        raise ValueError(
            "the chat template has {% generation %}, which only fast tokenizers can follow; use "
            "one, or remove the marks from the template"
        )
    found = tokenizer.apply_chat_template(
        list(messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    ids = list(found["input_ids"])
    scored = found["assistant_masks"]
    return ids, [i if s else IGNORED for i, s in zip(ids, scored, strict=True)]


def prefix_tokens(
    tokenizer: Any, messages: Sequence[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Returns the tokens and labels of a conversation by the texts of its beginnings."""

    def written(count: int, **settings: Any) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, **settings))

    whole = written(len(messages))
    ids = plain_ids(tokenizer, whole)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if i == 0 or message["role"] != "assistant":
            continue
        ends = []
        for text in (written(i, add_generation_prompt=True), written(i + 1)):
            if not whole.startswith(text):
                raise ValueError(
                    f"message {i + 1}: the chat template writes the conversation up to here "
                    "otherwise when more messages follow, so the assistant's turn cannot be found; "
                    "mark it in the template with {% generation %} and {% endgeneration %}"
                )
            # A token with characters of the turn and of what follows is not scored.
            ends.append(common_prefix_length(plain_ids(tokenizer, text), ids))
        labels[ends[0] : ends[1]] = ids[ends[0] : ends[1]]
    return ids, labels
