"""The paths of the server and their answers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, BinaryIO

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import ValidationError
from safetensors import safe_open
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from uiollms.model.memory_lm import MemoryLM
from uiollms.serving.answers import Answer
from uiollms.serving.bodies import AnswerRequest, ChatRequest, CompletionRequest, UploadRequest
from uiollms.serving.compression import Compression
from uiollms.serving.engine import Engine, Job, Query
from uiollms.serving.guard import BodyTooLarge, Guard
from uiollms.serving.settings import ApiError, Settings, encodable
from uiollms.serving.states import States
from uiollms.serving.store import LONGEST_NAME, Document, Store
from uiollms.serving.turns import Turns

MAX_UPLOADS = 4  # at the same time; each is on the disk twice for a moment, and others wait


class Service:
    """What the paths share: the documents, the loaded memories and the threads."""

    def __init__(
        self, model: MemoryLM, tokenizer: Any, name: str, store: Store, settings: Settings
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.store, self.settings, self.created = store, settings, int(time.time())
        self.turns = Turns()
        self.states = States(model, store, settings.cache_size)
        self.engine = Engine(model, tokenizer, self.states, self.turns, settings)
        self.compression = Compression(model, tokenizer, store, self.turns)
        self.uploads = asyncio.Semaphore(MAX_UPLOADS)

    # ---- memories --------------------------------------------------------------------------------

    def memory_json(self, document: Document) -> dict[str, Any]:
        """tokens, chunks: of the whole document, null until it is tokenised. chunks_done,
        tokens_in, slots_out, ratio: what is compressed so far."""
        record, memory = document.record, self.model.memory_config
        status, error = self.store.status(document)
        tokens, chunks = document.tokens, document.chunks
        done = document.chunks_done
        if record.status == "ready":
            tokens, chunks, done = record.tokens, record.chunks, record.chunks or 0
        slots = record.slots if record.slots is not None else done * memory.num_memory
        tokens_in = done * (record.made_by.compressor if record.made_by else memory).chunk_size
        return dict(
            id=document.id,
            object="memory",
            name=record.name,
            created=record.created,
            bytes=record.bytes,
            status=status,
            error=error,
            tokens=tokens,
            chunks=chunks,
            chunks_done=done,
            tokens_in=tokens_in,
            slots_out=slots,
            open_tokens=None if tokens is None or done != chunks else tokens - tokens_in,
            ratio=round(tokens_in / slots, 2) if slots else None,
        )

    async def upload(self, request: Request) -> dict[str, Any]:
        """Stores the document of a multipart or JSON body, and has it compressed."""
        is_json = request.headers.get("content-type", "").startswith("application/json")
        try:
            async with asyncio.timeout(self.settings.timeout), self.uploads:
                document = await (self.store_json if is_json else self.store_form)(request)
        except TimeoutError:
            raise ApiError(408, "timeout", "the upload took too long") from None
        self.compression.add(document)
        return self.memory_json(document)

    async def store_form(self, request: Request) -> Document:
        """Stores the field `file`, which is on the disk while it arrives."""
        async with request.form(max_files=1, max_fields=1, max_part_size=4096) as form:
            file, name = form.get("file"), form.get("name")
            if not isinstance(file, UploadFile):
                message = "expected a multipart form with a file in its field `file`"
                raise ApiError(400, "missing_file", message, "file")
            if not isinstance(name, str):
                name = file.filename
            return await self.store_file(name, file.file, file.size or 0)

    async def store_json(self, request: Request) -> Document:
        body = await request.body()
        try:
            found = UploadRequest.model_validate_json(body)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None
        data = found.text.encode()
        return await self.store_file(found.name, io.BytesIO(data), len(data))

    async def store_file(self, name: str | None, file: BinaryIO, size: int) -> Document:
        if size > self.settings.max_upload:
            message = f"the document has {size:,} bytes, at most {self.settings.max_upload:,}"
            raise ApiError(413, "too_large", message + " are accepted", "file")
        return await run_in_threadpool(self.store.add, clean_name(name or "document"), file)

    def delete(self, id: str) -> dict[str, Any]:
        self.store.delete(id)
        with self.turns:
            self.states.forget(id)
        return dict(id=id, object="memory", deleted=True)

    def chunk_text(self, id: str, number: int) -> dict[str, Any]:
        """Returns the text of a chunk, as the memory's file contains it."""
        document = self.store.get_ready(id)
        if not 0 <= number < (document.record.chunks or 0):
            raise ApiError(404, "chunk_not_found", f"memory {id!r} has no chunk {number}")
        with safe_open(self.store.path(id, ".mem"), "pt") as file:
            ids = file.get_slice("chunk_ids")[number]
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return dict(memory=id, chunk=number, text=text)

    # ---- answers ---------------------------------------------------------------------------------

    async def answer(self, body: AnswerRequest, request: Request) -> Response:
        if body.model not in (None, self.name):
            message = f"the model of this server is {self.name!r}"
            raise ApiError(404, "model_not_found", message, "model")
        is_chat = isinstance(body, ChatRequest)
        prompt: Any
        max_tokens = body.max_tokens
        if isinstance(body, ChatRequest):
            prompt = [message.for_template for message in body.messages]
            max_tokens = body.max_completion_tokens or max_tokens
        else:
            assert isinstance(body, CompletionRequest)
            prompt = body.single_prompt
        job = Job(
            Query(
                prompt,
                body.memories,
                max_tokens,
                body.temperature or 0.0,
                body.top_p or 1.0,
                body.stops,
                body.seed,
                body.attention,
            )
        )
        self.engine.submit(job)
        answer = Answer(job, request, self.name, is_chat, self.settings.timeout)
        if not body.stream:
            return await answer.whole()
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return await answer.streamed(usage)

    def close(self) -> None:
        self.engine.close()
        self.compression.close()
        self.store.close()


def clean_name(name: str) -> str:
    """The name of a document as it is stored and shown: at most 255 characters, and characters that
    move a cursor or change the direction of text are replaced. It is never a path."""
    cut = encodable(name)[:LONGEST_NAME]
    return "".join(c if c.isprintable() else "\ufffd" for c in cut)


# ---- the app -------------------------------------------------------------------------------------


def create_app(
    model: MemoryLM,
    tokenizer: Any,
    name: str,
    store: Store,
    settings: Settings,
    token: str | None = None,
) -> FastAPI:
    """name: of the model, in requests and answers. token: what requests must show; None means that
    the server is local."""
    service = Service(model, tokenizer, name, store, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.compression.start()
        yield
        await run_in_threadpool(service.close)

    # FastAPI's own pages load scripts from other servers.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, token=token, max_upload=settings.max_upload)
    add_error_handlers(app)
    page, policy = read_page()

    @app.get("/", include_in_schema=False)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        entry = dict(id=name, object="model", created=service.created, owned_by="uiollms")
        memory = model.memory_config
        sizes = dict(
            capacity=model.capacity, chunk_size=memory.chunk_size, num_memory=memory.num_memory
        )
        limits = dict(max_upload=settings.max_upload, max_new_tokens=settings.max_new_tokens)
        return dict(object="list", data=[entry | sizes | limits])

    @app.post("/v1/memories", status_code=202)
    async def add_memory(request: Request) -> dict[str, Any]:
        return await service.upload(request)

    @app.get("/v1/memories")
    async def list_memories() -> dict[str, Any]:
        return dict(object="list", data=[service.memory_json(d) for d in store.documents()])

    @app.get("/v1/memories/{id}")
    async def show_memory(id: str) -> dict[str, Any]:
        return service.memory_json(store.get(id))

    @app.get("/v1/memories/{id}/chunks/{number}")
    def show_chunk(id: str, number: int) -> dict[str, Any]:
        return service.chunk_text(id, number)

    @app.delete("/v1/memories/{id}")
    def delete_memory(id: str) -> dict[str, Any]:
        return service.delete(id)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.answer(body, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await service.answer(body, request)

    return app


def read_page() -> tuple[str, str]:
    """Returns the page and its Content-Security-Policy: only its own script and style are used, and
    it connects to this server only."""
    page = files("uiollms.serving").joinpath("page.html").read_text(encoding="utf-8")

    def hash_of(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        digest = hashlib.sha256(found[1].encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return page, (
        f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def add_error_handlers(app: FastAPI) -> None:
    """Errors of any kind have the form of OpenAI's."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.content, error.status, error.headers)

    @app.exception_handler(BodyTooLarge)
    async def body_too_large(request: Request, error: BodyTooLarge) -> Response:
        return JSONResponse(error.error.content, 413)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this field is not supported; leave it out"
        found = ApiError(400, "invalid_request", f"{where}: {message}" if where else message, where)
        return JSONResponse(found.content, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, "invalid_request", str(error.detail))
        return JSONResponse(found.content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(500, "internal_error", "internal error").content, 500)
