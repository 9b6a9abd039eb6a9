"""What is done to the text of single corpora: articles out of lines, long repetitions out of crawled text."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable

KEPT = 8  # of a longer run of equal characters or words; enough for rules, dots and laughter, too few to fill a chunk
_CHARACTERS = re.compile(rf"(.)\1{{{KEPT},}}+", re.DOTALL)
_WORDS = re.compile(rf"(?<!\S)((\S++)(?:\s+\2(?!\S)){{{KEPT - 1}}})(?:\s+\2(?!\S))++")

_TITLE = re.compile(r"\s*= (?!=).*(?<!=) =\s*")  # " = Title = ", but not " = = Section = = "


def collapse_repeats(text: str) -> str:
    """Runs of more than 8 equal characters or words cut to 8; linear in the length of the text.

    "....................... 12" -> "........ 12"        "no no no no no no no no no no" -> "no no no no no no no no"
    """
    return _WORDS.sub(r"\1", _CHARACTERS.sub(lambda run: run[1] * KEPT, text))


def article_spans(lines: Iterable[str], longer_than: int = 100) -> tuple[array[int], array[int]]:
    """Where articles start and end in lines of WikiText: at level-1 headings; only articles of more than `longer_than`
    characters, heading included.

    " = Tea = ", "Leaves ...", " = = History = = ", "Long ago ...", " = Cup = ", "(stub)" -> ([0], [4])
    """
    starts, ends = array("q"), array("q")
    start = number = length = 0

    def finish() -> None:
        if length > longer_than:
            starts.append(start)
            ends.append(number)

    for line in lines:
        if _TITLE.fullmatch(line):
            finish()
            start, length = number, 0
        length += len(line)
        number += 1
    finish()
    return starts, ends
