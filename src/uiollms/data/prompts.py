"""Formats the messages of a chat as text, and tokenises a text that continues a stream.

Shapes: T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uiollms.data.tokens import continuation_ids, plain_ids, prefix_ids


def conversation_text(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """Formats messages with role and content up to the start of the model's next answer. The format
    is the tokenizer's chat template, or plain text without one. A chat template may raise
    jinja2.TemplateError for messages that it refuses."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
    formats = {"user": "\n\nQuestion: {}\nAnswer:", "assistant": " {}", "system": "\n\n{}"}
    return "".join(formats[m["role"]].format(m["content"]) for m in messages)


def following_ids(tokenizer: Any, text: str, num_tokens: int) -> list[int]:
    """Tokenises a text that follows `num_tokens` tokens of a stream: [T]. The tokens that the
    tokenizer starts every text with (for some BOS or a space) are added at the start of the stream
    only; a chat template may contain BOS."""
    start = prefix_ids(tokenizer)
    if num_tokens:
        text = text.removeprefix("".join(tokenizer.convert_ids_to_tokens(start)))
        return continuation_ids(tokenizer, text)
    ids = plain_ids(tokenizer, text)
    return ids if ids[: len(start)] == start else start + ids
