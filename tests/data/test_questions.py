"""Questions about Python's sources, whose answers stand in the part that is asked about."""

import ast
import warnings

import pytest

from uiollms.data import open_corpus
from uiollms.data.corpora.questions import conversation, find_questions

SOURCE = '''\
"""A mill."""
WHEELS = 3


class Mill(Building):
    wheels: int = 2

    def __init__(self, name="Ada"):
        self.name = name

    def grind(
        self,
        grain,
    ):
        stones = grain * WHEELS
        return stones


class Tower(Building):
    def __init__(self): ...
'''


def test_questions_are_for_names_that_are_defined_once_and_answered_by_their_line():
    pairs = dict(find_questions(SOURCE, range(1, 100)))
    assert pairs == {
        "Which line defines `WHEELS`?": "WHEELS = 3",
        "Which line defines `Mill`?": "class Mill(Building):",
        "Which line defines `grind`?": "def grind(",
        "Which line defines `stones`?": "stones = grain * WHEELS",
        "Which line defines `Tower`?": "class Tower(Building):",
    }
    assert find_questions(SOURCE, range(3, 6)) == [
        ("Which line defines `Mill`?", "class Mill(Building):")
    ]
    assert find_questions("no python (", range(1, 9)) == []


@pytest.mark.parametrize("length", [20, 100, 10_000])
@pytest.mark.parametrize("source", ["a.py", "b.py", "c.py"])
def test_a_part_has_whole_lines_and_contains_every_answer(source, length):
    document = conversation(SOURCE, source, length)
    assert document == conversation(SOURCE, source, length)  # the source determines everything
    if not document.messages:
        assert document.is_empty and length == 20
        return
    part = document.messages[0]["content"].rpartition("\n\n")[0]
    assert part in SOURCE and len(part) <= length
    lines = {line.strip() for line in SOURCE.splitlines()}
    assert {line.strip() for line in part.splitlines()} <= lines
    roles = [message["role"] for message in document.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    for question, answer in zip(document.messages[::2], document.messages[1::2], strict=True):
        assert answer["content"] in part
        assert question["content"].endswith("`?")


def test_the_last_lines_of_a_file_are_filled_up_with_those_before():
    lines = "".join(f"name_{i} = {i}\n" for i in range(100))
    for number in range(20):
        document = conversation(lines, f"{number}.py", 200)
        part = document.messages[0]["content"].rpartition("\n\n")[0]
        assert 200 - 14 <= len(part) + 1 <= 200


def test_splits_are_those_of_the_library():
    test, train = open_corpus("questions.test"), open_corpus("questions.train.1k")
    assert len(test) == len(open_corpus("stdlib.test"))
    assert {d.source for d in test}.isdisjoint(train[i].source for i in range(len(train)))
    asked = [d for d in test if not d.is_empty]
    assert len(asked) > len(test) / 2
    assert all(len(d.messages[0]["content"]) < 3 * 1024 + 200 for d in asked)


def test_slow_twin_of_the_answers_on_real_files():
    """An answer is a line in which Python's parser, given this line alone or with a body, finds a
    definition of the name."""
    checked = 0
    for document in open_corpus("questions.test"):
        for question, answer in zip(document.messages[::2], document.messages[1::2], strict=True):
            name, answer = question["content"].split("`")[-2], answer["content"]
            body = " pass" if answer.endswith(":") else ""
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(answer + body)
            except SyntaxError:
                continue  # it continues in the next line
            nodes = [*ast.walk(tree)]
            assert name in {getattr(node, "name", getattr(node, "id", None)) for node in nodes}
            checked += 1
    assert checked > 100


def test_lines_are_those_that_python_counts():
    text = "\x0c\nfirst = 1\n\x0cdef second(): ...\n"
    assert find_questions(text, range(2, 4)) == [
        ("Which line defines `first`?", "first = 1"),
        ("Which line defines `second`?", "def second(): ..."),
    ]
