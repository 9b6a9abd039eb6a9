"""The fields of requests for answers, in OpenAI's schema.

A field that OpenAI has and this server has not is either without effect on the answer (`IGNORED`),
or accepted with the values that change nothing (`NEUTRAL`). Any other field is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from uiollms.data.readers.fields import check_text

IGNORED = frozenset(
    {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


def check_temperature(value: float) -> float:
    if 0 < value < 1e-4:
        raise ValueError("0 (greedy), or a number from 0.0001 to 2")
    return value


def check_characters(text: str) -> str:
    check_text(text, "text")
    return text


Text = Annotated[str, AfterValidator(check_characters)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
Identifier = Annotated[str, Field(max_length=100)]


class Fields(BaseModel):
    """What all objects of a request have in common: no unknown fields, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class UploadRequest(Fields):
    """A document as JSON, in place of a multipart form."""

    text: Text
    name: str | None = None


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against eavesdroppers; ignored


class AnswerRequest(Fields):
    """The common fields of both kinds of requests. `memory` and `attention` are not OpenAI's."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(check_temperature)] | None = (
        None
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    memory: Identifier | Annotated[list[Identifier], Field(max_length=16)] | None = None
    attention: bool = False

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, fields: Any) -> Any:
        """Removes the fields without effect. Raises ValueError for values that would have one."""
        if not isinstance(fields, dict):
            return fields
        for name, allowed in NEUTRAL.items():
            if name in fields and fields[name] is not None and fields[name] not in allowed:
                accepted = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} is not supported, except {accepted}; leave it out")
        unused = IGNORED | NEUTRAL.keys()
        return {name: value for name, value in fields.items() if name not in unused}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def memories(self) -> tuple[str, ...]:
        return (self.memory,) if isinstance(self.memory, str) else tuple(self.memory or ())


class TextPart(Fields):
    type: Literal["text"]
    text: Text


class Message(Fields):
    """A message of a chat. `name` is ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    @property
    def for_template(self) -> dict[str, str]:
        text = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(AnswerRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(AnswerRequest):
    """prompt: a text or its token ids, or a list with one of them."""

    prompt: Text | list[int] | Annotated[list[Text | list[int]], Field(min_length=1, max_length=1)]

    @property
    def single_prompt(self) -> str | list[int]:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return prompt[0]
        return prompt
