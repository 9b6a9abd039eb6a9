"""The limits of the server, and the error that a request is answered with."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
RETRY_AFTER = 5  # seconds; the header of answers that another attempt may change


@dataclass(frozen=True)
class Settings:
    """Limits, each of which a command-line option sets.

    max_upload: bytes of a document. max_memories: documents on disk. cache_size: bytes of keys and
    values of loaded memories that no request uses. max_active: answers that are generated at the
    same time. max_waiting: requests that wait for that. max_new_tokens: tokens of the longest
    answer. timeout: seconds of a request, its waiting included.
    """

    max_upload: int = 16 * MIB
    max_memories: int = 100
    cache_size: int = 1024 * MIB
    max_active: int = 4
    max_waiting: int = 16
    max_new_tokens: int = 1024
    timeout: float = 600.0


class ApiError(Exception):
    """An error that the client gets as JSON, in the form of OpenAI's errors.

    status: of HTTP. code: a word for programs. param: the field that is at fault.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    @property
    def content(self) -> dict[str, dict[str, str | None]]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": dict(
                message=encodable(self.message),
                type=kinds.get(self.status, usual),
                param=None if self.param is None else encodable(self.param),
                code=self.code,
            )
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def encodable(text: str) -> str:
    """Escapes halves of surrogate pairs, which JSON may contain and UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()
