"""Hostile files, made by hypothesis: every config, document and checkpoint is taken with its
meaning or refused in one line.

Anything else that is raised is a traceback for a user, and fails here."""

import copy
import gzip
import io
import json
import os
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import TRAIN
from test_commands import call

from uiollms.build import check_env, load_memory_lm
from uiollms.config.load import load_env_config, load_memory_config, load_tasks
from uiollms.config.sections import EnvConfig
from uiollms.data import open_corpus
from uiollms.data.stream import SampleStream
from uiollms.files.atomic import sha256, verify_checksums
from uiollms.files.errors import ConfigError, json_path
from uiollms.runs.state import REQUIRED, TrainingState, load_state, read_info
from uiollms.training.optimizer import make_optimizer
from uiollms.training.weighting import weigh_tokens
from uiollms.weights.adapters import load_weights, save_weights

ROOT = Path(__file__).parents[2]
GOOD = json.loads((ROOT / "smollm2-8x.json").read_text())


def examples(count: int) -> Any:
    """The same ones every time, so that CI does not fail by chance; FUZZ=20 searches among
    twenty times as many others."""
    more = int(os.environ.get("FUZZ", "1"))
    allowed = [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ]
    return settings(
        max_examples=more * count,
        deadline=None,
        derandomize=more == 1,
        database=None,
        suppress_health_check=allowed,
    )


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from(
        [
            -(2**63),
            2**63,
            2**64,
            10**30,
            0.0,
            -0.0,
            0.5,
            1.0,
            1e-320,
            1e308,
            float("inf"),
            float("nan"),
        ]
    ),
    st.floats(),
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "/",
            "~",
            "cpu",
            "auto",
            "uio",
            "\0",
            "a\nb",
            "\ud800",
            "x" * 300,
            "%s{}$HOME",
            "files:[",
            "**",
        ]
    ),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value within nested dicts and lists."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [found for key, v in inner for found in [(*path, key), *places(v, (*path, key))]]


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def mutations(draw: Any, good: Any) -> tuple[Any, tuple, str]:
    """A copy of `good` with one value replaced, deleted, renamed or doubled; where, and how."""
    value = copy.deepcopy(good)
    path = draw(st.sampled_from(places(value)))
    parent, key = at(value, path[:-1]), path[-1]
    how = draw(st.sampled_from(["replaced", "replaced", "replaced", "deleted", "added"]))
    if how == "replaced":
        parent[key] = draw(VALUES)
    elif how == "deleted":
        del parent[key]
    elif isinstance(parent, dict):
        path = (*path[:-1], draw(st.text(max_size=6).filter(lambda name: name not in parent)))
        parent[path[-1]] = draw(VALUES)
    else:
        parent.append(draw(VALUES))
        path = (*path[:-1], len(parent) - 1)
    return value, path, how


def same(taken: Any, given: Any) -> bool:
    """Whether a config has a value as it was given; a whole number for a float may be too large
    to be kept exactly."""
    return taken == given or isinstance(taken, float) and taken == float(given)


def lines_of(error: ConfigError) -> list[str]:
    return str(error).split("\n")


# ---- configs -------------------------------------------------------------------------------------


@examples(400)
@given(mutation=mutations(GOOD))
def test_every_mutation_of_a_config_has_a_meaning_or_is_refused_by_name(
    tmp_path, monkeypatch, mutation
):
    monkeypatch.chdir(ROOT)
    value, path, how = mutation
    file = tmp_path / "env.json"
    file.write_text(json.dumps(value))
    try:
        config = load_env_config(file)
        check_env(config, file)
    except ConfigError as error:
        for line in lines_of(error):
            named, _, rest = line.partition(": ")
            where, _, what = rest.partition(": ")
            if path == ("model", "config") or path == ("model", "model_name"):
                continue  # another file, or model, that is not there: its own message names it
            assert named == str(file) and what, line
            listed = how == "deleted" and isinstance(
                path[-1], int
            )  # what stood behind it has moved up
            changed = json_path(path[:-1] if listed else path)
            assert where.startswith(changed) or changed.startswith(where), (
                line,
                path,
            )  # itself, its part, or its section
    else:
        dumped = json.loads(config.model_dump_json())
        if path[0] == "$schema" or how == "deleted":
            return  # read by editors only; a default
        assert same(at(dumped, path), at(value, path)), (path, at(value, path))


@examples(150)
@given(mutation=mutations(json.loads((ROOT / "config" / "smollm2-8x.json").read_text())))
def test_every_mutation_of_a_compressor(tmp_path, mutation):
    value, path, how = mutation
    file = tmp_path / "memory.json"
    file.write_text(json.dumps(value))
    try:
        config = load_memory_config(file)
    except ConfigError as error:
        assert all(line.startswith(f"{file}: ") for line in lines_of(error))
    else:
        if path[0] != "$schema" and how != "deleted":
            assert same(config.model_dump()[path[0]], value[path[0]])


@st.composite
def broken_bytes(draw: Any, good: bytes) -> bytes:
    """Some bytes of a file replaced, removed, doubled, or its end cut off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "write", "cut", "end", "double"]))
        if how == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "write":
            data[start : start + 4] = draw(st.binary(max_size=8))
        elif how == "cut":
            del data[start : start + draw(st.integers(1, 64))]
        elif how == "end":
            del data[start:]
        else:
            data[start:start] = data[start : start + 64]
    return bytes(data)


@examples(200)
@given(
    data=st.one_of(
        broken_bytes(json.dumps(GOOD).encode()), st.binary(max_size=40), st.just(b"[" * 100_000)
    )
)
def test_config_files_of_any_bytes(tmp_path, data):
    file = tmp_path / "env.json"
    file.write_bytes(data)
    for load in (load_env_config, load_memory_config, load_tasks):
        try:
            load(file)
        except ConfigError as error:
            assert all(
                line.startswith(f"{file}: ") and len(line) < 2000 for line in lines_of(error)
            ), error


@examples(100)
@given(change=st.one_of(st.text(max_size=20), st.tuples(st.sampled_from(places(GOOD)), VALUES).map(
    lambda pair: f"{'.'.join(map(str, pair[0]))}={json.dumps(pair[1])}")))  # fmt: skip
def test_overrides_of_any_text(change):
    try:
        assert isinstance(load_env_config(ROOT / "smollm2-8x.json", [change]), EnvConfig)
    except ConfigError as error:
        assert str(error)


RUNNING = [f"model.{name}" for name in ("load_ckp", "released_ckp", "save_ckp", "device_map")]
RUNNING += [
    f"train.{name}"
    for name in (
        "run_dir",
        "seed",
        "max_lr",
        "chunk_batch",
        "tbptt",
        "clip_grad",
        "warmup",
        "save",
        "eval",
    )
]
RUNNING += [
    "train.corpus.0.truncation",
    "train.corpus.0.name",
    "train.tasks.0.task_name",
    "train.tasks.0.num_instance",
]


@examples(60)
@given(field=st.sampled_from(RUNNING), value=SCALARS)
def test_a_run_under_a_hostile_config_ends_in_one_line(workspace, capsys, field, value):
    """What the types allow meets the model, the data and the disk."""
    before = {path.name: path.read_bytes() for path in workspace.iterdir() if path.is_file()}
    if isinstance(value, str) and value[:1] in "/~" and field.endswith(("run_dir", "ckp")):
        value = "x" + value  # not outside of the test's own folder
    code = call(
        *TRAIN, "--restart", f"--set={field}={json.dumps(value)}", "--set=train.train_iters=1"
    )
    assert code in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert {name: (workspace / name).read_bytes() for name in before} == before


# ---- documents -----------------------------------------------------------------------------------


def read_all(name: str, file: str) -> None:
    """Every document of a corpus, or the line that says what is wrong with it."""
    try:
        corpus = open_corpus(name)
        for i in range(len(corpus)):
            try:
                assert isinstance(corpus[i].text, str)
            except ConfigError as error:
                assert file in str(error) and "\n" not in str(error)
    except ConfigError as error:
        assert "\n" not in str(error)


LINES = st.lists(st.one_of(st.binary(max_size=30), VALUES.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(["text", "input", "output"]), VALUES).map(lambda value: json.dumps(value).encode()),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}).encode())), max_size=5)  # fmt: skip


@examples(300)
@given(lines=LINES)
def test_json_lines_of_anything(tmp_path, monkeypatch, lines):
    monkeypatch.chdir(tmp_path)
    Path("lines.jsonl").write_bytes(b"\n".join(lines))
    read_all("files:lines.jsonl", "lines.jsonl")


@examples(100)
@given(data=broken_bytes(gzip.compress(b'{"text": "It was a bright cold day."}\n' * 50)))
def test_broken_gz(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UIOLLMS_CACHE", "cache")
    Path("lines.jsonl.gz").write_bytes(data)
    read_all("files:lines.jsonl.gz", "lines.jsonl.gz")


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"It was day {i}." for i in range(200)]}), file
    )
    return file.getvalue()


@examples(25)
@given(data=broken_bytes(parquet_bytes()), number=st.uuids())
def test_broken_parquet(tmp_path, monkeypatch, data, number):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    Path(f"{number}.parquet").write_bytes(data)
    read_all(f"files:{number}.parquet", f"{number}.parquet")


@examples(150)
@given(
    data=st.one_of(
        broken_bytes(
            json.dumps({"train": [{"prompt": "a", "response": "b"}] * 3, "test": []}).encode()
        ),
        st.binary(max_size=30),
    )
)
def test_broken_lists_in_one_file(tmp_path, monkeypatch, data):
    monkeypatch.setenv("UIOLLMS_RAW_DATA", str(tmp_path))
    (tmp_path / "minipile_copy_256.json").write_bytes(data)
    read_all("minipile copy 256.train", "minipile_copy_256.json")


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(workspace) -> Path:
    assert call(*TRAIN, "--set=train.tasks=[]", "--set=train.train_iters=2") == 0
    return Path("out/checkpoints/step-00000002")


def test_any_broken_byte_of_a_checkpoint_is_found(checkpoint):
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert len(files) == 10

    @examples(300)
    @given(path=st.sampled_from(files), data=st.data())
    def search(path: Path, data: Any) -> None:
        whole = path.read_bytes()
        broken = data.draw(broken_bytes(whole))
        path.write_bytes(broken)
        try:
            verify_checksums(checkpoint, REQUIRED)
            same = broken == whole
            assert (
                same or path.name == "checksums.json" and json.loads(broken) == json.loads(whole)
            )  # another blank
        except ConfigError as error:
            assert (
                path.name in str(error)
                or path.name == "checksums.json"
                and "the checkpoint is damaged" in str(error)
            )
        finally:
            path.write_bytes(whole)

    search()


def test_checkpoints_made_to_mislead(checkpoint):
    """Contents changed and checksums made anew: the state that is loaded is whole, or the reason
    why not is one line."""
    config = load_env_config("env.json", ["train.tasks=[]"])
    model, tokenizer = load_memory_lm(config, "env.json")
    state = TrainingState(
        model,
        tokenizer,
        make_optimizer(model, config.train),
        SampleStream(config, tokenizer, model, partial(weigh_tokens, model)),
    )
    texts = {
        path.name: json.loads(path.read_text())
        for path in checkpoint.glob("*.json")
        if path.name != "checksums.json"
    }
    sums = json.loads((checkpoint / "checksums.json").read_text())
    tensors = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*.safetensors"))

    def load(changed: str | Path) -> None:
        sums[str(changed)] = sha256(checkpoint / changed)
        (checkpoint / "checksums.json").write_text(json.dumps(sums))
        try:
            load_state(state, checkpoint, read_info(checkpoint))
            state.samples.take(1)
        except ConfigError as error:
            assert "step-00000002" in str(error) or "train.corpus" in str(error), error

    @examples(120)
    @given(name=st.sampled_from(sorted(texts)), data=st.data())
    def search_json(name: str, data: Any) -> None:
        (checkpoint / name).write_text(json.dumps(data.draw(mutations(texts[name]))[0]))
        try:
            load(name)
        finally:
            (checkpoint / name).write_text(json.dumps(texts[name]))
            sums[name] = sha256(checkpoint / name)

    @examples(120)
    @given(name=st.sampled_from(tensors), data=st.data())
    def search_tensors(name: Path, data: Any) -> None:
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data.draw(broken_bytes(whole)))
        try:
            load(name)
        finally:
            (checkpoint / name).write_bytes(whole)
            sums[str(name)] = sha256(checkpoint / name)

    search_json()
    search_tensors()


def test_broken_pth_files(tmp_path):
    model = make_model("llama", torch.float32)
    expected = {name: tensor.clone() for name, tensor in model.memory_state_dict().items()}
    path = tmp_path / "list.pth"
    save_weights(model, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in parts if name.endswith("data.pkl")]

    def load(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            load_weights(model, path)
        except ConfigError as error:
            assert str(error).startswith(str(path))
            return False
        return True

    @examples(200)
    @given(data=broken_bytes(whole))
    def search(data: bytes) -> None:
        if load(data):  # what was broken is not the tensors
            assert all(
                torch.equal(tensor, expected[name])
                for name, tensor in model.memory_state_dict().items()
            )

    @examples(200)
    @given(data=broken_bytes(parts[pickled]))
    def search_pickles(data: bytes) -> None:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, data if name == pickled else part)
        load(file.getvalue())

    search()
    search_pickles()
