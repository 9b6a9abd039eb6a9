"""Turns at the model. Each answer and each compression has a thread of its own, and one thread at a
time uses the model, for one step: a token of an answer, or a batch of chunks."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any


class Turns:
    """A lock that threads get in the order in which they asked for it. As a context it holds the
    lock; `pass_on` inside it lets every thread that waits take one step."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> Turns:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return self
            called = threading.Event()
            self._waiting.append(called)
        called.wait()  # the lock is handed over, it never becomes free in between
        return self

    def __exit__(self, *_: Any) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False

    def pass_on(self) -> None:
        self.__exit__()
        self.__enter__()
