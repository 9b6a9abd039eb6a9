"""The names of `protocols` in a task; data/protocols.py describes what they score."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

PLAIN_PROTOCOLS = ("paper", "document", "later", "beacon")
SIZED_PROTOCOLS = ("sliding", "last", "segment")  # a number of tokens follows the name and a dot
STRIDE = 256  # tokens by which the windows of protocol sliding advance
SIZED_NAME = rf"({'|'.join(SIZED_PROTOCOLS)})\.([1-9][0-9]{{0,8}})"


def parse_protocol(name: str) -> tuple[str, int]:
    """Splits the name of a protocol: "paper" -> ("paper", 0), "sliding.1024" -> ("sliding", 1024).
    Raises ValueError for an unknown name, and for windows no longer than their stride."""
    if name in PLAIN_PROTOCOLS:
        return name, 0
    found = re.fullmatch(SIZED_NAME, name)
    if not found:
        raise ValueError(
            f"protocol {name!r} is unknown; allowed are {', '.join(PLAIN_PROTOCOLS)}, and with a "
            "number of tokens sliding.1024, last.256 and segment.2048"
        )
    kind, tokens = found[1], int(found[2])
    if kind == "sliding" and tokens <= STRIDE:
        raise ValueError(
            f"protocol {name!r}: windows advance by {STRIDE} tokens and do not score their first "
            f"token, so windows must be longer than {STRIDE}"
        )
    return kind, tokens


def checked_protocol(name: str) -> str:
    parse_protocol(name)
    return name


ProtocolName = Annotated[
    str,
    AfterValidator(checked_protocol),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": [*PLAIN_PROTOCOLS], "type": "string"},
                {"pattern": f"^{SIZED_NAME}$", "type": "string"},
            ]
        }
    ),
]
