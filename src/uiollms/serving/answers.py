"""Answers in OpenAI's form, whole or as server-sent events, while the client listens."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from uiollms.serving.engine import Delta, Ended, Event, Job, Started
from uiollms.serving.settings import ApiError

CLIENT_GONE = 499  # a status that nobody reads


class ClientGone(Exception):
    """The client has closed its connection."""


class Answer:
    """The answer to a request, whose job has been submitted. The job ends when the client is gone,
    or `timeout` seconds after the request."""

    def __init__(
        self, job: Job, request: Request, model: str, is_chat: bool, timeout: float
    ) -> None:
        self.job, self.request, self.is_chat, self.timeout = job, request, is_chat, timeout
        self.ends_at = asyncio.get_running_loop().time() + timeout
        start = "chatcmpl" if is_chat else "cmpl"
        self.common = dict(
            id=f"{start}-{secrets.token_hex(12)}", created=int(time.time()), model=model
        )
        self.started: Started | None = None

    # ---- the two forms ---------------------------------------------------------------------------

    async def whole(self) -> Response:
        listening = asyncio.create_task(self.until_gone())
        text = ""
        try:
            while True:
                event = await self.next_event(listening)
                if isinstance(event, Delta):
                    text += event.text
                elif isinstance(event, Ended):
                    return JSONResponse(self.whole_json(text, event))
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        finally:
            listening.cancel()
            self.job.cancel()

    async def streamed(self, with_usage: bool) -> Response:
        """Waits for the first event, so that an error has a status of its own."""
        listening = asyncio.create_task(self.until_gone())
        try:
            await self.next_event(listening)
        except BaseException as error:
            listening.cancel()
            self.job.cancel()
            if isinstance(error, ClientGone):
                return Response(status_code=CLIENT_GONE)
            raise
        return StreamingResponse(self.lines(listening, with_usage), media_type="text/event-stream")

    async def lines(self, listening: asyncio.Task[None], with_usage: bool) -> AsyncIterator[str]:
        try:
            if self.is_chat:
                yield data_line(self.chunk({"role": "assistant", "content": ""}))
            while True:
                event = await self.next_event(listening)
                if isinstance(event, Delta):
                    yield data_line(self.chunk(event.text))
                elif isinstance(event, Ended):
                    yield data_line(self.chunk(None, event))
                    if with_usage:
                        usage = {"choices": [], "usage": self.usage(event)}
                        yield data_line(self.common | {"object": self.kind(True)} | usage)
                    yield "data: [DONE]\n\n"
                    return
        except ApiError as error:
            yield data_line(error.content)
        except ClientGone:
            return
        finally:
            listening.cancel()
            self.job.cancel()

    # ---- events ----------------------------------------------------------------------------------

    async def until_gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            await asyncio.sleep(0)

    async def next_event(self, listening: asyncio.Task[None]) -> Event:
        """Raises ApiError for an error or after the timeout, ClientGone if `listening` ends."""
        event = asyncio.create_task(self.job.events.get())
        awaited: set[asyncio.Task[Any]] = {event, listening}
        left = self.ends_at - asyncio.get_running_loop().time()
        try:
            done, _ = await asyncio.wait(
                awaited, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            if not event.done():
                event.cancel()
        if event not in done:
            if done:
                raise ClientGone
            raise ApiError(504, "timeout", f"the answer took more than {self.timeout:g} seconds")
        found = event.result()
        if isinstance(found, ApiError):
            raise found
        if isinstance(found, Started):
            self.started = found
        return found

    # ---- JSON ------------------------------------------------------------------------------------

    def kind(self, is_chunk: bool) -> str:
        if self.is_chat:
            return "chat.completion.chunk" if is_chunk else "chat.completion"
        return "text_completion"

    def usage(self, ended: Ended) -> dict[str, int]:
        """memory_tokens is not OpenAI's: the prompt's tokens do not count those of memories."""
        assert self.started is not None
        prompt, completion = self.started.prompt_tokens, ended.completion_tokens
        return dict(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            memory_tokens=self.started.memory_tokens,
        )

    def whole_json(self, text: str, ended: Ended) -> dict[str, Any]:
        content = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.is_chat
            else {"text": text}
        )
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": ended.reason}
        fields = {"object": self.kind(False), "choices": [choice], "usage": self.usage(ended)}
        return self.common | fields | attention_field(ended)

    def chunk(
        self, part: str | dict[str, str] | None, ended: Ended | None = None
    ) -> dict[str, Any]:
        """part: text, or the first delta of a chat, or None at the end."""
        if not self.is_chat:
            content: dict[str, Any] = {"text": part or ""}
        elif isinstance(part, str):
            content = {"delta": {"content": part}}
        else:
            content = {"delta": part or {}}
        reason = ended.reason if ended else None
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        fields = {"object": self.kind(True), "choices": [choice]}
        return self.common | fields | (attention_field(ended) if ended else {})


def attention_field(ended: Ended) -> dict[str, Any]:
    """The field `attention`, if it was measured: the fraction of every chunk, in the order of the
    memories."""
    if ended.attention is None:
        return {}
    return {
        "attention": [
            {"memory": id, "chunk": chunk, "fraction": fraction}
            for id, chunk, fraction in ended.attention
        ]
    }


def data_line(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
