"""Synthetic recall: facts hidden in real text, with questions about them some chunks later. It is
the cheapest training data for retrieval.

A document contains filler text and a list of facts. uiollms/data/recall_sample.py chooses where
each fact is stated and where its question follows, since that depends on the chunk size. The
document's number and split determine everything, so a document is the same everywhere.

    statement   The harbour of Alma is amber.       lookup["3fa9c"] = 4821
    question    Question: What is Alma's harbour?   assert lookup["3fa9c"] ==
                Answer:
    value       amber                               4821
"""

from __future__ import annotations

import random

from uiollms.data.corpora.local import LIBRARY, PYTHON, stdlib
from uiollms.data.documents import Corpus, Document, Fact, LazyCorpus, RecallDocument
from uiollms.data.registry import register_corpus

FARTHEST = 8  # largest random distance in chunks from a statement to its question
FARTHEST_NAMED = 32  # largest distance that a corpus may name
DISTANCES = "|".join(map(str, range(1, FARTHEST_NAMED + 1)))
DOCUMENTS = 2**17  # in each split
MOST_FACTS = 128  # per document; a document of few or short chunks contains only the first ones
FILLER = 64 * 1024  # characters of filler text, which longer documents repeat
HELD_OUT = 8  # one in so many of all possible facts occurs in test documents only

THINGS = """
    number code colour price address password owner author teacher capital weight height age name
    birthday town ship street garden instrument animal flower metal drink sport room key river
    mountain language planet harbour letter door tower brother sister doctor captain cook dog horse
""".split()
PEOPLE = """
    Alma Bruno Clara Dmitri Edith Farid Greta Hassan Ines Jonas Katya Leo Mina Nikhil Olga Pedro
    Quinn Rosa Stefan Tara Ulrich Vera Walter Ximena Yusuf Zoe Anders Bianca Cyrus Dora Emil Flora
    Gustav Hana Igor Julia Klaus Lena Marco Nadia Oscar Paula Rafael Selma Tomas Ursula Viktor Wanda
""".split()
VALUES = """
    amber basil cedar copper coral crimson ebony emerald fennel ginger granite hazel indigo iron
    ivory jasmine juniper lemon lilac maple marble mint nickel oak olive onyx opal orchid pearl
    pepper pine plum quartz raven ruby saffron sage scarlet silver slate teal thyme topaz velvet
    violet walnut willow zinc falcon otter badger heron lynx salmon beaver finch gecko jackal koala
""".split()
FORMS = (
    ("The {thing} of {person} is{value}.", "The {thing} of {person} is"),
    ("Note: {person}'s {thing} is{value}.", "Question: What is {person}'s {thing}?\nAnswer:"),
    ('{thing}_of["{person}"] ={value}', 'assert {thing}_of["{person}"] =='),
    ("Remember that{value} is the {thing} of {person}.", "{person}'s {thing}:"),
)
KEY_FORMS = (
    ('lookup["{key}"] ={value}', 'assert lookup["{key}"] =='),
    ("The value of key {key} is{value}.", "What is the value of key {key}? It is"),
)


@register_corpus(
    "recall.{facts,keys}[.{train,test}][.CHUNKS]",
    rf"recall\.(facts|keys)(?:\.(train|test))?(?:\.({DISTANCES}))?",
    task="question answering",
    sources=[LIBRARY],
    chunk_range=lambda kind, split, distance: (
        int(distance or 1) + 1,
        max(int(distance or 1), FARTHEST) + 1,
    ),
    version=lambda *arguments: PYTHON,
)
def recall(kind: str, split: str | None, distance: str | None) -> Corpus:
    """Statements about people (facts), or keys with values (keys), hidden in Python sources of the
    same split (`train` by default). The question follows CHUNKS chunks later, 1 to 32; without
    that number every fact has a random distance, at most 8. Training and test documents have no
    fact and no file in common."""
    split = split or "train"
    sources = stdlib(split, None)
    chunks = int(distance) if distance else None

    def read(number: int) -> Document:
        rng = random.Random(f"recall {kind} {split} {number}")
        name = f"recall.{kind}.{split}: document {number + 1}"
        text = Document(filler_text(sources, rng), name)
        return with_facts(text, kind, rng, split == "test", chunks)

    return LazyCorpus(DOCUMENTS, read)


def with_facts(
    document: Document,
    kind: str,
    rng: random.Random,
    held_out: bool = False,
    distance: int | None = None,
) -> RecallDocument:
    """Adds random facts of a kind, "facts" or "keys", to a text.

    held_out: use facts that occur in test documents only; distance: chunks from statement to
    question, None for a random distance of each fact.
    """
    drawn = draw_facts(rng, held_out) if kind == "facts" else draw_keys(rng, held_out)
    return RecallDocument(
        document.text,
        document.source,
        task="question answering",
        kl_weight=document.kl_weight,
        facts=tuple(drawn),
        distance=distance,
    )


def filler_text(sources: Corpus, rng: random.Random) -> str:
    """Returns FILLER characters that start at a random line of a random document and continue with
    the documents after it."""
    first = rng.randrange(len(sources))
    text = sources[first].text
    text = text[text.find("\n", rng.randrange(len(text))) + 1 :]
    for step in range(1, len(sources)):
        if len(text) >= FILLER:
            break
        text += "\n" + sources[(first + step) % len(sources)].text
    return text[:FILLER]


def fact_pairs(held_out: bool) -> list[tuple[str, str]]:
    """All pairs of a thing and a person that occur in test documents (held_out) or in those for
    training."""
    return [
        (thing, person)
        for i, thing in enumerate(THINGS)
        for j, person in enumerate(PEOPLE)
        if ((i + j) % HELD_OUT == 0) == held_out
    ]


def draw_facts(rng: random.Random, held_out: bool) -> list[Fact]:
    """Draws facts about people, at most one for each thing of a person."""
    facts = []
    for thing, person in rng.sample(fact_pairs(held_out), MOST_FACTS):
        number = rng.choice((rng.randrange(10, 100), rng.randrange(10_000, 100_000)))
        value = rng.choice((str(number), rng.choice(VALUES)))
        facts.append(make_fact(rng.choice(FORMS), value, thing=thing, person=person))
    return facts


def draw_keys(rng: random.Random, held_out: bool) -> list[Fact]:
    """Draws distinct keys of five hexadecimal digits and values of four digits."""
    keys = range(0, 16**5, HELD_OUT) if held_out else range(16**5)
    allowed = [k for k in rng.sample(keys, 2 * MOST_FACTS) if (k % HELD_OUT == 0) == held_out]
    facts = []
    for key in allowed[:MOST_FACTS]:
        value = str(rng.randrange(1000, 10_000))
        facts.append(make_fact(rng.choice(KEY_FORMS), value, key=f"{key:05x}"))
    return facts


def make_fact(form: tuple[str, str], value: str, **names: str) -> Fact:
    """Fills the templates of a statement and a question."""
    statement, question = form
    stated = statement.format(value=f" {value}", **names)
    return Fact(f"\n{stated}\n", f"\n{question.format(**names)}", f" {value}")
