"""Tests answer metrics against values computed by hand, and F1 against a slow twin."""

import itertools
from fractions import Fraction

import pytest

from uiollms.evaluation.answer_metrics import (
    choice_match,
    class_match,
    code_similarity,
    contained_fraction,
    contains,
    exact_match,
    normalize_answer,
    number_match,
    only_label_match,
    rouge_l,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel-Tower, in Paris.", "eiffeltower in paris"),
        ("An apple\na day", "apple day"),
        ("Theatre of Athens", "theatre of athens"),  # articles are whole words
        ("a.n. other", "other"),  # punctuation first: "an other"
        ("The", ""),
    ],
)
def test_normal_form(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_takes_any_reference():
    assert exact_match(" the Paris.", ["London", "paris"]) == 1.0
    assert exact_match("Paris, France", ["London", "paris"]) == 0.0
    assert exact_match("Paris", []) == 0.0
    assert exact_match("", ["The"]) == 1.0


def test_token_f1_by_hand():
    # 2 of 4 words are right, 2 of 3 are found: P 1/2, R 2/3 -> 4/7
    assert token_f1("in old Paris, France", ["Paris France today"]) == pytest.approx(4 / 7)
    # the best reference counts
    assert token_f1("red", ["blue", "red red"]) == pytest.approx(2 / 3)
    assert token_f1("x", []) == 0.0
    assert token_f1("the", ["a"]) == 1.0  # neither has a word
    assert token_f1("the", ["red"]) == 0.0


def slow_f1(prediction: list[str], reference: list[str]) -> Fraction:
    """Removes shared words one by one, then the harmonic mean of precision and recall."""
    left, shared = list(reference), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return Fraction(0)
    precision, recall = Fraction(shared, len(prediction)), Fraction(shared, len(reference))
    return 2 * precision * recall / (precision + recall)


def test_token_f1_equals_its_slow_twin_on_all_short_texts():
    texts = [t for n in (1, 2, 3) for t in itertools.product(["red", "blue", "green"], repeat=n)]
    for found, wanted in itertools.product(texts, repeat=2):
        # one rounding of a float64 quotient
        assert token_f1(" ".join(found), [" ".join(wanted)]) == pytest.approx(
            float(slow_f1(list(found), list(wanted))), rel=1e-15
        )


def test_contains():
    assert contains("It was the Paris Opera.", ["London", "Paris opera"]) == 1.0
    assert contains("It was Paris.", ["Paris opera"]) == 0.0
    assert contains("anything", ["the"]) == 0.0
    assert contains("", ["the"]) == 1.0


def test_contained_fraction():
    assert contained_fraction("ABCDE and fghij", ["abcde", "FGHIJ", "klmno", "pqrst"]) == 0.5
    assert contained_fraction("12-34", ["1234"]) == 0.0  # not normalised
    with pytest.raises(ValueError, match="at least one reference"):
        contained_fraction("text", [])


def test_rouge_l_by_hand():
    # longest common subsequence "the cat sat" of 3 words, lengths 4 and 6: P 3/4, R 1/2 -> 0.6
    assert rouge_l("the cat sat down", ["the black cat sat very still"]) == pytest.approx(0.6)
    assert rouge_l("the cat sat down", ["a dog", "the cat sat down"]) == 1.0


def test_code_similarity_takes_the_first_line_of_code():
    answer = "```python\n# a comment\n\nreturn x\nreturn y"
    assert code_similarity(answer, ["return x"]) == 1.0
    # 7 of 8 characters match on both sides: 2 * 7 / 16 = 0.875 -> 0.88 (round half to even: 88)
    assert code_similarity("return y", ["return x"]) == 0.88
    assert code_similarity("# only a comment", ["return x"]) == 0.0


def test_number_match():
    assert number_match("Paragraph 12", ["Paragraph 12"]) == 1.0
    assert number_match("12 or 13", ["Paragraph 12"]) == 0.5
    assert number_match("the twelfth", ["12"]) == 0.0
    assert number_match("112", ["12"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("The correct answer is (B).", 1.0),
        ("**The correct answer is B**", 1.0),
        ("(B)", 1.0),
        ("B.", 1.0),
        ("The correct answer is (C)", 0.0),
        ("Because B is wrong", 0.0),
        ("", 0.0),
    ],
)
def test_choice_match(answer, score):
    assert choice_match(answer, ["B"]) == score


def test_class_match():
    labels = ["Date", "Other date", "City", "Country"]
    assert class_match("Type: City", ["City"], labels) == 1.0
    assert class_match("City or Country", ["City"], labels) == 0.5
    # "Date" is not written in "Other date", so both names count
    assert class_match("Other date, Date", ["Other date"], labels) == 0.5
    assert class_match("Country", ["City"], labels) == 0.0
    # "Date" is a part of "Date of birth" and does not count against it
    assert class_match("Date of birth", ["Date of birth"], ["Date", "Date of birth"]) == 1.0


def test_only_label_match():
    rooms = ["garden", "kitchen", "office"]
    assert only_label_match("In the Kitchen. Then the garden.", ["kitchen"], rooms) == 1.0
    assert only_label_match("kitchen or garden", ["kitchen"], rooms) == 0.0
    assert only_label_match("nowhere", ["kitchen"], rooms) == 0.0
    assert only_label_match("milk and apple", ["apple,milk"], ["apple", "milk", "nothing"]) == 1.0
    assert only_label_match("milk", ["apple,milk"], ["apple", "milk", "nothing"]) == 0.0
