"""The modes of `compare` in a task, and the presses of kvpress among them."""

from __future__ import annotations

import ast
import re
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

PLAIN_MODES = ("window", "raw", "shuffled", "recent", "streaming", "bm25", "pooled")
# Short names of presses, and their classes in kvpress.
PRESSES = {
    "snapkv": "SnapKVPress",
    "knorm": "KnormPress",
    "expected_attention": "ExpectedAttentionPress",
    "kvzip": "KVzipPress",
}
PRESS_NAME = r"press:([A-Za-z][A-Za-z0-9]*)(\(.*\))?"


def parse_press(mode: str) -> tuple[str, dict[str, Any]]:
    """Returns the class of a press in kvpress and the arguments of its constructor. Raises
    ValueError for other text.

    snapkv -> SnapKVPress, {}
    press:SnapKVPress(window_size=32) -> SnapKVPress, {"window_size": 32}
    """
    if mode in PRESSES:
        return PRESSES[mode], {}
    form = "expected press:NAME or press:NAME(argument=number, ...)"
    found = re.fullmatch(PRESS_NAME, mode)
    if not found:
        raise ValueError(f"{mode!r} is no mode and no press: {form}")
    try:
        call = ast.parse(f"press{found[2] or '()'}", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(f"{mode!r}: its arguments are not numbers with names: {form}") from None
    if "None" in arguments or "compression_ratio" in arguments:
        raise ValueError(
            f"{mode!r}: compression_ratio is computed from the number of memory slots; remove it"
        )
    return found[1], arguments


def is_press(mode: str) -> bool:
    return mode in PRESSES or mode.startswith("press:")


def checked_mode(mode: str) -> str:
    if mode not in PLAIN_MODES and not is_press(mode):
        raise ValueError(
            f"mode {mode!r} is unknown; allowed are {', '.join((*PLAIN_MODES, *PRESSES))} and "
            "press:NAME"
        )
    if is_press(mode):
        parse_press(mode)
    return mode


Mode = Annotated[
    str,
    AfterValidator(checked_mode),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": [*PLAIN_MODES, *PRESSES], "type": "string"},
                {"pattern": f"^{PRESS_NAME}$", "type": "string"},
            ]
        }
    ),
]
