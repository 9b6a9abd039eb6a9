"""Tests that absurd input is refused at once, with one line that names it: pipes, devices, endless
files, huge numbers, deep nesting and zero bytes, in files, options and the environment."""

import gzip
import json
import os
import shutil
import socket
import struct
import time
from pathlib import Path

import pytest
import torch
from conftest import MEMORY, make_base, make_model
from test_chat import trained  # noqa: F401  a fixture
from test_commands import call

from uiollms import MemoryLM
from uiollms.cli.chat import lines_of
from uiollms.cli.chat import main as ask
from uiollms.cli.common import errors_as_lines, reporting_errors
from uiollms.cli.data import main as show_data
from uiollms.cli.dry_run import parse_memory
from uiollms.cli.options import file_path, fraction, temperature, whole_number
from uiollms.cli.schema import main as write_schema
from uiollms.cli.study import check_results
from uiollms.cli.study import main as study
from uiollms.config.load import load_env_config
from uiollms.config.sections import MemoryConfig
from uiollms.data import open_corpus
from uiollms.data.readers import json_lines as data_files
from uiollms.data.readers import json_lists
from uiollms.data.readers.fields import any_fields
from uiollms.distributed.launch import check_environment
from uiollms.files.errors import ConfigError, terminal_lines
from uiollms.files.globs import matching_files
from uiollms.files.json_files import find_unusable, loads, read_json
from uiollms.files.reading import check_tree, read_bytes
from uiollms.model.memory import Memory
from uiollms.runs.checks import check_weights
from uiollms.runs.run_files import LOCK, check_run_folder
from uiollms.weights.adapters import load_weights
from uiollms.weights.base_files import BaseConfig, least_parameters
from uiollms.weights.base_models import load_config
from uiollms.weights.packaged import converted

TRAIN = ["train.py", "--env_conf", "env.json"]


def one_line(capsys) -> str:
    """The only line that a refused command printed to stderr."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# ---- paths that are not files --------------------------------------------------------------------


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    # A whole path may be too long for the name of a socket.
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)


NO_FILES = {
    "a named pipe": make_pipe,
    "a device": make_device,
    "a socket": make_socket,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_pipes_devices_sockets_and_folders_are_refused(workspace, kind):
    """All readers of users' files refuse pipes, which would block, and devices, which never end."""
    path = workspace / "odd.json"
    NO_FILES[kind](path)
    expected = f"is {kind}, expected a file"
    readers = [
        read_json,
        load_env_config,
        lambda p: read_bytes(p, 9),
        lambda p: open_corpus(f"files:{p}")[0],
    ]
    readers += [Memory.load, lambda p: load_weights(make_model("llama", torch.float32), p)]
    if kind != "a folder":
        readers.append(check_tree)
    named_readers = [("odd.json", reader) for reader in readers[:3]]
    named_readers += [("odd.txt", readers[3]), ("odd.jsonl", readers[3])]
    for name, read in named_readers:
        path = path.rename(workspace / name)
        # A pattern matches no folders.
        if kind != "a folder" or name == "odd.json":
            with pytest.raises(ConfigError, match=expected):
                read(path)
    for name, read in [
        ("odd.mem", readers[4]),
        ("odd.pth", readers[5]),
        ("odd.safetensors", readers[-1]),
    ]:
        path = path.rename(workspace / name)
        if kind != "a folder":
            with pytest.raises(ConfigError, match=expected):
                read(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_with_a_pipe_is_refused(workspace, tiny_folder, capsys, name):
    shutil.copytree(tiny_folder, "base")
    Path("base", name).unlink()
    os.mkfifo(Path("base", name))
    assert call(*TRAIN, "--set=model.model_name=base") == 2
    assert one_line(capsys).startswith(f"model.model_name: 'base': base/{name}: is a named pipe")


def test_a_run_folder_with_a_pipe_is_refused(tmp_path):
    (tmp_path / LOCK).touch()
    os.mkfifo(tmp_path / "metrics.jsonl")
    message = "metrics.jsonl: is a named pipe, not written by a run, and would be lost"
    with pytest.raises(ConfigError, match=message):
        check_run_folder(tmp_path)


def test_weights_with_a_pipe_are_refused(tmp_path):
    make_model("llama", torch.float32).save_pretrained(tmp_path / "saved", include_base=True)
    (tmp_path / "saved/tokens.safetensors").unlink()
    os.mkfifo(tmp_path / "saved/tokens.safetensors")
    for check in (
        lambda: check_weights(str(tmp_path / "saved"), None),
        lambda: MemoryLM.from_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(ConfigError, match="tokens.safetensors: is a named pipe"):
            check()


def test_check_tree_accepts_links_to_nothing(tmp_path):
    (tmp_path / "gone.json").symlink_to("nowhere")
    check_tree(tmp_path)


# ---- input without an end ------------------------------------------------------------------------


def make_sparse(path: Path, size: int = 2**41) -> Path:
    """Creates a file of a size that takes no space on the disk."""
    path.touch()
    os.truncate(path, size)
    return path


def test_files_that_are_too_large_are_refused_at_once(tmp_path):
    began = time.monotonic()
    make_sparse(tmp_path / "a.json")
    message = "a.json: is larger than 64 MiB, the most that is read of such a file"
    with pytest.raises(ConfigError, match=message):
        read_json(tmp_path / "a.json")
    message = "a.json: has 2,199,023,255,552 bytes, at most 67,108,864 are read of JSON"
    with pytest.raises(ConfigError, match=message):
        check_tree(tmp_path)
    (tmp_path / "a.json").unlink()
    for name in ("a.safetensors", "a.mem"):
        with pytest.raises(ConfigError, match=f"{name}: has 2,199,023,255,552 bytes and no header"):
            check_tree(make_sparse(tmp_path / name))
    assert time.monotonic() - began < 5


def test_bytes_after_the_tensors_of_a_header_are_refused(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    whole_file = struct.pack("<Q", len(header)) + header + bytes(4)
    (tmp_path / "a.safetensors").write_bytes(whole_file)
    check_tree(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(whole_file + b"x")
    with pytest.raises(ConfigError, match="has 67 bytes and by its header 66"):
        check_tree(tmp_path)


def test_texts_above_the_size_limit_are_refused(tmp_path, monkeypatch):
    for module in (data_files, json_lists):
        monkeypatch.setattr(module, "MOST_TEXT", 2**20)
    (tmp_path / "a.txt").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ConfigError, match="a.txt: is larger than 1 MiB"):
        open_corpus(f"files:{tmp_path}/a.txt")[0]
    line = json.dumps({"text": "x" * 2**20})
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n' + line)
    with pytest.raises(ConfigError, match="a.jsonl: line 2: longer than 1 MiB"):
        open_corpus(f"files:{tmp_path}/a.jsonl")
    (tmp_path / "list.json").write_text(f'{{"train": [{line}]}}')
    with pytest.raises(ConfigError, match=r"train\[0\]: longer than 1 MiB"):
        json_lists.json_list(tmp_path / "list.json", "train", any_fields)[0]


def test_a_gz_made_to_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("UIOLLMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_files, "MOST_UNPACKED", 2**20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bytes(8 * 2**20)))
    message = "a.jsonl.gz: is not unpacked: it grows past 1 MiB, more than 200 times"
    with pytest.raises(ConfigError, match=message):
        open_corpus(f"files:{tmp_path}/a.jsonl.gz")
    assert list((tmp_path / "cache/unpacked").iterdir()) == []


def test_links_to_a_parent_folder_are_followed_once(tmp_path, monkeypatch):
    (tmp_path / "a/b/.hidden").mkdir(parents=True)
    for name in ("a/one.txt", "a/b/two.txt", "a/b/.hidden/three.txt", "four.txt"):
        (tmp_path / name).write_text(name)
    # If each link were followed to its end, there would be 2^40 paths.
    for number in range(3):
        (tmp_path / f"a/up{number}").symlink_to("..")
    names = ["a/b/two.txt", "a/one.txt", "four.txt"]
    expected = [f"{tmp_path}/{name}" for name in names]
    assert sorted(matching_files(f"{tmp_path}/**/*.txt")) == expected
    monkeypatch.chdir(tmp_path)
    assert sorted(matching_files("**/*.txt")) == names
    assert sorted(matching_files("a/**/*.txt")) == ["a/b/two.txt", "a/one.txt", "a/up0/four.txt"]
    assert matching_files("a/**/b/*.txt") == ["a/b/two.txt"]


def test_an_endless_line_of_a_chat_is_refused():
    with (
        open("/dev/zero", encoding="utf-8") as zeros,
        pytest.raises(ConfigError, match="line 1: more than 1,048,576"),
    ):
        next(lines_of(zeros, ""))


# ---- values --------------------------------------------------------------------------------------

DEEP = "[" * 1000 + "]" * 1000
HOSTILE = {
    "digits": (
        '{"a": {"b": [1, %s]}}' % ("9" * 5000),
        "x: a.b[1]: a number of 5,000 digits; at most 400 are read",
    ),
    "deep": (
        '{"a": %s}' % ("[" * 300 + "]" * 300),
        "x: a" + "[0]" * 99 + ": nested deeper than 100 levels",
    ),
    "deeper": ("[" * 100_000, "x: lists or objects nested deeper than 100 levels"),
    "twice": (
        '[{"a": {"b": 1, "b": 2}}]',
        "x: [0].a.b: written twice in one object; keep one of the two",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_refused(case):
    text, expected = HOSTILE[case]
    with pytest.raises(ConfigError) as refusal:
        loads(text, "x")
    assert str(refusal.value) == expected


def test_json_within_the_limits_is_read():
    assert loads("[" * 99 + "9" * 400 + "]" * 99, "x")
    assert find_unusable(loads(f'{{"a": [{2**63 - 1}, {-(2**63)}]}}', "x")) is None


@pytest.mark.parametrize(
    "value, expected",
    [
        ({"a": ["b\0"]}, "a[0]: holds a zero byte"),
        ({"a": {"b\0": 1}}, "a: holds a zero byte"),
        ({"a": 2**63}, "a: a whole number past 64 bits"),
        ({"a": "\udcff"}, "a: holds half of a surrogate pair"),
    ],
)
def test_unusable_values_in_json_are_named(value, expected):
    assert find_unusable(value).startswith(expected)


@pytest.mark.parametrize(
    "key", ["a" + ".a" * 200_000, "train.corpus." + "9" * 5000, "x" * 10_000, "train.seed"]
)
def test_hostile_overrides_are_refused_in_short_lines(workspace, key):
    for change in (f"{key}={DEEP}", key):
        with pytest.raises(ConfigError) as refusal:
            load_env_config("env.json", [change])
        lines = str(refusal.value).splitlines()
        assert all(len(line) < 600 for line in lines), lines


def test_a_key_twice_in_a_document_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "one", "text": "two"}\n')
    with pytest.raises(ConfigError, match=r"a.jsonl: line 2: text: written twice"):
        open_corpus(f"files:{tmp_path}/a.jsonl")[1]


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("train.accum_grad", 10**9, "less than or equal to 65536"),
        # torch would use GPU 0 for this number.
        ("model.device_map", 256, "less than or equal to 127"),
        ("train.train_iters", 10**30, "a whole number past 64 bits"),
        ("model.offload_dir", "book0.txt/x", "model.offload_dir: book0.txt/x: cannot be written"),
    ],
)
def test_numbers_out_of_range_in_a_config_are_refused(workspace, capsys, field, value, expected):
    assert call(*TRAIN, f"--set={field}={json.dumps(value)}") == 2
    assert expected in capsys.readouterr().err


def test_too_many_trials_are_refused(workspace, capsys):
    task = dict(task_type="passkey", task_name="files:book*.txt", num_instance=10**12)
    assert call(*TRAIN, f"--set=train.tasks={json.dumps([task])}") == 2
    assert "num_instance: at most 10000 trials at each depth" in one_line(capsys)


@pytest.mark.parametrize(
    "rank, expected",
    [(2**31, "less than or equal to 65536"), (33, "exceeds the base's hidden_size 32")],
)
def test_a_rank_out_of_range_is_refused(workspace, capsys, rank, expected):
    memory = dict(num_memory=2, chunk_size=16, lora_rank=rank, lora_alpha=4)
    Path("memory.json").write_text(json.dumps(memory))
    assert call(*TRAIN) == 2
    line = one_line(capsys)
    assert line.startswith("memory.json: lora_rank: ") and expected in line


def test_a_rank_above_the_hidden_size_of_a_loaded_base_is_refused(tmp_path):
    wide = MemoryConfig(**MEMORY.model_dump() | {"lora_rank": 33})
    with pytest.raises(ValueError, match="lora_rank 33 exceeds the base's hidden_size 32"):
        MemoryLM(make_base(), wide)


# ---- a base model's config.json ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            dict(num_hidden_layers=10**9),
            "num_hidden_layers: Input should be less than or equal to 4096, found 1000000000",
        ),
        (dict(hidden_size=-1), "hidden_size: Input should be greater than 0"),
        (dict(vocab_size="many"), "vocab_size: Input should be a valid integer"),
        (dict(max_position_embeddings=10**30), "a whole number past 64 bits"),
        (dict(rms_norm_eps=float("inf")), "rms_norm_eps: "),
        (dict(eos_token_id=["x"]), "eos_token_id"),
        (
            dict(num_hidden_layers=4000, hidden_size=2**16),
            "parameters, but the weight files in the folder have",
        ),
        (
            dict(model_type="other", num_hidden_layers=10**9),
            "num_hidden_layers: Input should be less",
        ),
        (dict(rope_parameters=[]), "rope_parameters: Input should be a valid dictionary"),
    ],
)
def test_a_base_of_absurd_sizes_is_refused_before_anything_is_built(
    workspace, tiny_folder, capsys, changes, expected
):
    shutil.copytree(tiny_folder, "base")
    value = json.loads(Path("base/config.json").read_text()) | changes
    Path("base/config.json").write_text(json.dumps(value))
    began = time.monotonic()
    assert call(*TRAIN, "--set=model.model_name=base") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("model.model_name: 'base': base/config.json: ") for line in lines)
    assert expected in lines[0] and time.monotonic() - began < 2


def test_a_base_config_with_a_key_twice_is_refused(workspace, tiny_folder):
    shutil.copytree(tiny_folder, "base")
    text = Path("base/config.json").read_text()
    Path("base/config.json").write_text(
        text.replace('"eos_token_id": 2', '"eos_token_id": 2, "eos_token_id": 1')
    )
    with pytest.raises(ConfigError, match="eos_token_id: written twice"):
        load_config("base")


def test_a_generation_config_with_wrong_tokens_is_refused(workspace, tiny_folder):
    shutil.copytree(tiny_folder, "base")
    Path("base/generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(ConfigError, match="generation_config.json: eos_token_id"):
        load_config("base")


def test_the_least_number_of_parameters_equals_the_models():
    """The least number counts the matrices without the head."""
    base = make_base("qwen3")
    expected = sum(
        p.numel() for name, p in base.named_parameters() if p.dim() == 2 and "lm_head" not in name
    )
    config = base.config.to_dict()
    fields = {name: value for name, value in config.items() if name in BaseConfig.model_fields}
    assert least_parameters(BaseConfig.model_construct(**fields)) == expected


def test_a_damaged_packaged_model_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("UIOLLMS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    message = "model.gguf: cannot be converted .*; install the package again"
    with pytest.raises(ConfigError, match=message):
        converted(tmp_path, "model.gguf")
    assert not any((tmp_path / "cache").rglob("*.json"))


# ---- options and the environment -----------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "abc", "", "9" * 5000, "1e3", "²", "1000000001"]
)
def test_whole_numbers_out_of_range_are_refused(text):
    message = "expected a whole number from 1 to 1,000,000,000, found"
    with pytest.raises(Exception, match=message) as refusal:
        whole_number()(text)
    assert len(str(refusal.value)) < 200
    assert whole_number()(" +7 ") == 7 and whole_number(0)("0") == 0


@pytest.mark.parametrize(
    "read, good, bad",
    [
        (temperature, ["0", "0.7", "1e-4"], ["-1", "nan", "inf", "1e-300", "1e999", "x", ""]),
        (fraction, ["1", "0.1"], ["0", "2", "nan", "-0.5", "x"]),
        (file_path, ["a b", "ü"], ["", "a\0b"]),
    ],
)
def test_options_accept_and_refuse_values(read, good, bad):
    for text in good:
        assert read(text) is not None
    for text in bad:
        with pytest.raises(Exception, match="expected .*, found "):
            read(text)


COMMANDS = [
    (ask, ["ask", "a.mem", "Who?", "--max_new_tokens=0"], "argument --max_new_tokens: expected"),
    (ask, ["chat", "--temperature=nan"], "argument --temperature: expected"),
    (ask, ["chat", "--top_p=0"], "argument --top_p: expected"),
    (ask, ["chat", "--seed=99999999999999999999"], "argument --seed: expected"),
    (ask, ["compress", "a\0b", "-o", "x.mem"], "argument FILE: expected a path"),
    (ask, ["compress", "a", "-o", "a\0b.mem"], "argument -o/--output: expected a path"),
    (show_data, ["--sample", "files:a", "-n", "-1"], "argument -n: expected"),
    (study, ["recall", "--iterations=0"], "argument --iterations: expected"),
    (
        study,
        ["recall", "--distances", "16"],
        "argument --distances: expected a whole number from 1 to 15",
    ),
    (study, ["gradients", "--env_conf=x", "--draws=-1"], "argument --draws: expected"),
]


@pytest.mark.parametrize(
    "main, arguments, expected", COMMANDS, ids=[f"{i}" for i in range(len(COMMANDS))]
)
def test_wrong_options_are_refused_by_name(capsys, main, arguments, expected):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and expected in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "text",
    ["1e999GiB", "-1GiB", "nanGiB", "24", "0GiB", "GiB", "", "2000TiB", "1GiB," * 128 + "1GiB"],
)
def test_impossible_device_memories_are_refused(text):
    message = "--device_memory .*: expected one size per GPU, such as 24GiB,24GiB; "
    with pytest.raises(ConfigError, match=message):
        parse_memory(text)


def test_units_of_device_memories():
    sizes = list(parse_memory("24GiB, 1.5GB,512MiB").values())
    assert sizes == [24 * 2**30, 1_500_000_000, 2**29]


@pytest.mark.parametrize(
    "variables, expected",
    [
        (
            {"WORLD_SIZE": "abc"},
            "environment variable WORLD_SIZE: expected a whole number from 0 to 65536, found 'abc'",
        ),
        (
            {"MASTER_PORT": "99999"},
            "environment variable MASTER_PORT: expected a whole number from 0 to 65535",
        ),
        ({"LOCAL_RANK": "-2"}, "environment variable LOCAL_RANK: "),
        ({"SLURM_NTASKS": "9" * 5000}, "environment variable SLURM_NTASKS: "),
        (
            {"WORLD_SIZE": "2", "RANK": "2"},
            "environment variable RANK: expected a number below WORLD_SIZE, which is 2",
        ),
        (
            {"UIOLLMS_CACHE": "/dev/null"},
            "environment variable UIOLLMS_CACHE: /dev/null is not a folder",
        ),
    ],
)
def test_wrong_environment_variables_are_refused(variables, expected):
    with pytest.raises(ConfigError) as refusal:
        check_environment(variables)
    assert str(refusal.value).startswith(expected) and len(str(refusal.value)) < 250


def test_environments_of_launchers_are_accepted():
    ranks = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    check_environment(ranks | {"MASTER_PORT": "29500", "UIOLLMS_CACHE": "/new"})
    check_environment({"WORLD_SIZE": "", "LOCAL_RANK": "-1", "RANK": "0"})


def test_commands_check_the_environment_first(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert reporting_errors(lambda: 0) == 2
    assert "environment variable WORLD_SIZE" in one_line(capsys)


# ---- messages ------------------------------------------------------------------------------------


def test_control_characters_in_messages_are_escaped(capsys):
    assert terminal_lines("ü \x1b[31m\r\u202e 東") == "ü \\u001b[31m\\r\\u202e 東"
    assert len(terminal_lines("x" * 10_000)) < 1100
    many = "\n".join("abc"[i % 3] for i in range(70))
    assert terminal_lines(many).splitlines()[50:] == ["... and 20 more"]

    def refuse() -> None:
        raise ConfigError("a\x1b]0;title\a: wrong")

    assert errors_as_lines(refuse) == 2 and one_line(capsys) == "a\\u001b]0;title\\u0007: wrong"


# ---- files of the user ---------------------------------------------------------------------------


def test_studies_and_schemas_overwrite_no_other_files(workspace, capsys):
    Path("results.json").write_text("mine")
    assert reporting_errors(lambda: study(["recall", "--out", ".", "--iterations", "1"])) == 2
    assert one_line(capsys).startswith("results.json: was not written by a study and would be lost")
    assert Path("results.json").read_text() == "mine"
    Path("config").write_text("a file")
    assert errors_as_lines(lambda: write_schema([])) == 2
    assert "config/schema/env.json: cannot be written" in one_line(capsys)


def test_a_study_accepts_the_folder_of_a_study(tmp_path):
    (tmp_path / "table.md").write_text("| a |")
    with pytest.raises(ConfigError, match="table.md: was not written by a study"):
        check_results(tmp_path)
    (tmp_path / "results.json").write_text('{"setting": {}, "rows": []}')
    check_results(tmp_path)


def test_a_memory_that_is_a_pipe_is_refused(trained, capsys):  # noqa: F811
    os.mkfifo("odd.mem")
    assert reporting_errors(lambda: ask(["ask", "odd.mem", "Who?", "--env_conf", "env.json"])) == 2
    expected = "odd.mem: is a named pipe, expected a file; copy its contents into one"
    assert one_line(capsys) == expected
