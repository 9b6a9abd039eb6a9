"""A server of the tiny model in a thread, at a free port, for the tests of this folder."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import torch
import uvicorn

from uiollms.build import load_memory_lm
from uiollms.config.load import load_env_config
from uiollms.model.fingerprint import fingerprint
from uiollms.serving.app import Service, create_app
from uiollms.serving.settings import Settings
from uiollms.serving.store import Store

NAME = "tiny"
TEXT = "It was a bright cold day, and the clocks were striking. " * 6


def tiny_model() -> tuple[Any, Any]:
    """The model of the workspace with random trained weights, and its tokenizer."""
    model, tokenizer = load_memory_lm(load_env_config("env.json"), "env.json")
    torch.manual_seed(0)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, tokenizer


class Running:
    """A server that answers, with clients of two kinds."""

    def __init__(self, app: Any, port: int, token: str | None) -> None:
        self.service: Service = app.state.service
        self.url, self.port = f"http://127.0.0.1:{port}", port
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=60)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=token or "none", max_retries=0, timeout=60
        )

    def upload(self, text: str | bytes = TEXT, name: str = "book.txt") -> dict:
        """Uploads a document and waits until it is ready or failed. Returns its JSON."""
        found = self.http.post("/v1/memories", files={"file": (name, text)})
        assert found.status_code == 202, found.text
        return self.wait(found.json()["id"])

    def wait(self, id: str) -> dict:
        while (found := self.http.get(f"/v1/memories/{id}").json())["status"] in (
            "waiting",
            "compressing",
        ):
            time.sleep(0.01)
        return found

    def idle(self) -> None:
        """Returns once no answer is generated and none waits."""
        while self.service.engine.num_jobs:
            time.sleep(0.01)


@contextmanager
def running(
    model: Any, tokenizer: Any, folder: Path, token: str | None = None, **limits: Any
) -> Iterator[Running]:
    store = Store(folder, fingerprint(model), limits.get("max_memories", 100))
    app = create_app(model, tokenizer, NAME, store, Settings(**limits), token)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    found = Running(app, listener.getsockname()[1], token)
    try:
        yield found
    finally:
        found.http.close()
        found.openai.close()
        server.should_exit = True
        thread.join()
