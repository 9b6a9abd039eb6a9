"""The report of a run folder whose files were edited, cut off or replaced shows what remains, and
names each fault in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import TRAIN
from safetensors.torch import save_file
from test_commands import call
from test_fuzz import VALUES, broken_bytes, examples, mutations
from test_report import report

import uiollms.reports.page
from uiollms.evaluation.attention_mass import AttentionMass
from uiollms.reports.run_folder import read_folder

FILES = ("metrics.jsonl", "test.json", "config.json", "versions.json")
TENSORS = ("test-nll.safetensors", "attention.safetensors")
ABOUT = dict(tokens="29", task="a", chunk_size="8", num_memory="2", weights="w")


MADE: list[Path] = []


@pytest.fixture
def run_folder(workspace, capsys, tmp_path_factory) -> Path:
    """Returns the folder of a finished run with an evaluation of the training, one of test.py and
    measured attention."""
    if not MADE:
        make_run(capsys)
        MADE.append(tmp_path_factory.mktemp("run") / "out")
        shutil.copytree("out", MADE[0])
    else:
        shutil.copytree(MADE[0], "out")
    return Path("out")


def make_run(capsys) -> None:
    tasks = json.loads(Path("env.json").read_text())["train"]["tasks"]
    tasks.append(
        dict(task_type="passkey", task_name="files:book*.txt", num_instance=1, truncation=230)
    )
    assert call(*TRAIN, f"--set=train.tasks={json.dumps(tasks)}") == 0
    Path("test.json").write_text(json.dumps(tasks))
    assert call("test.py", "--env_conf", "env.json", "--quiet") == 0
    AttentionMass(torch.full((2, 2, 3), 1 / 3), ABOUT).save(Path("out/attention.safetensors"))
    shutil.rmtree("out/tensorboard")
    assert report("out", "--no_attention") == 0
    assert "not in the report" not in capsys.readouterr().out


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Draws the plots, which take most of the time, for every tenth report only."""
    draw, count = uiollms.reports.page.draw_pictures, iter(range(10**6))
    few = lambda *arguments: draw(*arguments) if next(count) % 10 == 3 else ()  # noqa: E731
    monkeypatch.setattr("uiollms.reports.page.draw_pictures", few)


def lines_of(capsys, folder: Path) -> list[str]:
    """Returns the lines of a report that name a missing part, and its error."""
    code = report(str(folder), "--no_attention")
    printed = capsys.readouterr()
    assert code in (0, 2) and "Traceback" not in printed.err
    errors = [line for line in printed.err.splitlines() if line]
    found = [line for line in printed.out.splitlines() if line.startswith("not in the report: ")]
    assert found or errors
    return found + errors


OTHER = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing in it": lambda path: path.touch(),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "foreign JSON": lambda path: path.write_text(
        '{"name": "left-pad", "version": "1.3.0"}\n[]\n3\n'
    ),
    "deep JSON": lambda path: path.write_text('{"results":' * 5000),
    "a long number": lambda path: path.write_text('{"results": ' + "9" * 5000 + "}\n{}"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", OTHER)
def test_something_else_where_a_file_should_be(run_folder, undrawn, capsys, kind):
    for name in (*FILES, *TENSORS):
        path = run_folder / name
        path.rename("kept")
        OTHER[kind](path)
        found = lines_of(capsys, run_folder)
        assert any(name in line for line in found), (name, found)
        assert Path("out/report.html").exists()
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        Path("kept").rename(path)


def test_a_file_where_a_folder_should_be(run_folder, capsys):
    for name in ("plots", "checkpoints"):
        shutil.rmtree(run_folder / name)
        (run_folder / name).write_text("mine")
        lines_of(capsys, run_folder) if name == "plots" else report("out", "--no_attention")
        assert (run_folder / name).read_text() == "mine"
        (run_folder / name).unlink()
    shutil.rmtree(run_folder / "plots", ignore_errors=True)
    (run_folder / "report.html").unlink()
    (run_folder / "report.html").mkdir()
    (line,) = lines_of(capsys, run_folder)
    assert line.startswith("out/report.html: cannot be written")


def change(path: Path, keys: tuple, value: object) -> None:
    whole = json.loads(path.read_text())
    parent = whole
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    path.write_text(json.dumps(whole))


EDITS = {
    ("results", 0, "memory", "perplexity"): ("NaN", "memory.perplexity: Input should be a valid"),
    ("results", 0, "memory", "by_position", 0, "start"): (0, "start: Input should be greater"),
    ("results", 0, "chunk_size"): ("8", "chunk_size is '8', which is no chunk_size of a result"),
    ("results", 0, "task_type"): (None, "task_type is None, which is no task_type of a result"),
    ("results", 0, "memory"): ({}, "memory.documents: Field required"),
    ("results",): ({"a": 1}, "out/test.json: results: is not what test.py writes"),
    ("results", 1): (7, "out/test.json: results: is not what test.py writes"),
    ("weights",): (7, "out/test.json: weights: is not what test.py writes"),
    ("versions",): ([], "out/test.json: versions: is not what test.py writes"),
}


def test_edited_numbers_are_named(run_folder, undrawn, capsys):
    path = run_folder / "test.json"
    whole = path.read_text()
    for keys, (value, printed) in EDITS.items():
        change(path, keys, value)
        found = lines_of(capsys, run_folder)
        assert any(printed in line for line in found), (keys, found)
        path.write_text(whole)


def test_faulty_lines_of_metrics(run_folder, capsys):
    """The report names these lines and shows the others. A run cannot be resumed from such a
    file."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    bad = [
        '{"iteration": 1}',
        '{"iteration": -1, "seconds": 1}',
        "[",
        '{"iteration": 1, "seconds": 2, "lr": "NaN"}',
    ]
    path.write_text("\n".join([lines[0], *bad, *lines[1:]]) + "\n")
    found = lines_of(capsys, run_folder)
    where = [
        line.split("metrics.jsonl: ")[1] for line in found if "a line of the training curve" in line
    ]
    assert [line.partition(":")[0] for line in where] == [
        "line 4 is no JSON object",
        "line 2",
        "line 3",
        "line 5",
    ]
    assert len(read_folder(run_folder).metrics) == len(lines)
    assert call(*TRAIN, "--resume", "--set=train.train_iters=4", "--set=train.tasks=[]") == 2
    printed = capsys.readouterr().err
    assert (
        "Traceback" not in printed
        and "out/metrics.jsonl: line 2: seconds: Field required; remove it" in printed
    )


def test_tokens_of_another_evaluation(run_folder, capsys):
    """A kill between two renames can leave such a pair of files."""
    (run_folder / "test-nll.safetensors").rename("kept")
    assert call("test.py", "--env_conf", "env.json", "--quiet", "--set=train.seed=1") == 0
    Path("kept").rename(run_folder / "test-nll.safetensors")
    found = lines_of(capsys, run_folder)
    assert "it belongs to another evaluation than test.json" in "".join(found)
    assert "Perplexity by length" not in Path("out/report.html").read_text()


TENSOR_EDITS = [
    {"0.0.memory.nll": torch.ones(0), "0.0.memory.positions": torch.ones(0, dtype=torch.int64)},
    {"0.0.memory.nll": torch.ones(2), "0.0.memory.positions": torch.tensor([-1, 2])},
    {"0.0.memory.nll": torch.ones(2), "0.0.memory.positions": torch.ones(2)},
    {"0.0.memory.nll": torch.ones(2)},
    {"7.0.memory.nll": torch.ones(1), "7.0.memory.positions": torch.ones(1, dtype=torch.int64)},
    {"x.nll": torch.ones(1)},
    {"shares": torch.ones(3)},
    {"shares": torch.full((1, 1, 2), float("nan"))},
    {"shares": torch.zeros(1, 1, 2)},
]


def test_other_tensors(run_folder, capsys):
    about = dict(task="a", task_type="perplexity", truncation=None, chunk_size=8, protocol="paper")
    for tensors in TENSOR_EDITS:
        for name in TENSORS:
            (run_folder / name).unlink(missing_ok=True)
        name = TENSORS["shares" in tensors]
        save_file(
            tensors, run_folder / name, ABOUT if "shares" in tensors else {"0": json.dumps(about)}
        )
        found = [
            line.lower() for line in lines_of(capsys, run_folder) if "does not exist" not in line
        ]
        assert ("attention" if "shares" in tensors else "test-nll") in found[0], (tensors, found)


def test_any_mutation_of_any_file(run_folder, undrawn, capsys):
    whole = {name: (run_folder / name).read_bytes() for name in (*FILES, *TENSORS)}
    texts = {name: [json.loads(line) for line in whole[name].splitlines()] for name in FILES[:1]}
    texts |= {name: json.loads(whole[name]) for name in FILES[1:]}

    def written(name: str, data: st.DataObject) -> bytes:
        if name in texts and data.draw(st.booleans()):
            value = data.draw(st.one_of(mutations(texts[name]).map(lambda m: m[0]), VALUES))
            parts = value if name == FILES[0] and isinstance(value, list) else [value]
            return "\n".join(json.dumps(part) for part in parts).encode("utf-8", "surrogatepass")
        return data.draw(broken_bytes(whole[name]))

    @examples(120)
    @given(name=st.sampled_from(list(whole)), data=st.data())
    def search(name: str, data: st.DataObject) -> None:
        (run_folder / name).write_bytes(written(name, data))
        try:
            assert report("out", "--no_attention") in (0, 2)
        finally:
            (run_folder / name).write_bytes(whole[name])

    search()
    assert "Traceback" not in capsys.readouterr().err
