"""Corpora that are more than plain text, by the authors' names: questions, tokenised samples,
copies, news."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from uiollms.data.corpora.text import LONGDATA, PG19, longdata, pg19
from uiollms.data.documents import Corpus, Document, Lazy, NewsDocument, altered, joined, picked
from uiollms.data.readers.beacons import SHORTEST, sampled
from uiollms.data.readers.hub import HubDataset, Split
from uiollms.data.readers.json_lines import (
    Fields,
    RawFile,
    input_output,
    json_lines,
    json_list,
    plain_text,
    text_of,
)
from uiollms.data.registry import SIZE, corpus
from uiollms.files.errors import ConfigError

LONG_ALPACA = HubDataset("Yukang/LongAlpaca-12k")
REDPAJAMA_SAMPLE = RawFile("redpajama-sample.json")
LONG_ALPACA_FILE = RawFile("longalpaca.json")
NEWS = HubDataset("glnmario/news-qa-summarization")
LONG_BOOK = 128 * 1024  # characters


@corpus(
    "longalpaca.{train,test}.{true,false}",
    r"longalpaca\.(train|test)\.(true|false)",
    task="question answering",
    needs=[LONG_ALPACA],
)
def longalpaca(split: str, train_prompt: str) -> Corpus:
    """The dataset has one split; of every 100 rows the last is ours for testing."""

    def make(fields: Fields, source: str) -> Document:
        response = text_of(fields, "output", source)
        prompt = text_of(fields, "instruction", source)
        return Document(
            prompt, source, response, "question answering", train_prompt=train_prompt == "true"
        )

    rows = LONG_ALPACA.rows("train", ["instruction", "output"], make)
    return picked(rows, [i for i in range(len(rows)) if (i % 100 == 99) == (split == "test")])


@corpus(
    "beacons",
    r"beacons",
    task="language modeling + QA",
    mixed=True,
    needs=[REDPAJAMA_SAMPLE, LONG_ALPACA_FILE],
)
def beacons() -> Corpus:
    return joined(
        [
            json_lines(REDPAJAMA_SAMPLE.path(), plain_text),
            json_lines(LONG_ALPACA_FILE.path(), input_output),
        ]
    )


def beacon_files(max_length: str, no_alpaca: str | None, distill: str | None) -> list[RawFile]:
    """Raises ConfigError where no sample can be so short."""
    if int(max_length) < SHORTEST:
        raise ConfigError(
            f"corpus beacons sampled.{max_length}: no sample has fewer than {SHORTEST} tokens; ask "
            "for more"
        )
    return [REDPAJAMA_SAMPLE] if no_alpaca else [REDPAJAMA_SAMPLE, LONG_ALPACA_FILE]


@corpus(
    "beacons sampled.MAX_LENGTH[.no_alpaca][.distill]",
    r"beaconssampled\.(\d+)(\.no_alpaca)?(\.distill)?",
    task="activation beacons",
    needs=[REDPAJAMA_SAMPLE, LONG_ALPACA_FILE],
    tokenized=True,
    reads=beacon_files,
    taught=lambda max_length, no_alpaca, distill: int(max_length) if distill else 0,
)
def beacons_sampled(
    max_length: str,
    no_alpaca: str | None,
    distill: str | None,
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> Corpus:
    readers = zip(
        beacon_files(max_length, no_alpaca, distill), (plain_text, input_output), strict=False
    )
    length, kl_weight = int(max_length), 1.0 if distill else 0.0
    return joined(
        [
            sampled(json_lines(file.path(), make), file.path(), tokenizer, length, kl_weight)
            for file, make in readers
        ]
    )


# ---- Copying and memory --------------------------------------------------------------------------

COPIES = {size: RawFile(f"minipile_copy_{size}.json") for size in ("256", "2k", "4k")}


def prompt_response(fields: Fields, source: str) -> Document:
    response = text_of(fields, "response", source)
    return Document(text_of(fields, "prompt", source), source, response, task="auto encoding")


@corpus(
    "minipile copy {256,2k,4k}.{train,test}",
    r"minipilecopy(256|2k|4k)\.(train|test)",
    task="auto encoding",
    needs=list(COPIES.values()),
    reads=lambda size, split: [COPIES[size]],
)
def minipile_copy(size: str, split: str) -> Corpus:
    return json_list(COPIES[size].path(), split, prompt_response)


@corpus(
    "longdata-corpus copy[.SIZE]",
    r"longdata-corpuscopy" + SIZE,
    task="longdata copy",
    needs=[LONGDATA],
)
def longdata_copy(size: str | None) -> Corpus:
    return altered(longdata(size), task="longdata copy")


@corpus(
    "memory util 2k.{train,test}",
    r"memoryutil2k\.(train|test)",
    task="memory utilization",
    needs=[COPIES["2k"]],
)
def memory_util(split: str) -> Corpus:
    return altered(
        minipile_copy("2k", split), response=None, task="memory utilization", kl_weight=1.0
    )


# ---- News ----------------------------------------------------------------------------------------


def news_sources(*arguments: str) -> list[Split]:
    return [NEWS.split("train"), PG19.split("train")]


@corpus(
    "newsqasum.train.{lm,distill}",
    r"newsqasum\.train\.(lm|distill)",
    task="news qa summation",
    needs=[NEWS, PG19],
    reads=news_sources,
)
def newsqasum(kind: str) -> Corpus:
    return news(kl_weight=1.0 if kind == "distill" else 0.0)


@corpus(
    "newsqasumv2", r"newsqasumv2", task="news qa summation", needs=[NEWS, PG19], reads=news_sources
)
def newsqasum_v2() -> Corpus:
    return news(kl_weight=0.9, distractor=long_book)


def numbered_book(books: Corpus, story: int) -> str:
    """The book that a story of version 1 is hidden in, the same every time: as in the release its
    own number, counted round."""
    return books[story % len(books)].text


def long_book(books: Corpus, story: int) -> str:
    """The same of version 2: of books in an order drawn with the story's number the first of at
    least 128k characters; where none has as many, the longest."""
    longest = ""
    for number in random.Random(story).sample(range(len(books)), len(books)):
        longest = max(longest, books[number].text, key=len)
        if len(longest) >= LONG_BOOK:
            break
    return longest


def news(kl_weight: float, distractor: Callable[[Corpus, int], str] = numbered_book) -> Corpus:
    rows = NEWS.load("train", ["story", "questions", "answers", "summary"])
    books = pg19("train", None)

    def read(i: int) -> Document:
        fields, source = rows[i], f"hub:{NEWS.name}/train: row {i + 1}"
        questions, answers = (
            texts_of(fields, "questions", source),
            texts_of(fields, "answers", source),
        )
        if len(questions) != len(answers):
            raise ConfigError(f"{source}: {len(questions)} questions but {len(answers)} answers")
        return NewsDocument(
            text_of(fields, "story", source),
            source,
            task="news qa summation",
            kl_weight=kl_weight,
            questions=tuple(zip(questions, answers, strict=True)),
            summary=text_of(fields, "summary", source),
            distractor=distractor(books, i),
        )

    return Lazy(len(rows), read)


def texts_of(fields: Fields, name: str, source: str) -> list[str]:
    """A field that is a list of texts."""
    values = fields.get(name)
    if not isinstance(values, list):
        raise ConfigError(
            f"{source}: field {name!r} is {type(values).__name__}, expected a list of texts"
        )
    return [text_of({name: value}, name, source) for value in values]
