"""Generates answers, each in a thread, with `MemoryLM.generate`. A bounded queue is before them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from uiollms.data.limits import check_ids
from uiollms.data.prompts import conversation_text, following_ids
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState
from uiollms.serving.attention import chunk_attention
from uiollms.serving.settings import ApiError, Settings
from uiollms.serving.states import Loaded, States
from uiollms.serving.turns import Turns

log = logging.getLogger("uiollms")


# ---- requests and events -------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """What a request asks for. prompt: messages with role and content, a text, or token ids.
    seed None: another answer each time. attention: whether it is measured."""

    prompt: list[dict[str, str]] | str | list[int]
    memories: tuple[str, ...] = ()
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stops: Sequence[str] = ()
    seed: int | None = None
    attention: bool = False


@dataclass(frozen=True)
class Started:
    """The prompt was accepted. memory_tokens: tokens of the memories that it follows."""

    prompt_tokens: int
    memory_tokens: int


@dataclass(frozen=True)
class Delta:
    text: str


@dataclass(frozen=True)
class Ended:
    """reason: "stop" or "length". attention: (memory, chunk, fraction) of every chunk."""

    reason: str
    completion_tokens: int
    attention: list[tuple[str, int, float]] | None = None


Event = Started | Delta | Ended | ApiError


@dataclass(eq=False)
class Job:
    """A query and its events, which arrive in the event loop that made the job."""

    query: Query
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    cancelled: bool = False
    future: Future[None] | None = None

    def emit(self, event: Event) -> None:
        """Called by the job's thread."""
        if not self.cancelled:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def cancel(self) -> None:
        """Ends the generation before its next token, or takes the job out of the queue."""
        self.cancelled = True
        if self.future:
            self.future.cancel()


class Cancelled(Exception):
    """Nobody waits for the answer."""


class StopFound(Exception):
    """The answer contains one of the stop strings."""


# ---- the text of an answer -----------------------------------------------------------------------


class AnswerStreamer(BaseStreamer):
    """Receives the tokens of `generate`. Calls `emit` with the text that is certain: without half a
    character at its end, and without what may become a stop string. `step` is called after every
    token. Raises StopFound at a stop string, which is not a part of the text."""

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        emit: Callable[[str], None],
        step: Callable[[], None],
    ) -> None:
        self.tokenizer, self.stops, self.emit, self.step = tokenizer, stops, emit, step
        self.tokens: list[int] = []
        self.num_emitted = 0  # characters
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.tokens += value.flatten().tolist()
        text = self.text()
        found = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            self.advance(text[: min(found)])
            raise StopFound
        text = text.rstrip("\ufffd")  # in place of bytes that are not a character yet
        self.advance(text[: len(text) - held_back(text, self.stops)])
        self.step()

    def text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def advance(self, text: str) -> None:
        if len(text) > self.num_emitted:
            self.emit(text[self.num_emitted :])
            self.num_emitted = len(text)

    def end(self) -> None:
        self.advance(self.text())


def held_back(text: str, stops: Sequence[str]) -> int:
    """Returns how many characters at the end of the text are the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


# ---- the engine ----------------------------------------------------------------------------------


class Engine:
    """The threads that answer, at most `settings.max_active` at a time."""

    def __init__(
        self, model: MemoryLM, tokenizer: Any, states: States, turns: Turns, settings: Settings
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.states, self.turns, self.settings = states, turns, settings
        self._threads = ThreadPoolExecutor(settings.max_active, "answer")
        self._mutex = threading.Lock()
        self._jobs: set[Job] = set()

    @property
    def num_jobs(self) -> int:
        """The number of answers that are generated or wait."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Starts the job or puts it into the queue. Raises ApiError if the queue is full."""
        with self._mutex:
            if len(self._jobs) >= self.settings.max_active + self.settings.max_waiting:
                raise ApiError(
                    429, "queue_full", f"{len(self._jobs)} requests are before this; try again"
                )
            self._jobs.add(job)
        job.future = self._threads.submit(self._run, job)
        job.future.add_done_callback(lambda _: self._jobs.discard(job))

    def close(self) -> None:
        with self._mutex:
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        self._threads.shutdown()

    def _run(self, job: Job) -> None:
        try:
            with self.turns:
                self._answer(job)
        except (Cancelled, CancelledError):
            log.debug("a request was cancelled")
        except ApiError as error:
            job.emit(error)
        except Exception as error:
            log.exception("an answer failed")
            reason = f"internal error ({type(error).__name__})"
            job.emit(ApiError(500, "internal_error", reason))

    def _answer(self, job: Job) -> None:
        def step() -> None:
            self.turns.pass_on()
            if job.cancelled:
                raise Cancelled

        step()
        query = job.query
        loaded = self.states.get(query.memories)
        start = loaded.state
        ids = self.prompt_ids(query, start)
        max_tokens = self.check_length(query, start, ids)
        job.emit(Started(len(ids), start.num_tokens))
        state, rest = self.read_ahead(start, ids, step)
        stops = [*query.stops]
        if isinstance(query.prompt, list) and not self.tokenizer.chat_template:
            stops += ["\n"] if query.prompt and isinstance(query.prompt[0], dict) else []
        streamer = AnswerStreamer(self.tokenizer, stops, lambda text: job.emit(Delta(text)), step)
        reason = "stop"
        try:
            self.generate(state, rest, query, max_tokens, streamer)
            if streamer.tokens[-1] not in self.end_tokens:
                reason = "length"
        except StopFound:
            log.debug("a stop string was found")
        attention = self.measure(loaded, ids, streamer.tokens, step) if query.attention else None
        job.emit(Ended(reason, len(streamer.tokens), attention))

    def prompt_ids(self, query: Query, start: MemoryState) -> Tensor:
        """Returns the tokens [T] int64 of the prompt after `start`."""
        prompt: Any = query.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            try:
                prompt = conversation_text(self.tokenizer, prompt)
            except jinja2.TemplateError as error:
                reason = f"the chat template refuses the messages: {error}"
                raise ApiError(400, "invalid_messages", reason, "messages") from None
        if isinstance(prompt, str):
            prompt = following_ids(self.tokenizer, prompt, start.num_tokens)
        ids = torch.tensor(prompt, dtype=torch.int64)
        if not len(ids):
            raise ApiError(400, "empty_prompt", "the prompt has no tokens", "prompt")
        try:
            check_ids(ids, self.model.base.config.vocab_size)
        except ValueError as error:
            raise ApiError(400, "invalid_prompt", str(error), "prompt") from None
        return ids

    def check_length(self, query: Query, start: MemoryState, ids: Tensor) -> int:
        """Returns how many tokens the answer may have. Raises ApiError if there are too many. The
        last token of an answer is never read, so it needs no capacity."""
        room = self.model.capacity - start.num_tokens - len(ids) + 1
        most = self.settings.max_new_tokens
        if query.max_tokens is not None and query.max_tokens > most:
            message = f"max_tokens {query.max_tokens} is past this server's limit of {most}"
            raise ApiError(400, "max_tokens_too_large", message, "max_tokens")
        if room < (query.max_tokens or 1):
            raise ApiError(
                400,
                "context_length_exceeded",
                f"the memories have {start.num_tokens} tokens, the prompt has {len(ids)}, the "
                f"answer may have {query.max_tokens or 1}; the capacity is {self.model.capacity}",
            )
        return query.max_tokens or min(most, room)

    def read_ahead(
        self, state: MemoryState, ids: Tensor, step: Callable[[], None]
    ) -> tuple[MemoryState, Tensor]:
        """Reads a long prompt [T] in pieces that end where a batch of chunks ends, as one call
        would encode them. Returns the state and the last piece, which has at least one token."""
        piece = self.model.chunks_per_batch * self.model.memory_config.chunk_size
        with torch.no_grad():
            while len(ids) > (count := piece - state.open_ids.shape[1]):
                state = self.model(ids[None, :count], state, logits_to_keep=1).past_key_values
                ids = ids[count:]
                step()
        return state, ids

    def generate(
        self,
        state: MemoryState,
        ids: Tensor,
        query: Query,
        max_tokens: int,
        streamer: AnswerStreamer,
    ) -> None:
        sampling: dict[str, Any] = dict(do_sample=False)
        if query.temperature:
            sampling = dict(
                do_sample=True, temperature=query.temperature, top_p=query.top_p, top_k=0
            )
        seed = secrets.randbits(63) if query.seed is None else query.seed
        self.model.generate(
            ids[None],
            state=state,
            max_new_tokens=max_tokens,
            streamer=streamer,
            generator=torch.Generator().manual_seed(seed),
            **sampling,
        )

    @property
    def end_tokens(self) -> set[int]:
        found = self.model.generation_config.eos_token_id
        return {found} if isinstance(found, int) else set(found or ())

    def measure(
        self, loaded: Loaded, ids: Tensor, answer: list[int], step: Callable[[], None]
    ) -> list[tuple[str, int, float]]:
        tokens = torch.tensor(answer, dtype=torch.int64)
        fractions = chunk_attention(self.model, loaded.state, ids, tokens, step).tolist()
        return [(*chunk, f) for chunk, f in zip(loaded.chunks, fractions, strict=True)]
