"""Fixtures of the server's tests."""

from pathlib import Path

import pytest
from server import running, tiny_model


@pytest.fixture
def tiny(workspace):
    return tiny_model()


@pytest.fixture
def served(tiny):
    """A server with one ready memory, `served.book`."""
    with running(*tiny, Path("memories")) as server:
        server.book = server.upload()["id"]
        yield server
