"""Questions about the sources of Python's standard library, with answers that stand in the text.

A document is a conversation. The user's first message contains a part of a source file and a
question about it; further questions follow. Every answer is written in the part exactly as it is
given, so that exact match is a fair measure.
"""

from __future__ import annotations

import ast
import random
import warnings
from collections import Counter
from collections.abc import Iterator

from uiollms.data.corpora.local import LIBRARY, PYTHON, stdlib
from uiollms.data.documents import ChatDocument, Corpus, LazyCorpus, num_characters
from uiollms.data.registry import SIZE, register_corpus

MOST_QUESTIONS = 6  # of a conversation
MOST_CHARACTERS = 60  # of an answer

Pair = tuple[str, str]  # a question and its answer


@register_corpus(
    "questions.{train,test}[.SIZE]",
    r"questions\.(train|test)" + SIZE,
    task="question answering",
    sources=[LIBRARY],
    version=lambda *arguments: PYTHON,
    has_messages=lambda *arguments: True,
)
def questions(split: str, size: str | None) -> Corpus:
    """Questions about source files of `stdlib`, whose splits it has. A document reads a part of
    `size` characters of a file, 3k by default; the path determines which part."""
    files, length = stdlib(split, None), num_characters(size or "3k")

    def read(i: int) -> ChatDocument:
        return conversation(files[i].text, files[i].source, length)

    return LazyCorpus(len(files), read)


def conversation(text: str, source: str, length: int) -> ChatDocument:
    """Returns questions about a part of a source file, with their answers. It has no messages if
    nothing can be asked about the part. length: characters of the part, which has whole lines.

    source: where the text was read. It determines the part and the order of the questions.
    """
    rng = random.Random(source)
    lines = text.split("\n")  # as Python counts them, and not at form feeds
    first = last = rng.randrange(len(lines)) if len(text) > length else 0
    count = 0
    while last < len(lines) and count + len(lines[last]) < length:
        count += len(lines[last]) + 1
        last += 1
    while first > 0 and count + len(lines[first - 1]) < length:  # the file ended before
        first -= 1
        count += len(lines[first]) + 1
    part = "\n".join(lines[first:last])
    pairs = find_questions(text, range(first + 1, last + 1))
    pairs = rng.sample(pairs, min(len(pairs), MOST_QUESTIONS))
    messages = []
    for i, (question, answer) in enumerate(pairs):
        asked = f"{part.strip()}\n\n{question}" if i == 0 else question
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    shown = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return ChatDocument(shown, source, task="question answering", messages=tuple(messages))


def find_questions(text: str, lines: range) -> list[Pair]:
    """Returns a question for every function, class and constant that is defined within these lines
    (from 1), under a name that the file defines once. The answer is the line of the definition."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the strings of some files
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    found = list(definitions(tree))
    names = Counter(name for name, _ in found)
    written = text.split("\n")
    pairs = []
    for name, number in found:
        line = written[number - 1].strip()
        if names[name] == 1 and number in lines and name in line and len(line) <= MOST_CHARACTERS:
            pairs.append((f"Which line defines `{name}`?", line))
    return pairs


def definitions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields the names that a module defines at any depth, with the numbers of their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.lineno
