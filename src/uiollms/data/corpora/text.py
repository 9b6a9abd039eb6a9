"""Corpora of plain text, under the authors' names. A function decorated with `register_corpus` adds
one."""

from __future__ import annotations

import re
from typing import Any

from uiollms.data.documents import Corpus, Document, LazyCorpus, cut_texts, select_documents
from uiollms.data.readers.cleaning import article_spans, collapse_repeats
from uiollms.data.readers.fields import Fields, plain_text, text_field
from uiollms.data.readers.hub import HubDataset, dataset_documents
from uiollms.data.readers.json_lines import RawFile, json_lines
from uiollms.data.registry import SIZE, register_corpus

MINIPILE = HubDataset("JeanKaddour/minipile")
WIKITEXT = HubDataset(
    "Salesforce/wikitext",
    aliases=("wikitext",),
    files={split: f"wikitext-103-raw-v1/{split}*" for split in ("train", "validation", "test")},
)
PG19 = HubDataset(
    "emozilla/pg19", aliases=("deepmind/pg19", "pg19")
)  # the original dataset is a program that downloads the books
LONGDATA = HubDataset("yuyijiong/LongData-Corpus")
# The two RedPajama datasets are programs too, but their repositories contain the data files.
ARXIV = HubDataset(
    "togethercomputer/RedPajama-Data-1T-Sample", files={"train": "arxiv_sample.jsonl*"}
)
REDPAJAMA_V2 = HubDataset(
    "togethercomputer/RedPajama-Data-V2", files={"train": "sample/documents/**/en_*.json*"}
)
PROOF_PILE = RawFile("proof-pile.json")
CODE_PARROT = RawFile("codeparrot.json")
BOOKS = RawFile("redpajama_book_sample.jsonl")


SPLITS, SPLIT = "{train,validation,test}", r"\.(train|validation|test)"


@register_corpus(
    f"minipile.{SPLITS}[.SIZE]",
    "minipile" + SPLIT + SIZE,
    sources=[MINIPILE],
    sources_read=lambda split, size: [MINIPILE.split(split)],
)
def minipile(split: str, size: str | None) -> Corpus:
    return cut_texts(MINIPILE.rows(split, ["text"], plain_text), size)


@register_corpus(
    f"wikitext103.{SPLITS}[.SIZE]",
    "wikitext103" + SPLIT + SIZE,
    sources=[WIKITEXT],
    sources_read=lambda split, size: [WIKITEXT.split(split)],
)
def wikitext103(split: str, size: str | None) -> Corpus:
    """A row of the dataset is one line; a document is the body of one article."""
    lines = WIKITEXT.load(split, ["text"])
    starts, ends = article_spans(line for batch in lines.iter(10_000) for line in batch["text"])

    def read(i: int) -> Document:
        text = "".join(lines[starts[i] : ends[i]]["text"])
        return Document(text, f"hub:{WIKITEXT.name}/{split}: rows {starts[i] + 1}-{ends[i]}")

    return cut_texts(LazyCorpus(len(starts), read), size)


@register_corpus(
    f"pg19.{SPLITS}[.SIZE]",
    "pg19" + SPLIT + SIZE,
    sources=[PG19],
    sources_read=lambda split, size: [PG19.split(split)],
)
def pg19(split: str, size: str | None) -> Corpus:
    return cut_texts(PG19.rows(split, ["text"], plain_text), size)


@register_corpus("proof-pile[.SIZE]", r"proof-pile" + SIZE, sources=[PROOF_PILE])
def proof_pile(size: str | None) -> Corpus:
    return cut_texts(json_lines(PROOF_PILE.path(), plain_text), size)


@register_corpus("code-parrot[.SIZE]", r"code-parrot" + SIZE, sources=[CODE_PARROT])
def code_parrot(size: str | None) -> Corpus:
    return cut_texts(json_lines(CODE_PARROT.path(), plain_text), size)


@register_corpus("longdata-corpus[.SIZE]", r"longdata-corpus" + SIZE, sources=[LONGDATA])
def longdata(size: str | None) -> Corpus:
    def make(fields: Fields, source: str) -> Document:
        return Document(collapse_repeats(text_field(fields, "text", source)), source)

    return cut_texts(LONGDATA.rows("train", ["text"], make), size)


@register_corpus(
    "redpajama arxiv sample.train[.SIZE]", r"redpajamaarxivsample\.train" + SIZE, sources=[ARXIV]
)
def redpajama_arxiv(size: str | None) -> Corpus:
    """Only rows with an arxiv id are documents. One pass over the column `meta` finds them."""
    rows = ARXIV.load("train", ["text", "meta"])
    metas = (meta for batch in rows.select_columns(["meta"]).iter(10_000) for meta in batch["meta"])
    numbers = [i for i, meta in enumerate(metas) if has_arxiv_id(meta)]
    texts = dataset_documents(rows.select_columns(["text"]), f"hub:{ARXIV.name}/train", plain_text)
    return cut_texts(select_documents(texts, numbers), size)


def has_arxiv_id(meta: Any) -> bool:
    """Whether `meta`, an object or its text, has an id: {"arxiv_id": "2406.18173", ...}"""
    if isinstance(meta, str):
        return re.search(r"""["']arxiv_id["']: *["'][^"']""", meta) is not None
    return bool(meta and meta.get("arxiv_id"))


@register_corpus(
    "redpajama book sample.train[.SIZE]", r"redpajamabooksample\.train" + SIZE, sources=[BOOKS]
)
def redpajama_book(size: str | None) -> Corpus:
    return cut_texts(json_lines(BOOKS.path(), plain_text, limit=10_000), size)


@register_corpus("redpajama v2.train[.SIZE]", r"redpajamav2\.train" + SIZE, sources=[REDPAJAMA_V2])
def redpajama_v2(size: str | None) -> Corpus:
    def make(fields: Fields, source: str) -> Document:
        return Document(text_field(fields, "raw_content", source), source)

    return cut_texts(REDPAJAMA_V2.rows("train", ["raw_content"], make), size)
