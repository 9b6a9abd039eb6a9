"""Clean the texts of single corpora: join lines to articles, and shorten repetitions."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable

LONGEST_STRING = 100  # characters of a repeated string; the limit bounds the time per character

_SIGNS = re.compile(r"([\W_])\1{4,}")
_STRINGS = re.compile(rf"([^\W_]{{3,{LONGEST_STRING}}}?)\1+")

_TITLE = re.compile(r"\s*= (?!=).*(?<!=) =\s*")  # " = Title = ", but not " = = Section = = "


def collapse_repeats(text: str) -> str:
    """Shortens repetitions. Five or more equal characters that are neither letters nor digits
    become four. A string of 3 to 100 letters and digits that is repeated directly occurs once
    afterwards; the shortest such string is used. These are the released program's rules, except for
    the limit of 100, which makes the time linear in the text's length.

    "........ 12" -> ".... 12"      "hahahaha, nonono" -> "haha, nonono"      "1000000" -> "1000"
    """
    return _STRINGS.sub(r"\1", _SIGNS.sub(lambda run: run[1] * 4, text))


def article_spans(lines: Iterable[str], longer_than: int = 100) -> tuple[array[int], array[int]]:
    """Finds the line numbers at which the bodies of articles start and end in WikiText. An article
    begins after a level-1 heading. As in the released program, the first article and all articles
    whose bodies have at most `longer_than` characters are left out.

    " = Jam = ", "Fruit ...", " = Tea = ", "Leaves ...", " = = History = = ", " = Cup = ", "(stub)"
    -> ([3], [5])
    """
    starts, ends = array("q"), array("q")
    titles = start = number = length = 0

    def finish() -> None:
        if titles > 1 and length > longer_than:
            starts.append(start)
            ends.append(number)

    for line in lines:
        if _TITLE.fullmatch(line):
            finish()
            titles, start, length = titles + 1, number + 1, 0
        else:
            length += len(line)
        number += 1
    finish()
    return starts, ends
