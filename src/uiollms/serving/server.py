"""Starts the server."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from uiollms.files.errors import ConfigError
from uiollms.model.fingerprint import fingerprint
from uiollms.model.memory_lm import MemoryLM
from uiollms.serving.app import create_app
from uiollms.serving.settings import Settings
from uiollms.serving.store import Store

MOST_CONNECTIONS = 256  # more get status 503
GRACE = 3  # seconds that answers have when the server ends


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_token(host: str, token: str | None) -> None:
    """Raises ConfigError if a server at `host` needs a token and has none."""
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError("--token, UIOLLMS_TOKEN: expected printable ASCII characters, no spaces")
    if token is not None and len(token) < 8:
        raise ConfigError(f"--token, UIOLLMS_TOKEN: has {len(token)} characters, at least 8 are")
    if token is None and not is_local(host):
        raise ConfigError(
            f"--host {host}: other machines can reach it, so a token is needed; set UIOLLMS_TOKEN "
            "(or --token, which other users of this machine can see), or listen at 127.0.0.1"
        )


def open_socket(host: str, port: int) -> socket.socket:
    """Raises ConfigError if nothing can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({reason})") from None


def run(
    model: MemoryLM,
    tokenizer: Any,
    name: str,
    folder: Path,
    listener: socket.socket,
    settings: Settings,
    token: str | None,
    ready: Callable[[], None],
) -> None:
    """Serves until SIGINT or SIGTERM. ready: is called once requests are accepted."""
    store = Store(folder, fingerprint(model), settings.max_memories)
    app = create_app(model, tokenizer, name, store, settings, token)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    try:
        Server(config).run(sockets=[listener])
    finally:
        store.close()
