"""Each command checks everything in the config that it reads, reports all faults at once, and does
so before it downloads or loads a model or a corpus."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import make_base
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from test_commands import call

from uiollms import ConfigError, MemoryLM
from uiollms.build import check_env, find_weights, load_memory_lm
from uiollms.config.load import load_env_config, load_memory_config, parse
from uiollms.config.sections import EnvConfig, TrainSection
from uiollms.data import open_corpus
from uiollms.data.stream import SampleStream, Stream
from uiollms.runs.checks import check_evaluation, check_folder, check_training
from uiollms.weights.adapters import save_weights

ROOT = Path(__file__).parents[2]


def faults_of(*changes: str, check=check_training) -> list[str]:
    """Returns the lines that a check of the workspace's config reports, without the file's name."""
    try:
        check(load_env_config("env.json", list(changes)), "env.json")
    except ConfigError as error:
        return [line.removeprefix("env.json: ") for line in str(error).splitlines()]
    return []


@pytest.fixture
def nothing_is_loaded(monkeypatch) -> None:
    """Makes the test fail if a model or a tokenizer is loaded."""

    def fetched(*arguments, **settings):
        raise AssertionError("a model or tokenizer was fetched")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fetched)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fetched)


WRONG = {
    "model.load_ckp=nowhere": "model.load_ckp: nowhere: no checkpoint can be read here: there is no such file",
    "model.model_structure=qwen2": "model.model_structure: 'qwen2', but ",
    'model.device_map={"model":"cpu"}': "model.device_map: no key covers 'lm_head'",
    "model.attn_implementation=flash_attention_2": 'model.attn_implementation: "flash_attention_2": ',
    "train.accum_grad=4": "train.train_iters: 3 documents are less than one step of 4",
    "train.run_dir=book0.txt/run": "train.run_dir: book0.txt/run: cannot be written (",
    "model.save_ckp=book0.txt": "model.save_ckp: book0.txt: weights would replace it, but it is not a folder",
    "train.corpus.0.name=beacons": "train.corpus[0].name: raw_data/redpajama-sample.json is missing; raw_data/README.md describes how",
    "train.tasks.0.task_name=files:*.md": "train.tasks[0].task_name: corpus files:*.md: no file matches",
    "train.tasks.0.truncation=1000": "train.tasks[0].truncation: 1000 tokens is past the capacity ",
    "train.corpus.0.truncation=16": "train.corpus[0].truncation: of 16 tokens nothing would read memory, chunk_size is 16; use",
}


@pytest.mark.parametrize("weights", ["book0.txt", "."])
def test_weights_that_are_no_checkpoint_are_found_before_anything_is_loaded(
    workspace, nothing_is_loaded, weights
):
    expected = (
        f"model.load_ckp: {weights}: is no checkpoint: it is neither a .pth file nor a folder with "
        "memory_config.json"
    )
    (found,) = faults_of(f"model.load_ckp={weights}")
    assert found.startswith(expected)


@pytest.mark.parametrize("change", WRONG)
def test_each_fault_of_a_training_is_found_before_anything_is_loaded(
    workspace, nothing_is_loaded, change
):
    found = faults_of(change)
    assert found[0].startswith(WRONG[change]), found
    assert len(found) == (2 if change.endswith("beacons") else 1)


def test_all_faults_are_reported_together(workspace, nothing_is_loaded, capsys):
    assert call("train.py", "--env_conf", "env.json", *(f"--set={change}" for change in WRONG)) == 2
    lines = [line.removeprefix("env.json: ") for line in capsys.readouterr().err.splitlines()]
    for expected in WRONG.values():
        assert sum(line.startswith(expected) for line in lines) == 1, (expected, lines)
    assert len(lines) == len(WRONG) + 1  # the beacons corpus lacks two files
    assert not Path("out").exists(), "checks make nothing"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("train.corpus.0.partition=0.9", "train: the corpus partitions sum to 0.9"),
        ("train.max_rl=1", "train.max_rl: unknown key; did you mean 'max_lr'?"),
        ("train.tbptt=0", "train.tbptt: "),
        ("model.device_map=7.5", "model.device_map"),
        ("train.keep_best=1.5", "train.keep_best: "),
    ],
)
def test_a_fault_of_one_field_hides_no_other(
    workspace, nothing_is_loaded, capsys, change, expected
):
    changes = [change, *(c for c in WRONG if c.split("=")[0] != change.split("=")[0])]
    expected_lines = [expected, *(WRONG[c] for c in changes[1:])]
    assert call("train.py", "--env_conf", "env.json", *(f"--set={c}" for c in changes)) == 2
    lines = [line.removeprefix("env.json: ") for line in capsys.readouterr().err.splitlines()]
    for start in expected_lines:
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_a_dry_run_reports_all_faults_of_what_it_reads(workspace, capsys):
    changes = (
        "--set=train.max_rl=1",
        "--set=model.model_structure=qwen2",
        "--set=model.load_ckp=nowhere",
    )
    assert call("train.py", "--env_conf", "env.json", "--dry_run", *changes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["train.max_rl", "model.model_structure"]
    assert call("train.py", "--env_conf", "env.json", "--dry_run", "--set=train.accum_grad=4") == 2
    assert capsys.readouterr().err.startswith(
        "env.json: train.train_iters: 3 documents are less than one step of 4"
    )


def test_without_its_faulty_fields_a_config_may_be_nothing(workspace, capsys):
    assert call("train.py", "--env_conf", "env.json", "--set=train.corpus=[]", "--set=model=3") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_fields_that_exclude_each_other_are_reported_together():
    fields = dict(
        tbptt=2, train_iters=3, max_lr=1e-2, save=1, eval=1, keep_best=True, chunk_ranks=2
    )
    with pytest.raises(ConfigError) as error:
        load_env_config_of(fields | dict(corpus=[dict(name="sotu.train", partition=0.5)]))
    lines = str(error.value).splitlines()
    assert [line.split(": train: ")[1][:20] for line in lines] == [
        "the corpus partition", "keep_best compares c", "chunk_ranks 2 only h"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "device_map, fault",
    [
        ("cpu", 'needs a model.device_map with several GPUs, found only "cpu"'),
        ({"model": 1, "lm_head": 1}, "needs a model.device_map with several GPUs, found only 1"),
        ({"model": 0, "lm_head": "disk"}, "does not work with weights on disk"),
        ({"model": 0, "lm_head": 1}, None),
        ("auto", None),
    ],
)
def test_a_pipeline_needs_several_devices(device_map, fault):
    corpus = [dict(name="sotu.train", partition=1)]
    train = dict(tbptt=2, train_iters=3, max_lr=1e-2, save=1, eval=1, pipeline=True, corpus=corpus)
    if fault is None:
        assert load_env_config_of(train, device_map=device_map).pipeline
        return
    with pytest.raises(ConfigError, match=f"e.json: train.pipeline true {fault}"):
        load_env_config_of(train, device_map=device_map)


def load_env_config_of(train: dict, **changes) -> TrainSection:
    model = dict(model_name="m", model_dtype="fp32", model_structure="llama", config="c.json")
    model |= changes
    return parse(EnvConfig, dict(model=model, train=train), "e.json").train


def test_a_task_that_its_corpus_has_no_documents_for(workspace, nothing_is_loaded):
    (found,) = faults_of(
        "train.tasks.0.task_name=longalpaca.test.true", "train.tasks.0.compare=[]"
    )[-1:]
    assert found == (
        "train.tasks[0]: corpus 'longalpaca.test.true' has documents for question answering, "
        "task_type 'perplexity' takes "
        "documents for language modeling"
    )


def test_a_teacher_that_cannot_read_its_samples(workspace, nothing_is_loaded):
    name = "train.corpus.0.name=beacons sampled.8192.distill"
    expected = (
        "train.corpus[0]: the teacher reads samples of up to 8192 tokens raw, the base has 128 "
        "positions; set truncation"
    )
    assert faults_of(name, "train.corpus.0.truncation=null", check=check_env)[0].startswith(
        expected
    )
    assert faults_of(name, "train.corpus.0.truncation=120", check=check_env) == []
    assert faults_of("train.corpus.0.name=beacons sampled.900")[0].endswith(
        "no sample has fewer than 1200 tokens; set a larger number"
    )


@pytest.mark.parametrize("loss", ["paper", "document"])
def test_the_shortest_truncation_is_the_shortest_that_trains(workspace, loss):
    """A truncation of one token less is refused, and rightly: every document would be skipped."""
    least = 16 + 2
    changes = [f"train.loss={loss}", "train.tasks=[]"]
    assert faults_of(*changes, f"train.corpus.0.truncation={least}") == []
    assert len(faults_of(*changes, f"train.corpus.0.truncation={least - 1}")) == 1
    Stream.MOST_SKIPPED, most = 20, Stream.MOST_SKIPPED
    try:
        for truncation, trains in ((least, True), (least - 1, False)):
            config = load_env_config(
                "env.json", [*changes, f"train.corpus.0.truncation={truncation}"]
            )
            model, tokenizer = load_memory_lm(config, "env.json")
            if trains:
                assert len(SampleStream(config, tokenizer, model).take(2)) == 2
            else:
                with pytest.raises(ConfigError, match="20 documents in a row"):
                    SampleStream(config, tokenizer, model).take(1)
    finally:
        Stream.MOST_SKIPPED = most


def test_a_copy_needs_one_whole_chunk(workspace):
    copy = 'train.tasks=[{"task_type":"longdata copy","task_name":"files:book*.txt","num_instance":1,"truncation":%d}]'
    assert faults_of(copy % 16, check=check_env) == []
    assert "of 15 tokens nothing would read memory" in faults_of(copy % 15, check=check_env)[0]


def test_a_command_checks_only_what_it_reads(workspace, capsys):
    """A dry run needs no data, weights or folder. test.py needs neither the corpora nor the tasks
    of training, and ask needs neither of those."""
    missing = (
        "--set=train.corpus.0.name=redpajama book sample.train.1m",
        "--set=model.load_ckp=nowhere",
    )
    assert (
        call(
            "train.py",
            "--env_conf",
            "env.json",
            "--dry_run",
            *missing,
            "--set=train.run_dir=book0.txt",
        )
        == 0
    )
    assert call("train.py", "--env_conf", "env.json") == 0
    unknown = (
        "--set=train.corpus.0.name=nothing.train",
        "--set=train.tasks.0.task_name=nothing.test",
    )
    capsys.readouterr()
    assert call("test.py", "--env_conf", "env.json", *unknown, "--set=train.chunk_batch=auto") == 0
    assert call("test.py", "--env_conf", "env.json", *unknown, "--use_env_conf_tasks") == 2
    assert "train.tasks[0].task_name: corpus 'nothing.test' is unknown" in capsys.readouterr().err
    # ask and chat load the model in this way
    load_memory_lm(load_env_config("env.json", [change[6:] for change in unknown]), "env.json")


def test_the_faults_of_an_evaluation(workspace, nothing_is_loaded):
    tasks = [
        dict(task_type="perplexity", task_name="files:*.md", num_instance=1),
        dict(task_type="perplexity", task_name="pg20.test", num_instance=1, truncation=12),
    ]
    Path("test.json").write_text(json.dumps(tasks))
    config = load_env_config(
        "env.json", ["train.run_dir=book0.txt", "model.save_ckp=null", "model.load_ckp=nowhere"]
    )
    with pytest.raises(ConfigError) as error:
        check_evaluation(config, "env.json", env_conf_tasks=False)
    lines = str(error.value).splitlines()
    assert [line[:30] for line in lines] == [
        "test.json: tasks[1].task_name:", "test.json: tasks[0].task_name:",
        "env.json: model.load_ckp: nowh", "env.json: train.run_dir: book0",
    ]  # fmt: skip
    Path("test.json").unlink()
    with pytest.raises(ConfigError, match="test.json: cannot be read") as error:
        check_evaluation(config, "env.json", env_conf_tasks=False)
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(
        ConfigError, match="env.json: train.tasks: is empty, there is nothing to evaluate"
    ):
        check_evaluation(
            load_env_config("env.json", ["train.tasks=[]"]), "env.json", env_conf_tasks=True
        )


def test_weights_of_another_compressor_are_found_without_the_model(workspace, nothing_is_loaded):
    save_weights(
        MemoryLM(make_base(dtype=torch.float32), load_memory_config("memory.json")), "trained"
    )
    memory = json.loads(Path("memory.json").read_text())
    sizes = dict(num_memory=4, chunk_size=32, recent_tokens=8)
    Path("memory.json").write_text(json.dumps(memory | sizes | dict(lora_rank=3)))
    differing = "trained with another compressor: lora_rank 2, the config has 3"
    assert faults_of("model.load_ckp=trained") == [f"model.load_ckp: trained: {differing}"]
    # Training may start from weights of other sizes, and an evaluation of that start has them too.
    # Other weights were trained for the config.
    Path("memory.json").write_text(json.dumps(memory | sizes))
    assert faults_of("model.load_ckp=trained") == []
    config = load_env_config("env.json", ["model.load_ckp=trained"])
    assert check_evaluation(config, "env.json", env_conf_tasks=True)
    for field in ("released_ckp", "save_ckp"):
        config = load_env_config("env.json", [f"model.{field}=trained"])
        message = f"model.{field}: .*another compressor: num_memory 2, .*recent_tokens 0"
        with pytest.raises(ConfigError, match=message):
            check_evaluation(config, "env.json", env_conf_tasks=True)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path / "closed")
    with pytest.raises(ConfigError) as error:
        check_folder(tmp_path / "closed" / "run", tmp_path / "closed" / "run")
    assert str(error.value) == (
        f"{tmp_path}/closed/run: cannot be written (no permission to write in {tmp_path}/closed); "
        "choose another path"
    )


# ---- which weights -------------------------------------------------------------------------------


def test_save_ckp_is_used_before_load_ckp(workspace, capsys):
    """In a training of two runs the second one starts from load_ckp. test.py, ask and chat use the
    weights that it has saved."""
    for name in ("first", "released"):
        model, _ = load_memory_lm(load_env_config("env.json"), "env.json")
        for parameter in model.trainable_parameters().values():
            torch.nn.init.normal_(parameter, std=0.2)
        save_weights(model, name)
    stage = ["--set=model.load_ckp=first", "--set=model.released_ckp=released"]
    changes = [change[6:] for change in stage]
    assert find_weights(load_env_config("env.json", changes)) == "first"
    assert call("test.py", "--env_conf", "env.json", *stage) == 0
    assert capsys.readouterr().out.startswith("weights: first, base in torch.float32\n")
    memory = json.loads(Path("memory.json").read_text())  # the second run may have other sizes
    Path("memory.json").write_text(json.dumps(memory | dict(num_memory=4, recent_tokens=8)))
    assert call("test.py", "--env_conf", "env.json", *stage) == 0
    saved = "(saved with num_memory 2 and recent_tokens 0)"
    assert capsys.readouterr().out.startswith(f"weights: first {saved}, base in torch.float32\n")
    assert call("train.py", "--env_conf", "env.json", *stage, "--set=train.tasks=[]") == 0
    capsys.readouterr()
    assert call("test.py", "--env_conf", "env.json", *stage) == 0
    assert capsys.readouterr().out.startswith("weights: out/ckp, base in torch.float32\n")
    assert json.loads(Path("out/test.json").read_text())["weights"] == "out/ckp"
    assert find_weights(load_env_config("env.json", [*changes, "model.save_ckp=null"])) == "first"
    assert (
        find_weights(
            load_env_config("env.json", ["model.save_ckp=null", "model.released_ckp=released"])
        )
        == "released"
    )


# ---- one split of a hub dataset ------------------------------------------------------------------


@pytest.fixture
def pg19_on_the_hub(tmp_path, monkeypatch) -> list[str]:
    """Replaces the hub by a small copy of emozilla/pg19. Returns the list of downloaded files, which
    are selected by huggingface_hub's own rule for patterns."""
    hub, cache = tmp_path / "there", tmp_path / "here"
    for split, parts in (("train", 3), ("validation", 1), ("test", 1)):
        for part in range(parts):
            path = hub / f"data/{split}-{part:05d}-of-{parts:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list([{"text": f"{split} {part}"}]).to_parquet(path)
    (hub / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    fetched: list[str] = []

    def snapshot(name: str, allow_patterns=None, local_files_only=False, **settings) -> str:
        if local_files_only and not cache.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        files = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
        for file in (
            () if local_files_only else filter_repo_objects(files, allow_patterns=allow_patterns)
        ):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).write_bytes((hub / file).read_bytes())
            fetched.append(file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("UIOLLMS_HUB_DIR", raising=False)
    return fetched


def test_a_split_is_downloaded_without_the_others(workspace, pg19_on_the_hub):
    assert [document.text for document in open_corpus("pg19.test")] == ["test 0"]
    assert pg19_on_the_hub == ["data/test-00000-of-00001.parquet"]
    # Only another split is on this machine, and tests do not reach the hub.
    (found,) = faults_of("train.corpus.0.name=pg19.train")
    assert found.startswith(
        "train.corpus[0].name: hub dataset emozilla/pg19, split train, is not on this machine"
    )
    assert faults_of("train.corpus.0.name=pg19.test") == []
    assert len(open_corpus("pg19.train")) == 3


def test_a_copy_of_a_dataset_that_lacks_the_split(workspace, monkeypatch):
    monkeypatch.setenv("UIOLLMS_HUB_DIR", "copies")
    Path("copies/pg19").mkdir(parents=True)
    Path("copies/pg19/train.jsonl").write_text(json.dumps({"text": "book"}))
    assert faults_of("train.corpus.0.name=pg19.train") == []
    (found,) = faults_of("train.corpus.0.name=pg19.test")
    assert (
        found
        == "train.corpus[0].name: copies/pg19 contains no file of split test of the hub dataset emozilla/pg19"
    )
