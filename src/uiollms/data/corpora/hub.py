"""Any dataset of the Hugging Face hub, by its name there."""

from __future__ import annotations

from uiollms.data.documents import Corpus
from uiollms.data.readers.hub_stream import HubStream
from uiollms.data.registry import register_corpus


def stream_of(name: str, first: str | None, second: str | None, column: str | None) -> HubStream:
    return HubStream(name, tuple(part for part in (first, second) if part), column)


@register_corpus(
    "hub:ORG/NAME[:CONFIG][:SPLIT][#COLUMN]",
    r"hub:([^:#/]+/[^:#/]+)(?::([^:#]+))?(?::([^:#]+))?(?:#(.+))?",
    mixed_tasks=True,
    sources_read=lambda *arguments: [stream_of(*arguments)],
    has_messages=lambda *arguments: stream_of(*arguments).open_stream().has_messages(),
)
def hub(name: str, first: str | None, second: str | None, column: str | None) -> Corpus:
    """A dataset of the hub, read as a stream: the column `text` or `messages`, or the one that
    #COLUMN names. The split is `train` by default. The name is used as it is written."""
    return stream_of(name, first, second, column).open_stream()
