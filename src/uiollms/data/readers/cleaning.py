"""What is done to the text of single corpora: articles out of lines, long repetitions out of
crawled text."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable

LONGEST_STRING = 100  # of a repeated string that is looked for: bounds the time a character takes

_SIGNS = re.compile(r"([\W_])\1{4,}")
_STRINGS = re.compile(rf"([^\W_]{{3,{LONGEST_STRING}}}?)\1+")

_TITLE = re.compile(r"\s*= (?!=).*(?<!=) =\s*")  # " = Title = ", but not " = = Section = = "


def collapse_repeats(text: str) -> str:
    """Of 5 or more equal characters that are neither letters nor digits 4 stay; a string of 3 to
    100 letters and digits that follows itself directly stays once, the shortest such string
    counting. The released program's rules, but for the 100; time linear in the text's length.

    "........ 12" -> ".... 12"      "hahahaha, nonono" -> "haha, nonono"      "1000000" -> "1000"
    """
    return _STRINGS.sub(r"\1", _SIGNS.sub(lambda run: run[1] * 4, text))


def article_spans(lines: Iterable[str], longer_than: int = 100) -> tuple[array[int], array[int]]:
    """Where the bodies of articles start and end in lines of WikiText. An article begins at a
    level-1 heading, which is left out; as in the released program so are the first article and all
    whose body has at most `longer_than` characters.

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
