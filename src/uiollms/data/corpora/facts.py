"""Facts hidden in real text and asked for some chunks later: the cheapest teacher of retrieval.

A document is filler text and a list of facts. Where in the filler each fact is stated and where
it is asked for depends on the size of a chunk, which a corpus does not know:
uiollms/data/recall_sample.py. All of it is drawn from the document's number and split, so a
document is the same everywhere.

    statement   The harbour of Alma is amber.       lookup["3fa9c"] = 4821
    question    Question: What is Alma's harbour?   assert lookup["3fa9c"] ==
                Answer:
    value       amber                               4821
"""

from __future__ import annotations

import random

from uiollms.data.corpora.local import LIBRARY, PYTHON, stdlib
from uiollms.data.documents import Corpus, Document, Fact, Lazy, RecallDocument
from uiollms.data.registry import corpus

FARTHEST = 8  # chunks from a statement to its question
DOCUMENTS = 2**17  # of a split
MOST_FACTS = 128  # of a document; one of few or short chunks has room for the first of them
FILLER = 64 * 1024  # characters of a document; a longer one begins again
HELD_OUT = 8  # every so-manieth fact that there is belongs to the test documents alone

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


@corpus(
    "recall.{facts,keys}[.{train,test}][.CHUNKS]",
    rf"recall\.(facts|keys)(?:\.(train|test))?(?:\.([1-{FARTHEST}]))?",
    task="question answering",
    needs=[LIBRARY],
    chunks=lambda kind, split, distance: (int(distance or 1) + 1, FARTHEST + 1),
    version=lambda *arguments: PYTHON,
)
def recall(kind: str, split: str | None, distance: str | None) -> Corpus:
    """Statements about people (facts), or keys and their values (keys), in Python sources of the
    same split; without one `train`. Each is asked for CHUNKS chunks later, 1 to 8; without the
    number a distance drawn for each. No fact or file of a test document is in a training one."""
    split = split or "train"
    sources = stdlib(split, None)
    chunks = int(distance) if distance else None

    def read(number: int) -> Document:
        rng = random.Random(f"recall {kind} {split} {number}")
        name = f"recall.{kind}.{split}: document {number + 1}"
        text = Document(filler_text(sources, rng), name)
        return with_facts(text, kind, rng, split == "test", chunks)

    return Lazy(DOCUMENTS, read)


def with_facts(
    document: Document,
    kind: str,
    rng: random.Random,
    held_out: bool = False,
    distance: int | None = None,
) -> RecallDocument:
    """A text with facts of a kind, "facts" or "keys", to be hidden in it. held_out: facts that no
    other document has; distance: chunks from statement to question, None: drawn for each."""
    drawn = drawn_facts(rng, held_out) if kind == "facts" else drawn_keys(rng, held_out)
    return RecallDocument(
        document.text,
        document.source,
        task="question answering",
        kl_weight=document.kl_weight,
        facts=tuple(drawn),
        distance=distance,
    )


def filler_text(sources: Corpus, rng: random.Random) -> str:
    """FILLER characters, from a random line of a random document on and of those behind it."""
    place = rng.randrange(len(sources))
    text = sources[place].text
    text = text[text.find("\n", rng.randrange(len(text))) + 1 :]
    for step in range(1, len(sources)):
        if len(text) >= FILLER:
            break
        text += "\n" + sources[(place + step) % len(sources)].text
    return text[:FILLER]


def drawn_facts(rng: random.Random, held_out: bool) -> list[Fact]:
    """Of each thing of a person at most one."""
    pairs = [
        (thing, person)
        for i, thing in enumerate(THINGS)
        for j, person in enumerate(PEOPLE)
        if ((i + j) % HELD_OUT == 0) == held_out
    ]
    facts = []
    for thing, person in rng.sample(pairs, MOST_FACTS):
        number = rng.choice((rng.randrange(10, 100), rng.randrange(10_000, 100_000)))
        value = rng.choice((str(number), rng.choice(VALUES)))
        facts.append(fact(rng.choice(FORMS), value, thing=thing, person=person))
    return facts


def drawn_keys(rng: random.Random, held_out: bool) -> list[Fact]:
    """Keys of five hexadecimal digits and values of four digits, no key twice."""
    keys = range(0, 16**5, HELD_OUT) if held_out else range(16**5)
    wanted = [k for k in rng.sample(keys, 2 * MOST_FACTS) if (k % HELD_OUT == 0) == held_out]
    facts = []
    for key in wanted[:MOST_FACTS]:
        value = str(rng.randrange(1000, 10_000))
        facts.append(fact(rng.choice(KEY_FORMS), value, key=f"{key:05x}"))
    return facts


def fact(form: tuple[str, str], value: str, **names: str) -> Fact:
    statement, question = form
    stated = statement.format(value=f" {value}", **names)
    return Fact(f"\n{stated}\n", f"\n{question.format(**names)}", f" {value}")
