"""Corpora for tasks other than language modeling, under the authors' names: questions, tokenised
samples, copies and news."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from uiollms.data.corpora.text import LONGDATA, PG19, longdata, pg19
from uiollms.data.documents import (
    Corpus,
    Document,
    LazyCorpus,
    NewsDocument,
    concatenate,
    select_documents,
    with_fields,
)
from uiollms.data.readers.beacons import SHORTEST, sampled_corpus
from uiollms.data.readers.fields import Fields, input_output, plain_text, text_field
from uiollms.data.readers.hub import HubDataset, HubSplit
from uiollms.data.readers.json_lines import RawFile, json_lines
from uiollms.data.readers.json_lists import json_list
from uiollms.data.registry import SIZE, register_corpus
from uiollms.files.errors import ConfigError

LONG_ALPACA = HubDataset("Yukang/LongAlpaca-12k")
REDPAJAMA_SAMPLE = RawFile("redpajama-sample.json")
LONG_ALPACA_FILE = RawFile("longalpaca.json")
NEWS = HubDataset("glnmario/news-qa-summarization")
LONG_BOOK = 128 * 1024  # characters


@register_corpus(
    "longalpaca.{train,test}.{true,false}",
    r"longalpaca\.(train|test)\.(true|false)",
    task="question answering",
    sources=[LONG_ALPACA],
)
def longalpaca(split: str, train_prompt: str) -> Corpus:
    """The dataset has one split. The last of every 100 rows belongs to our test split."""

    def make(fields: Fields, source: str) -> Document:
        response = text_field(fields, "output", source)
        prompt = text_field(fields, "instruction", source)
        return Document(
            prompt, source, response, "question answering", train_prompt=train_prompt == "true"
        )

    rows = LONG_ALPACA.rows("train", ["instruction", "output"], make)
    return select_documents(
        rows, [i for i in range(len(rows)) if (i % 100 == 99) == (split == "test")]
    )


@register_corpus(
    "beacons",
    r"beacons",
    task="language modeling + QA",
    mixed_tasks=True,
    sources=[REDPAJAMA_SAMPLE, LONG_ALPACA_FILE],
)
def beacons() -> Corpus:
    return concatenate(
        [
            json_lines(REDPAJAMA_SAMPLE.path(), plain_text),
            json_lines(LONG_ALPACA_FILE.path(), input_output),
        ]
    )


def beacon_files(max_length: str, no_alpaca: str | None, distill: str | None) -> list[RawFile]:
    """Returns the files of the corpus. Raises ConfigError if `max_length` is below the shortest
    sample."""
    if int(max_length) < SHORTEST:
        raise ConfigError(
            f"corpus beacons sampled.{max_length}: no sample has fewer than {SHORTEST} tokens; "
            "set a larger number"
        )
    return [REDPAJAMA_SAMPLE] if no_alpaca else [REDPAJAMA_SAMPLE, LONG_ALPACA_FILE]


@register_corpus(
    "beacons sampled.MAX_LENGTH[.no_alpaca][.distill]",
    r"beaconssampled\.(\d+)(\.no_alpaca)?(\.distill)?",
    task="activation beacons",
    sources=[REDPAJAMA_SAMPLE, LONG_ALPACA_FILE],
    needs_tokenizer=True,
    sources_read=beacon_files,
    teacher_tokens=lambda max_length, no_alpaca, distill: int(max_length) if distill else 0,
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
    return concatenate(
        [
            sampled_corpus(json_lines(file.path(), make), file.path(), tokenizer, length, kl_weight)
            for file, make in readers
        ]
    )


# ---- Copying and memory --------------------------------------------------------------------------

COPIES = {size: RawFile(f"minipile_copy_{size}.json") for size in ("256", "2k", "4k")}


def prompt_response(fields: Fields, source: str) -> Document:
    response = text_field(fields, "response", source)
    return Document(text_field(fields, "prompt", source), source, response, task="auto encoding")


@register_corpus(
    "minipile copy {256,2k,4k}.{train,test}",
    r"minipilecopy(256|2k|4k)\.(train|test)",
    task="auto encoding",
    sources=list(COPIES.values()),
    sources_read=lambda size, split: [COPIES[size]],
)
def minipile_copy(size: str, split: str) -> Corpus:
    return json_list(COPIES[size].path(), split, prompt_response)


@register_corpus(
    "longdata-corpus copy[.SIZE]",
    r"longdata-corpuscopy" + SIZE,
    task="longdata copy",
    sources=[LONGDATA],
)
def longdata_copy(size: str | None) -> Corpus:
    return with_fields(longdata(size), task="longdata copy")


@register_corpus(
    "memory util 2k.{train,test}",
    r"memoryutil2k\.(train|test)",
    task="memory utilization",
    sources=[COPIES["2k"]],
)
def memory_util(split: str) -> Corpus:
    return with_fields(
        minipile_copy("2k", split), response=None, task="memory utilization", kl_weight=1.0
    )


# ---- News ----------------------------------------------------------------------------------------


def news_sources(*arguments: str) -> list[HubSplit]:
    return [NEWS.split("train"), PG19.split("train")]


@register_corpus(
    "newsqasum.train.{lm,distill}",
    r"newsqasum\.train\.(lm|distill)",
    task="news qa summation",
    sources=[NEWS, PG19],
    sources_read=news_sources,
)
def newsqasum(kind: str) -> Corpus:
    return news(kl_weight=1.0 if kind == "distill" else 0.0)


@register_corpus(
    "newsqasumv2",
    r"newsqasumv2",
    task="news qa summation",
    sources=[NEWS, PG19],
    sources_read=news_sources,
)
def newsqasum_v2() -> Corpus:
    return news(kl_weight=0.9, distractor=long_book)


def numbered_book(books: Corpus, story: int) -> str:
    """The book in which version 1 hides a story. As in the released program it has the story's
    number, modulo the number of books."""
    return books[story % len(books)].text


def long_book(books: Corpus, story: int) -> str:
    """The book in which version 2 hides a story: the first of at least 128k characters, in an
    order that the story's number determines. If no book is that long, it is the longest one."""
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
            text_list_field(fields, "questions", source),
            text_list_field(fields, "answers", source),
        )
        if len(questions) != len(answers):
            raise ConfigError(f"{source}: {len(questions)} questions but {len(answers)} answers")
        return NewsDocument(
            text_field(fields, "story", source),
            source,
            task="news qa summation",
            kl_weight=kl_weight,
            questions=tuple(zip(questions, answers, strict=True)),
            summary=text_field(fields, "summary", source),
            distractor=distractor(books, i),
        )

    return LazyCorpus(len(rows), read)


def text_list_field(fields: Fields, name: str, source: str) -> list[str]:
    """Returns a field that is a list of texts. Raises ConfigError if it is not."""
    values = fields.get(name)
    if not isinstance(values, list):
        raise ConfigError(
            f"{source}: field {name!r} is {type(values).__name__}, expected a list of texts"
        )
    return [text_field({name: value}, name, source) for value in values]
