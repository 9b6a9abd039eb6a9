"""The documents that the fields of a line or of a row become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uiollms.data.documents import ROLES, ChatDocument, Document
from uiollms.files.errors import ConfigError, shortened

Fields = dict[str, Any]
# (fields, source) -> document; raises ConfigError naming the source
MakeDocument = Callable[[Fields, str], Document]


def text_field(fields: Fields, name: str, source: str) -> str:
    """Returns the text of a field. Raises ConfigError if the field is missing or is not text that a
    tokenizer can read."""
    if name not in fields:
        raise ConfigError(
            f"{source}: field {name!r} is missing, found {shortened(str(sorted(fields)))}"
        )
    value = fields[name]
    if not isinstance(value, str):
        raise ConfigError(f"{source}: field {name!r} is {kind_of(value)}, expected text")
    check_text(value, f"{source}: field {name!r}")
    return value


def check_text(text: str, source: str) -> None:
    """Raises ConfigError for half of a surrogate pair, which no tokenizer can read. It can be in
    JSON, and a shell passes on bytes that are not text as one."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"character {error.start} is half of a surrogate pair"
            raise ConfigError(f"{source}: {where}") from None


def plain_text(fields: Fields, source: str) -> Document:
    """{"text": ...}"""
    return Document(text_field(fields, "text", source), source)


def input_output(fields: Fields, source: str) -> Document:
    """{"input": ..., "output": ...}"""
    response = text_field(fields, "output", source)
    return Document(
        text_field(fields, "input", source), source, response, task="question answering"
    )


def chat(fields: Fields, source: str, name: str = "messages") -> ChatDocument:
    """{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}

    Other keys of a message, such as tool_calls, are for the chat template, which decides what it
    reads. name: the name of the field. Raises ConfigError for a value that is not of this form,
    naming the message."""
    messages = fields.get(name)
    where = f"{source}: field {name!r}"
    if not isinstance(messages, list):
        raise ConfigError(
            f"{where} is {kind_of(messages)}, expected a list of messages with role and content"
        )
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ConfigError(
                f"{where}: message {i + 1} is {kind_of(message)}, expected an object with role and "
                "content"
            )
        # A table has a column for every key, which is null where a message lacks the key.
        given = {key: value for key, value in message.items() if value is not None}
        role = text_field(given, "role", f"{where}: message {i + 1}")
        if role not in ROLES:
            raise ConfigError(
                f"{where}: message {i + 1}: role is {shortened(repr(role))}, allowed are "
                f"{', '.join(ROLES)}"
            )
        text_field(given, "content", f"{where}: message {i + 1}")
        found.append(given)
    text = "\n".join(f"{message['role']}: {message['content']}" for message in found)
    return ChatDocument(text, source, task="question answering", messages=tuple(found))


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def any_fields(fields: Fields, source: str) -> Document:
    """{"text": ...}, {"messages": ...} or {"input": ..., "output": ...}. A field that is null
    counts as missing, as in lines that were exported from a table."""
    given = {name for name, value in fields.items() if value is not None}
    if {"text", "messages"} <= given:
        raise ConfigError(f"{source}: has both 'text' and 'messages'; remove one of the two fields")
    if "text" in given:
        return plain_text(fields, source)
    if "messages" in given:
        return chat(fields, source)
    if {"input", "output"} <= given:
        return input_output(fields, source)
    nulls = sorted(fields.keys() - given)
    found = f"{shortened(str(sorted(given)))}" + (f", and null {nulls}" if nulls else "")
    expected = "expected a field 'text', 'messages', or fields 'input' and 'output'"
    raise ConfigError(f"{source}: {expected}; found {found}")
