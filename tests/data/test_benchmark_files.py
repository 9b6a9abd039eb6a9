"""Reads small hand-written copies of the benchmarks' datasets, in their files and columns."""

import json
import zipfile
from pathlib import Path

import pytest
from datasets import Dataset

from uiollms import ConfigError
from uiollms.config.load import load_tasks
from uiollms.data import QuestionDocument, find_corpus, open_corpus
from uiollms.data.corpora.benchmarks import HELMET_SETS, LONGBENCH_SETS
from uiollms.evaluation.answer_metrics import LABEL_METRICS, METRICS

ROOT = Path(__file__).parents[2]
# LongBench's columns. `all_classes` is null but for trec.
LONG = dict(
    input="Who runs the mill?",
    context="The mill by the river is old. Ada runs it.",
    answers=["Ada", "Ada Brook"],
    length=10,
    dataset="narrativeqa",
    language="en",
    all_classes=None,
    _id="0a1b",
)
CHOICE = dict(
    _id="66ec",
    domain="Single-Document QA",
    sub_domain="Literary",
    difficulty="easy",
    length="short",
    question="Who runs the mill?",
    choice_A="Ben",
    choice_B="Ada",
    choice_C="Cora",
    choice_D="Dan",
    answer="B",
    context="The mill is old. Ada runs it.",
)
FACTS = [
    dict(input="Ada went to the garden.", question="Where is Ada? ", target="garden"),
    dict(input="Ben went to the office.", question="Where is Ben? ", target="office"),
    dict(
        input="Ben went to the garden, then the kitchen.",
        question="Where was Ben before the kitchen? ",
        target="garden",
    ),
    dict(input="Ben is in the kitchen.", question="Where is Ben? ", target="kitchen"),
]
PASSAGES = [
    dict(title="Mill", text="The mill is old.", id="1"),
    dict(title="Ada", text="Ada runs it.", id="2"),
]


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("UIOLLMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setenv("UIOLLMS_HUB_DIR", str(tmp_path / "hub"))
    return tmp_path / "hub"


def write_lines(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def only(name: str) -> QuestionDocument:
    (document,) = open_corpus(name)
    assert isinstance(document, QuestionDocument)
    return document


# ---- LongBench -----------------------------------------------------------------------------------


def write_zip(hub: Path, dataset: str = "THUDM/LongBench") -> Path:
    """LongBench's data.zip."""
    archive = hub / dataset / "data.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for name in LONGBENCH_SETS:
            row = LONG | dict(dataset=name, answers=["Paragraph 2"])
            row |= dict(all_classes=["City", "Date"], answers=["City"]) if name == "trec" else {}
            files.writestr(f"data/{name}.jsonl", json.dumps(row) + "\n")
    return archive


@pytest.mark.parametrize("dataset", ["THUDM/LongBench", "zai-org/LongBench"])
@pytest.mark.parametrize("name", LONGBENCH_SETS)
def test_every_set_of_longbenchs_archive(hub, name, dataset):
    write_zip(hub, dataset)
    document = only(f"longbench.{name}")
    assert document.task == "question answering" and document.metric in METRICS | LABEL_METRICS
    assert LONG["context"] in document.text
    asks = name not in ("gov_report", "multi_news", "passage_count", "lcc")
    assert (LONG["input"] in document.text) == asks
    assert document.labels == (("City", "Date") if name == "trec" else ())
    assert document.response.strip() == document.references[0]


def test_a_longbench_prompt_in_full(hub):
    """An unpacked file is read before the archive."""
    write_zip(hub)
    write_lines(hub / "THUDM/LongBench/data/hotpotqa.jsonl", LONG)
    assert only("longbench.hotpotqa") == QuestionDocument(
        "Answer the question based on the given passages. Only give me the answer and do not "
        "output any other words.\n\nThe following are given passages.\nThe mill by the river is "
        "old. Ada runs it.\n\nAnswer the question based on the given passages. Only give me the "
        "answer and do not output any other words.\n\nQuestion: Who runs the mill?\nAnswer:",
        f"{hub}/THUDM/LongBench/data/hotpotqa.jsonl: line 1",
        " Ada",
        "question answering",
        references=("Ada", "Ada Brook"),
        metric="token_f1",
        max_new_tokens=32,
    )


def test_faults_of_longbenchs_files(hub):
    with pytest.raises(
        ConfigError, match="contains no data/trec.jsonl; where there is network: hf"
    ):
        open_corpus("longbench.trec")
    write_lines(hub / "THUDM/LongBench/data/trec.jsonl", LONG | dict(answers=[]), {"input": "x"})
    corpus = open_corpus("longbench.trec")
    with pytest.raises(ConfigError, match="line 1: has no reference answer"):
        corpus[0]
    with pytest.raises(ConfigError, match="line 2: field 'context' is missing"):
        corpus[1]
    (hub / "THUDM/LongBench/data.zip").write_bytes(b"PK no archive")
    with pytest.raises(ConfigError, match="data.zip: data/lcc.jsonl cannot be unpacked"):
        open_corpus("longbench.lcc")
    with zipfile.ZipFile(hub / "THUDM/LongBench/data.zip", "w") as files:
        files.writestr("data/other.jsonl", "{}")
    with pytest.raises(ConfigError, match="data.zip: contains no data/lcc.jsonl"):
        open_corpus("longbench.lcc")


# ---- the others ----------------------------------------------------------------------------------


def test_longbench_2_is_one_list_of_choices(hub):
    path = hub / "THUDM/LongBench-v2/data.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([CHOICE | dict(length="long", answer="C"), CHOICE]))
    assert [document.references for document in open_corpus("longbench-v2")] == [("C",), ("B",)]
    document = only("longbench-v2.short")
    assert document.source.endswith("data.json: row 2") and document.metric == "choice_match"
    assert document.text == (
        "Please read the following text and answer the question below.\n\n<text>\nThe mill is old. "
        "Ada runs it.\n</text>\n\nWhat is the correct answer to this question: Who runs the mill?\n"
        "Choices:\n(A) Ben\n(B) Ada\n(C) Cora\n(D) Dan\n\nFormat your response as follows: "
        '"The correct answer is (insert answer here)".'
    )
    assert document.response == "\n\nThe correct answer is (B)."


@pytest.mark.parametrize("layout", ["data/qa1/4k.json", "4k/qa1-00000-of-00001.parquet"])
def test_babilongs_possible_answers_are_those_of_the_file(hub, layout):
    path = hub / "RMT-team/babilong" / layout
    path.parent.mkdir(parents=True)
    if layout.endswith("json"):
        path.write_text(json.dumps(FACTS))
    else:
        Dataset.from_list(FACTS).to_parquet(str(path))
    documents = list(open_corpus("babilong.qa1.4k"))
    assert [document.references[0] for document in documents] == [f["target"] for f in FACTS]
    assert documents[0].labels == ("garden", "kitchen", "office")
    assert documents[2].labels == ("garden", "office")  # the question names the kitchen
    assert documents[0].text.startswith("Ada went to the garden.\n\nAnswer the question")


@pytest.mark.parametrize("name", HELMET_SETS)
def test_every_set_of_helmet(hub, name):
    rag = name in ("nq", "triviaqa", "hotpotqa", "popqa")
    file = {
        "nq": "kilt/nq-dev-multikilt_1000_k105_dep6.jsonl",
        "triviaqa": "kilt/triviaqa-dev-multikilt_1000_k105_dep6.jsonl",
        "hotpotqa": "kilt/hotpotqa-dev-multikilt_1000_k105_dep3.jsonl",
        "popqa": "kilt/popqa_test_1000_k105_dep6.jsonl",
        "json_kv": "json_kv/test_k220_dep6.jsonl",
        "niah_mk_2": "ruler/niah_mk_2/validation_16384.jsonl",
        "niah_mk_3": "ruler/niah_multikey_3/validation_16384.jsonl",
        "niah_mv": "ruler/niah_mv/validation_16384.jsonl",
    }[name]
    row = dict(question="Who runs the mill?", answers=["Ada", "Ada Brook"], ctxs=PASSAGES)
    if name == "json_kv":
        row = dict(context='{"a1": "b2"}', question="a1", answer="b2")
    elif not rag:
        row = dict(context="The grass.", query="ox-mild", type_needle_v="number", answer=["7"])
    write_lines(hub / "princeton-nlp/HELMET/data" / file, row)
    document = only(f"helmet.{name}.16k")
    assert document.metric == ("contains" if rag else "contained_fraction")
    answers = row["answers"] if rag else row["answer"]
    assert document.references == ((answers,) if isinstance(answers, str) else tuple(answers))
    if rag:
        expected = "Document (Title: Mill): The mill is old.\n\nDocument (Title: Ada): Ada runs it."
        assert f"\n\n{expected}\n\nQuestion: Who runs the mill?\nAnswer:" in document.text
    else:
        assert row["context"] in document.text
        assert (row.get("query") or row.get("question")) in document.text
    with pytest.raises(ConfigError, match="then tar -xzf data.tar.gz in this folder"):
        open_corpus(f"helmet.{name}.128k")


@pytest.mark.parametrize(
    "change, fault",
    [
        (dict(ctxs=None), "field 'ctxs' is NoneType, expected a list"),
        (dict(ctxs=["x"]), "passage 1: is str, expected an object"),
        (dict(ctxs=[dict(title="x")]), "passage 1: field 'text' is missing"),
        (dict(answers=None), "field 'answers' is NoneType, expected a list of texts"),
    ],
)
def test_faults_of_helmets_rows_name_the_line(hub, change, fault):
    row = dict(question="Who?", answers=["Ada"], ctxs=PASSAGES) | change
    write_lines(hub / "princeton-nlp/HELMET/data/kilt/nq-dev-multikilt_1000_k20_dep3.jsonl", row)
    with pytest.raises(ConfigError, match=f"line 1: {fault}"):
        open_corpus("helmet.nq.4k")[0]


# ---- the task files ------------------------------------------------------------------------------


def test_the_task_files_name_every_set():
    names = set()
    for benchmark in ("longbench", "longbench-v2", "babilong", "helmet"):
        for task in load_tasks(ROOT / f"config/tasks/{benchmark}.json"):
            assert task.task_type == "question answering" and task.generate
            entry, arguments = find_corpus(task.task_name)
            assert task.task_name.startswith(f"{benchmark}") and entry.sources_read(*arguments)
            names.add(task.task_name)
    assert {f"longbench.{name}" for name in LONGBENCH_SETS} <= names
    assert {name.split(".")[1] for name in names if name.startswith("helmet.")} == {*HELMET_SETS}
    assert {"longbench-v2.short", "longbench-v2.medium", "longbench-v2.long"} <= names
    assert {f"babilong.qa{i}.4k" for i in range(1, 6)} <= names
