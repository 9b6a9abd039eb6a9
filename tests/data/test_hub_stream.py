"""Any dataset of the hub as a stream: names, columns, counts, order, resuming, and errors. The
datasets are folders in the hub's layout, which `datasets` reads with the same code as the hub."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from test_conversations import TURNS

from uiollms.config.load import load_env_config
from uiollms.data import Mixture, open_corpus
from uiollms.data.readers import hub_stream
from uiollms.data.readers.hub_stream import HubStream
from uiollms.files.errors import ConfigError
from uiollms.runs.checks import check_training

ROWS = 230  # in the split train, in three files


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of org/Set, with splits of parquet files, blocks of 50 rows."""
    monkeypatch.setenv("UIOLLMS_HUB_DIR", str(tmp_path / "hub"))
    monkeypatch.setenv("UIOLLMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(hub_stream, "BLOCK", 50)
    folder = tmp_path / "hub" / "org" / "Set"
    (folder / "data").mkdir(parents=True)
    for split, bounds in {"train": (0, 90, 120, ROWS), "test": (0, 7)}.items():
        for n, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            rows = [{"text": f"{split} {i}", "Body": f"body {i}"} for i in range(start, stop)]
            table = pyarrow.Table.from_pylist(rows)
            name = f"{split}-{n:05}-of-{len(bounds) - 1:05}.parquet"
            pyarrow.parquet.write_table(table, folder / "data" / name, row_group_size=20)
    return folder


def test_splits_and_columns_are_read_in_their_order(hub):
    documents = open_corpus("hub:org/Set")
    assert [d.text for d in documents] == [f"train {i}" for i in range(ROWS)]
    assert documents[119].source == "hub:org/Set/train: row 120"
    assert [d.text for d in open_corpus("hub:org/Set:test")] == [f"test {i}" for i in range(7)]
    body = open_corpus("hub:org/Set:default:test#Body")
    assert (len(body), body[-1].text) == (7, "body 6")


def test_rows_can_be_read_in_any_order(hub):
    documents = open_corpus("hub:org/Set")
    for i in (229, 0, 49, 51, 3, 120, 99, 200, 100):
        assert documents[i].text == f"train {i}"
        assert len(documents.rows) <= 100


def test_reading_on_opens_no_second_stream(hub, monkeypatch):
    documents = open_corpus("hub:org/Set")
    skipped = []
    skip = documents.stream.skip
    monkeypatch.setattr(documents.stream, "skip", lambda n: skipped.append(n) or skip(n))
    for block in range(0, ROWS, 50):
        for i in reversed(range(block, min(block + 50, ROWS))):
            assert documents[i].text == f"train {i}"
    assert skipped == [0]


def drawn(mixture: Mixture, count: int) -> list[str]:
    return [mixture.open(next(mixture)).text for _ in range(count)]


def test_every_block_is_shuffled_and_every_epoch_has_each_row_once(hub):
    texts = drawn(Mixture([open_corpus("hub:org/Set")], [1.0], seed=0), 2 * ROWS)
    for epoch in (texts[:ROWS], texts[ROWS:]):
        for start in range(0, ROWS, 50):
            block = epoch[start : start + 50]
            ordered = [f"train {i}" for i in range(start, min(start + 50, ROWS))]
            assert sorted(block) == sorted(ordered) and block != ordered
    assert texts[:50] != texts[ROWS : ROWS + 50]


@pytest.mark.parametrize("count", [0, 1, 49, 50, 137, ROWS, ROWS + 60])
def test_a_resumed_run_reads_the_same_documents(hub, count):
    def mixture() -> Mixture:
        corpora = [open_corpus("hub:org/Set"), open_corpus("hub:org/Set:test")]
        return Mixture(corpora, [0.8, 0.2], seed=3)

    stopped = mixture()
    drawn(stopped, count)
    state = json.loads(json.dumps(stopped.state_dict()))
    expected = drawn(stopped, 120)
    resumed = mixture()
    resumed.load_state_dict(state)
    assert drawn(resumed, 120) == expected


def test_rows_are_counted_once_for_a_state_of_the_files(hub, monkeypatch):
    assert len(open_corpus("hub:org/Set:test")) == 7
    with monkeypatch.context() as patch:
        patch.setattr("datasets.IterableDataset.iter", None)
        assert len(open_corpus("hub:org/Set:test")) == 7
    path = hub / "data" / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    assert len(open_corpus("hub:org/Set:test")) == 2


CARD = """---
configs:
- config_name: en
  data_files: [{{split: train, path: data/train-*}}, {{split: test, path: data/test-*}}]
- config_name: de
  data_files: [{{split: test, path: data/test-*}}]
dataset_info:
- config_name: en
  splits: [{{name: train, num_examples: {rows}}}]
---
"""


def test_configs_and_the_number_of_rows_of_a_card(hub, monkeypatch):
    (hub / "README.md").write_text(CARD.format(rows=ROWS))
    monkeypatch.setattr(hub_stream, "count_rows", lambda stream, key: 7)
    assert len(open_corpus("hub:org/Set:en")) == ROWS
    assert len(open_corpus("hub:org/Set:de:test")) == 7
    with pytest.raises(ConfigError, match="neither a config nor a split .*configs are en, de"):
        open_corpus("hub:org/Set:fr")
    (hub / "README.md").write_text(CARD.format(rows=ROWS + 5))
    with pytest.raises(ConfigError, match=f"states {ROWS + 5} rows, its files have {ROWS}"):
        open_corpus("hub:org/Set:en")[ROWS + 1]


WRONG = {
    "hub:org/Set:valid": "'valid' is neither a config nor a split of the dataset; configs are "
    "default, splits are train, test",
    "hub:org/Set:en:train": "cannot be read .*'en' not found",
    "hub:org/Set:default:valid": "cannot be read .*Bad split: valid",
    "hub:org/Set#words": r"column 'words' is missing, found \['Body', 'text'\]",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_name_is_reported_before_a_run(hub, workspace, name):
    with pytest.raises(ConfigError, match=f"corpus {name}: {WRONG[name]}"):
        open_corpus(name)
    config = load_env_config("env.json", [f"train.corpus.0.name={name}"])
    with pytest.raises(ConfigError, match=rf"env\.json: train\.corpus\[0\]\.name: corpus {name}: "):
        check_training(config, "env.json")


def test_a_dataset_that_is_not_reachable_is_reported(hub, workspace, monkeypatch):
    monkeypatch.setattr("uiollms.runs.checks.hub_reachable", lambda: False)
    config = load_env_config("env.json", ["train.corpus.0.name=hub:org/Other"])
    with pytest.raises(
        ConfigError, match=r"corpus\[0\]\.name: hub dataset org/Other is not .* cannot be reached"
    ):
        check_training(config, "env.json")


def test_columns_that_do_not_fit(hub, tmp_path):
    for name, row, message in (
        ("none", {"words": "a"}, "has none of the columns text and messages; add #COLUMN .* words"),
        ("two", {"text": "a", "messages": [TURNS[1]]}, "has both columns text and messages; add"),
        ("number", {"text": 3}, "hub:org/number/train: row 1: field 'text' is int, expected text"),
    ):
        folder = tmp_path / "hub" / "org" / name
        folder.mkdir()
        (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(ConfigError, match=message):
            open_corpus(f"hub:org/{name}")[0]


def test_conversations_of_a_dataset(hub, tmp_path, workspace):
    folder = tmp_path / "hub" / "org" / "chats"
    folder.mkdir()
    rows = [{"messages": list(TURNS)}, {"messages": [{"role": "gpt", "content": "a"}]}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = open_corpus("hub:org/chats")
    assert documents[0].messages == TURNS
    with pytest.raises(ConfigError, match="org/chats/train: row 2: field 'messages': message 1: r"):
        documents[1]
    assert HubStream("org/chats").open_stream().has_messages()
    config = load_env_config("env.json", ["train.corpus.0.name=hub:org/chats"])
    with pytest.raises(ConfigError, match="corpus 'hub:org/chats': the tokenizer of .* template"):
        check_training(config, "env.json")
