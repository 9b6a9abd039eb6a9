"""Scores of one generated answer against its reference answers, each from 0 (wrong) to 1 (right).

If there are several references, the best score counts, as in the benchmarks, except for
`contained_fraction`, which is a mean over them. `METRICS` contains the functions by name.

`exact_match`, `token_f1` and `contains` compare normalised texts. The normalisation is that of
SQuAD's evaluation program (Rajpurkar et al. 2016), in its order:

    1. lower case
    2. removal of ASCII punctuation, without a space in its place
    3. removal of the words a, an and the
    4. whitespace -> one space

    "The  Eiffel-Tower, in Paris." -> "eiffeltower in paris"

Sources: SQuAD; LongBench (Bai et al. 2023), metrics.py; LongBench-v2 (Bai et al. 2024), pred.py;
RULER (Hsieh et al. 2024), string_match_all; BABILong (Kuratov et al. 2024), compare_answers; HELMET
(Yen et al. 2024).
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from uiollms.data.documents import QuestionDocument

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Returns the text in SQuAD's normal form, which the module's docstring describes."""
    words = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION))
    return " ".join(words.split())


# ---- Answers to questions ------------------------------------------------------------------------


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the normalised prediction equals a normalised reference, else 0.0."""
    return float(normalize_answer(prediction) in map(normalize_answer, references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Returns the best F1 of the words that the normalised prediction and a reference share. A
    word counts as often as both contain it. If one of the two has no words, the score is 1.0 where
    the other has none either, else 0.0 (as in SQuAD 2.0)."""
    return max((word_f1(prediction, reference) for reference in references), default=0.0)


def word_f1(prediction: str, reference: str) -> float:
    found, wanted = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))  # = 2 P R / (P + R)


def contains(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the normalised prediction contains a normalised reference, else 0.0. A
    reference without words is contained in an empty prediction only."""
    found = normalize_answer(prediction)
    wanted = map(normalize_answer, references)
    return float(any(text in found if text else not found for text in wanted))


def contained_fraction(prediction: str, references: Sequence[str]) -> float:
    """Returns the fraction of the references that the prediction contains, without regard to case
    (the recall of RULER and of HELMET's RULER tasks). The texts are not normalised further.
    Raises ValueError without a reference."""
    if not references:
        raise ValueError("contained_fraction needs at least one reference, found none")
    found = prediction.lower()
    return sum(reference.lower() in found for reference in references) / len(references)


# ---- Summaries and code --------------------------------------------------------------------------


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Returns the best F-measure of ROUGE-L, as rouge-score computes it without stemming.

    LongBench uses the package `rouge`, which splits at spaces and full stops only, so its values
    differ slightly.
    """
    # rouge_score takes half a second to import, which only tasks with texts need.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return max(
        (scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references),
        default=0.0,
    )


def code_similarity(prediction: str, references: Sequence[str]) -> float:
    """Returns the best similarity of the prediction's first line of code to a reference, rounded
    to two digits (LongBench). Blank lines and lines with a backtick, "#" or "//" are skipped. The
    similarity is the ratio of difflib's SequenceMatcher, as in fuzzywuzzy 0.18 without its C
    extension."""
    lines = prediction.split("\n")
    code = [line for line in lines if line.strip() and not re.search(r"`|#|//", line)]
    first = code[0] if code else ""
    ratios = [difflib.SequenceMatcher(None, first, text).ratio() for text in references if first]
    return max((round(100 * ratio) / 100 for ratio in ratios), default=0.0)


# ---- Answers out of a fixed set ------------------------------------------------------------------


def number_match(prediction: str, references: Sequence[str]) -> float:
    """Returns the fraction of the prediction's numbers that equal the first number of a reference
    (LongBench's counts and "Paragraph 12"), and 0.0 for a prediction without a number."""
    found = re.findall(r"\d+", prediction)
    wanted = [re.findall(r"\d+", reference)[:1] for reference in references]
    return max((found.count(text[0]) / len(found) for text in wanted if text and found), default=0)


def choice_match(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the letter that the prediction chooses is a reference, else 0.0
    (LongBench-v2). The letter, A to D, follows "The correct answer is", with or without brackets;
    asterisks are removed first. A prediction that is only a letter, in brackets or followed by a
    full stop, chooses it too."""
    text = prediction.replace("*", "").strip()
    match = (
        re.search(r"The correct answer is \(([A-D])\)", text)
        or re.search(r"The correct answer is ([A-D])", text)
        or re.fullmatch(r"\(?([A-D])\)?\.?", text)
    )
    return float(match is not None and match[1] in references)


def class_match(prediction: str, references: Sequence[str], labels: Sequence[str]) -> float:
    """Returns 1 / n if the prediction names the reference among n of the labels, else 0.0
    (LongBench's classification). Labels that are a proper part of the reference do not count.

    labels: all classes; names are compared with regard to case
    """
    named = [label for label in labels if label in prediction]
    scores = [0.0]
    for reference in references:
        counted = [label for label in named if label == reference or label not in reference]
        if reference in counted:
            scores.append(1 / len(counted))
    return max(scores)


def only_label_match(prediction: str, references: Sequence[str], labels: Sequence[str]) -> float:
    """Returns 1.0 if the first sentence of the prediction names exactly the labels of a reference,
    else 0.0, without regard to case (BABILong). A reference of several labels has commas between
    them.

    labels: the answers that are possible; those that the question names are left out by the caller
    """
    sentence = re.split(r"\.|<context>|<example>", prediction.lower(), maxsplit=1)[0]
    named = {label.lower() for label in labels if label.lower() in sentence}
    wanted = [{part.strip() for part in reference.lower().split(",")} for reference in references]
    return float(named in wanted)


def score_answer(prediction: str, question: QuestionDocument) -> float:
    """Returns the score of an answer to a benchmark's question, by the question's metric."""
    if question.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if question.metric in LABEL_METRICS:
        metric = LABEL_METRICS[question.metric]
        return metric(prediction, question.references, question.labels)
    return METRICS[question.metric](prediction, question.references)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "contains": contains,
    "contained_fraction": contained_fraction,
    "rouge_l": rouge_l,
    "code_similarity": code_similarity,
    "number_match": number_match,
    "choice_match": choice_match,
}
LABEL_METRICS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    "class_match": class_match,
    "only_label_match": only_label_match,
}
