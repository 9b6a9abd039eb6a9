"""Corpora that are on every machine: Python's library, and facts that are asked for later."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model
from test_commands import call
from transformers import AutoTokenizer

import uiollms
from uiollms.build import examine_entries
from uiollms.config.corpora import CorpusEntry, TaskEntry
from uiollms.data import RecallDocument, open_corpus
from uiollms.data.corpora import local as corpora_own
from uiollms.data.corpora.facts import FARTHEST, FARTHEST_NAMED, with_facts
from uiollms.data.corpora.local import Library, is_held_out, library_files
from uiollms.data.documents import Document
from uiollms.data.recall_sample import MOST_PIECES, last_value, recall_sample
from uiollms.data.sample import IGNORED
from uiollms.files.errors import ConfigError, Faults
from uiollms.planning.step_simulation import max_tokens

L = 128  # of the tokenizer below, which has a token for every byte or two
KINDS = ("facts", "keys")


# ---- stdlib ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A library of 400 files in folders of unequal size, and what does not belong to it."""
    root = tmp_path / "lib"
    for i in range(400):
        inside = root / ("encodings" if i < 200 else f"p{i % 7}")
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"m{i}.py").write_text(f"number = {i}\n")
    for foreign in ("site-packages/x", "dist-packages", "test", "json/tests", "idlelib/idle_test"):
        (root / foreign).mkdir(parents=True)
        (root / foreign / "other.py").write_text("other\n")
    (root / "empty.py").touch()
    (root / "data.txt").write_text("data\n")
    (root / "gone.py").symlink_to(root / "nowhere")
    monkeypatch.setattr(corpora_own, "LIBRARY", Library(root))
    return root


def test_stdlib_holds_the_librarys_own_files_once(folder):
    splits = [open_corpus(f"stdlib.{split}") for split in ("train", "test")]
    numbers = [[int(document.text.split("=")[1]) for document in corpus] for corpus in splits]
    assert sorted(numbers[0] + numbers[1]) == list(range(400))
    assert 0.08 < len(numbers[1]) / 400 < 0.17  # one in eight
    assert "Python 3." in splits[0][0].source and splits[0][0].source.endswith(".py")
    assert open_corpus("stdlib.test.1k")[0].text == splits[1][0].text


def test_stdlib_is_the_same_wherever_the_library_lies(folder, tmp_path):
    to_device = tmp_path / "elsewhere"
    folder.rename(to_device)
    for file in library_files(to_device):
        assert is_held_out(file, to_device) == is_held_out(
            folder / file.relative_to(to_device), folder
        )


def test_the_first_files_of_stdlib_are_a_fair_sample(folder):
    """Half of all files are of one folder: so are the first 100, within four deviations."""
    first = [document.source for document in list(open_corpus("stdlib.train"))[:100]]
    assert 30 <= sum("encodings/" in source for source in first) <= 70


def test_stdlib_needs_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora_own, "LIBRARY", Library(tmp_path))
    with pytest.raises(ConfigError, match="has no Python sources; use an interpreter"):
        open_corpus("stdlib.train")


def test_this_interpreters_library_can_be_read():
    for split in ("train", "test"):
        corpus = open_corpus(f"stdlib.{split}")
        assert len(corpus) > 50 and not any(document.is_empty for document in corpus)


# ---- recall ------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def spans(labels: torch.Tensor) -> list[tuple[int, int]]:
    """Runs of scored tokens, by a loop over all of them."""
    found, start = [], None
    for i, label in enumerate([*labels.tolist(), IGNORED]):
        if label != IGNORED and start is None:
            start = i
        if label == IGNORED and start is not None:
            found.append((start, i))
            start = None
    return found


def whole(sample: uiollms.Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of a sample, as it was before it was cut."""
    ids = torch.cat([row.input_ids for row in sample.rows])
    labels = torch.full_like(ids, IGNORED)
    labels[1:] = torch.cat([row.targets for row in sample.rows])[:-1]
    return ids, labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [None, 1, 3])
def test_each_value_was_stated_that_many_chunks_before(tokenizer, kind, distance):
    suffix = f".{distance}" if distance else ""
    corpus, found = open_corpus(f"recall.{kind}{suffix}"), []
    for document in (corpus[number] for number in range(12)):
        sample = recall_sample(tokenizer, document, L, 6 * L + 5)
        ids, labels = whole(sample)
        assert len(ids) == 6 * L and len(sample.rows) == 6
        chunks = [tokenizer.decode(row.input_ids) for row in sample.rows]
        for start, stop in spans(labels):
            value, asked = tokenizer.decode(ids[start:stop]), start // L
            before = tokenizer.decode(ids[:start])
            fits = [f.value == value and before.endswith(f.question) for f in document.facts]
            fact = document.facts[fits.index(True)]
            (told,) = [t for t, text in enumerate(chunks) if fact.statement in text]
            assert (stop - 1) // L == asked
            found.append(asked - told)
    assert len(found) > 20
    assert set(found) == {distance} if distance else set(found) == {1, 2, 3, 4, 5}


def test_a_named_distance_reaches_32_chunks(tokenizer):
    document = open_corpus(f"recall.keys.test.{FARTHEST_NAMED}")[0]
    sample = recall_sample(tokenizer, document, L, None)
    ids, labels = whole(sample)
    assert len(ids) == (FARTHEST_NAMED + 1) * L
    assert [start // L for start, _ in spans(labels)] == [FARTHEST_NAMED] * len(spans(labels))
    start, stop = spans(labels)[0]
    asked = tokenizer.decode(ids[:start])
    (fact,) = [fact for fact in document.facts if asked.endswith(fact.question)]
    assert fact.statement in tokenizer.decode(ids[:L])
    assert tokenizer.decode(ids[start:stop]) == fact.value
    with pytest.raises(ConfigError, match="recall.keys.test.33"):
        open_corpus("recall.keys.test.33")


def test_most_of_a_chunk_may_be_facts_and_the_rest_is_the_text_in_order(tokenizer):
    document = open_corpus("recall.keys")[3]
    plain = with_facts(Document("z" * 5000, "z"), "keys", random.Random(0))
    ids, _ = whole(recall_sample(tokenizer, plain, L, None))
    assert len(ids) == (FARTHEST + 1) * L
    zs = tokenizer.decode(ids).count("z")
    assert zs >= (1 - MOST_PIECES) * len(ids) / 2
    for chunk in ids.split(L):
        assert tokenizer.decode(chunk).count("z") >= (1 - MOST_PIECES) * L
    text = Document("".join(f"<{i}>" for i in range(3000)), "numbers")
    counted = with_facts(text, "facts", random.Random(0))
    left = tokenizer.decode(whole(recall_sample(tokenizer, counted, L, None))[0])
    for fact in counted.facts:
        left = left.replace(fact.statement, "").replace(fact.question + fact.value + "\n", "")
    assert re.sub(r"\s", "", left) in text.text
    assert isinstance(document, RecallDocument) and len(document.text) == 64 * 1024


def test_a_text_that_is_used_up_begins_again(tokenizer):
    short = with_facts(Document("abc", "short"), "facts", random.Random(0))
    ids, _ = whole(recall_sample(tokenizer, short, L, 3 * L))
    assert len(ids) == 3 * L and "abcabcabc" in tokenizer.decode(ids)


def test_documents_are_the_same_every_time_and_differ_by_number(tokenizer):
    one, again = open_corpus("recall.facts"), open_corpus("recall.facts.train")
    assert one[7] == again[7] and one[7] != one[8] and len(one) == len(again) > 100_000
    samples = [whole(recall_sample(tokenizer, c[7], L, None)) for c in (one, again)]
    assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_test_documents_share_no_fact_and_no_text(kind):
    splits = [open_corpus(f"recall.{kind}.{split}") for split in ("train", "test")]
    train, test = ([corpus[i] for i in range(60)] for corpus in splits)
    asked = [{re.sub(r"\W+", " ", f.question) for d in of for f in d.facts} for of in (train, test)]
    assert not asked[0] & asked[1]
    for document in [*train, *test]:
        assert len(document.facts) == len({fact.question for fact in document.facts}) > 100
    held = "\n".join(2 * [document.text for document in open_corpus("stdlib.test")])
    assert all(document.text in held for document in test[:10])
    # Not less: tables of characters in `encodings` have long parts in common.
    assert not any(document.text[:20_000] in held for document in train[:10])


def test_a_document_of_too_few_chunks_is_refused_before_a_model_is_loaded(tokenizer):
    document = open_corpus("recall.facts.3")[0]
    with pytest.raises(ValueError, match=f"a question 3 chunks .* needs {4 * L} tokens, found"):
        recall_sample(tokenizer, document, L, 4 * L - 1)
    memory = make_model().memory_config.model_copy(update=dict(chunk_size=L))
    for name, least in (("recall.facts.3", 4 * L), ("recall.keys", 2 * L)):
        for length, told in ((least - 1, 1), (least, 0)):
            names = dict(task_type="question answering", task_name=name)
            task = TaskEntry(**names, num_instance=1, truncation=length)
            entry = CorpusEntry(name=name, partition=1, truncation=length)
            sources = {"tasks[0]": task, "train.corpus[0]": entry}
            faults = Faults()
            examine_entries(sources, memory, None, "x.json", faults)
            assert len(faults.lines) == 2 * told


def test_a_plan_knows_how_long_documents_without_a_truncation_are():
    sizes = dict(capacity=10_000, chunk_size=64)
    entry = CorpusEntry(name="recall.facts", partition=1)
    assert max_tokens(entry, **sizes) == (FARTHEST + 1) * 64
    assert max_tokens(entry.model_copy(update=dict(truncation=1000)), **sizes) == 1000


def test_the_last_value_is_what_a_generated_answer_is_compared_with(tokenizer):
    document = open_corpus("recall.keys.test.2")[0]
    ids, labels = whole(sample := recall_sample(tokenizer, document, L, None))
    start, stop = spans(labels)[-1]
    prompt, value = last_value(sample)
    assert torch.equal(prompt, ids[:start]) and torch.equal(value, ids[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_recall_trains_and_is_evaluated(workspace, kind):
    """From the config on; a chunk has room for one statement or question of bytes."""
    memory = dict(num_memory=2, chunk_size=96, lora_rank=2, lora_alpha=4)
    (workspace / "memory.json").write_text(json.dumps(memory))
    env = json.loads((workspace / "env.json").read_text())
    env["train"]["corpus"] = [dict(name=f"recall.{kind}", partition=1, truncation=400)]
    env["train"]["tasks"] = [
        dict(
            task_type="question answering",
            task_name=f"recall.{kind}.test.1",
            num_instance=2,
            truncation=300,
            generate=True,
            compare=["window", "shuffled"],
        )
    ]
    (workspace / "env.json").write_text(json.dumps(env))
    call("train.py", "--env_conf", "env.json")
    last = (workspace / "out/metrics.jsonl").read_text().splitlines()[-1]
    (result,) = json.loads(last)["eval"]
    assert result["task"] == f"recall.{kind}.test.1" and result["memory"]["loss"] > 0
    assert result["memory"]["documents"] == 2 and "rouge_l" in result["memory"]
