"""Written files and folders are whole at every moment, also when a process is killed and on file
systems without an atomic exchange."""

import ast
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MEMORY, make_base
from processes import TRAIN, run_forked, train
from test_commands import ROOT, call
from transformers import AutoModelForCausalLM, AutoTokenizer

import uiollms.files.atomic
from uiollms import Memory, MemoryLM
from uiollms.build import find_weights
from uiollms.config.load import load_env_config
from uiollms.files.atomic import (
    WORK,
    atomic_file,
    atomic_folder,
    machine_id,
    make_folder,
    read_whole,
    whole_folder,
    work_path,
)
from uiollms.files.errors import ConfigError
from uiollms.runs.board import Board
from uiollms.runs.checks import check_weights
from uiollms.runs.run_files import MOVING, put_back, set_aside
from uiollms.weights.adapters import load_weights, save_weights
from uiollms.weights.model_folder import load_tokenizer

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def killed_at(event: int, folder: Path, action: Callable[[], object]) -> int:
    """Runs `action` in a forked child that is killed before its `event`-th file operation in a
    folder. Returns the child's exit code."""
    seen = 0

    def watch(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in EVENTS and isinstance(arguments[0], str | os.PathLike):
            if os.path.abspath(os.fspath(arguments[0])).startswith(str(folder)):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

    def child() -> int:
        sys.addaudithook(watch)
        action()
        return 0

    return run_forked(child)


@pytest.fixture(params=["exchanged", "renamed twice"])
def swapping(request, monkeypatch) -> str:
    """Replaces folders by an atomic exchange, and by two renames."""
    if request.param == "renamed twice":
        monkeypatch.setattr(uiollms.files.atomic, "exchange", lambda one, other: False)
    return request.param


@pytest.fixture
def two_models(tiny_folder) -> list[MemoryLM]:
    """An old and a new model on the same base."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    models = [MemoryLM(base, MEMORY) for _ in range(2)]
    for number, model in enumerate(models):
        for parameter in model.trainable_parameters().values():
            torch.nn.init.constant_(parameter, 1.0 + number)
    return models


def token_of(model: MemoryLM) -> float:
    """Returns 1 if all tensors are the old model's, 2 if all are the new model's."""
    values = {value for t in model.memory_state_dict().values() for value in t.unique().tolist()}
    (value,) = values
    return value


WRITERS: dict[str, tuple[Callable, Callable]] = {
    "weights": (save_weights, lambda model, path: load_weights(model, path)),
    "weights.pth": (save_weights, lambda model, path: load_weights(model, path)),
    "model": (
        lambda model, path: model.save_pretrained(path),
        lambda model, path: load_weights(model, path),
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, two_models, swapping, name):
    """The next save also removes all temporary files."""
    (old, new), (write, read) = two_models, WRITERS[name]
    path = tmp_path / name
    found, event, code, reader = [], 0, 1, MemoryLM(old.base, MEMORY)
    while code:
        event += 1
        write(old, path)
        assert os.listdir(tmp_path) == [name]
        code = killed_at(event, tmp_path, lambda: write(new, path))
        assert code in (0, -signal.SIGKILL)
        read(reader, path)
        found.append(token_of(reader))
        if name == "model":
            assert MemoryLM.from_pretrained(path).memory_config == MEMORY
            assert load_tokenizer(path)
    assert event > (4 if name.endswith("pth") else 20)
    assert found == sorted(found) and set(found) == {1.0, 2.0}  # from some moment on the new one


def test_memories_are_whole_too(tmp_path, two_models):
    old, new = (model.compress(torch.arange(3, 40), source="book") for model in two_models)
    path, event, code = tmp_path / "book.mem", 0, 1
    while code:
        event += 1
        old.save(path)
        code = killed_at(event, tmp_path, lambda: new.save(path))
        assert Memory.load(path).made_by in (old.made_by, new.made_by)
    assert event > 3 and Memory.load(path).made_by == new.made_by
    assert os.listdir(tmp_path) == ["book.mem"]


def test_the_first_save_leaves_nothing_or_all(tmp_path, two_models, swapping):
    event, code, path = 0, 1, tmp_path / "weights"
    while code:
        event += 1
        code = killed_at(event, tmp_path, lambda: save_weights(two_models[0], path))
        if whole_folder(path).exists():
            load_weights(two_models[1], path)
        else:
            assert code
    assert os.listdir(tmp_path) == ["weights"]


def test_a_link_keeps_pointing_after_a_kill(tmp_path, two_models, swapping):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "ckp"
    link.symlink_to("../disk/ckp")
    event, code = 0, 1
    while code:
        event += 1
        save_weights(two_models[0], link)
        code = killed_at(event, tmp_path / "disk", lambda: save_weights(two_models[1], link))
        assert link.is_symlink() and os.listdir(link.parent) == ["ckp"]
        load_weights(MemoryLM(two_models[0].base, MEMORY), link)
    assert os.listdir(tmp_path / "disk") == ["ckp"]


def test_whoever_reads_while_another_writes(tmp_path, two_models, swapping):
    """A reader never gets a mixture of two versions."""
    (old, new), path, reader = two_models, tmp_path / "ckp", MemoryLM(two_models[0].base, MEMORY)
    save_weights(old, path)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            save_weights(new, path)
            save_weights(old, path)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(40):
            load_weights(reader, path)
            assert token_of(reader) in (1.0, 2.0)
    finally:
        over.set()
        thread.join()


def test_a_folder_that_does_not_change_is_read_once(tmp_path):
    seen = []
    assert read_whole(tmp_path, lambda folder: seen.append(folder) or 7) == 7 and seen == [tmp_path]
    with pytest.raises(ValueError, match="damaged"):
        read_whole(tmp_path, lambda folder: int("damaged"))


def test_a_rename_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    """This includes an error between the two renames."""
    monkeypatch.setattr(uiollms.files.atomic, "exchange", lambda one, other: False)
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="Input/output"), atomic_folder(tmp_path / "a") as work:
            (work / "new").touch()
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["old"]


# ---- commands after a kill -----------------------------------------------------------------------


def test_every_command_finds_the_weights_of_a_killed_run(workspace, monkeypatch, capsys):
    """train.py is killed after each of its renames; folders are replaced by two renames."""
    monkeypatch.setattr(uiollms.files.atomic, "exchange", lambda one, other: False)
    flags = ("--set=train.tasks=[]", "--set=train.save=1", "--set=train.train_iters=3", "--quiet")
    missing = 0

    def killed_after(number: int) -> Callable[[], int]:
        def run() -> int:
            seen = 0

            def counting(real: Callable) -> Callable:
                def rename(source, target):
                    nonlocal seen
                    real(source, target)
                    seen += 1
                    if seen == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if str(target).endswith("/ckp"):
                        Path("whole").touch()

                return rename

            os.rename, os.replace = counting(os.rename), counting(os.replace)
            return call(*TRAIN, "--restart", *flags)

        return run

    number, code = 0, 1
    config = load_env_config("env.json")
    while code:
        number += 1
        Path("whole").unlink(missing_ok=True)
        uiollms.files.atomic.remove(Path("out"))
        code = run_forked(killed_after(number))
        assert code in (0, -signal.SIGKILL)
        if not Path("whole").exists():
            continue
        assert find_weights(config) == "out/ckp"
        check_weights("out/ckp", None)
        if not Path("out/ckp").exists():
            missing += 1
            capsys.readouterr()
            assert call("test.py", "--env_conf", "env.json", "--use_env_conf_tasks") == 0
            assert "weights: out/ckp" in capsys.readouterr().out
            assert run_forked(train("--resume", *flags)) == 0
            assert Path("out/ckp").exists()
        names = {path.name for path in Path("out").iterdir()}
    assert missing == 2 and number > 12  # three saves, of which two replace one
    assert not [name for name in names if name.startswith(".") and name != ".ckp-lock"]


def test_a_restart_killed_half_way_is_undone(tmp_path):
    """Either all files of the folder have moved or none."""
    names = ["config.json", "metrics.jsonl", "checkpoints", "test.json"]

    def make(folder: Path) -> None:
        uiollms.files.atomic.remove(folder)
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
        for name in (n for n in names if n != "checkpoints"):
            (folder / name).touch()

    folder, event, code, undone = tmp_path / "out", 0, 1, 0
    while code:
        event += 1
        make(folder)
        code = killed_at(event, folder, lambda: set_aside(folder, [folder / n for n in names]))
        undone += (folder / MOVING).exists()
        put_back(folder)
        to_device = (folder / "earlier-1").exists()
        place = folder / "earlier-1" if to_device else folder
        assert sorted(os.listdir(place)) == sorted(names)
        assert (place / "checkpoints" / "step-00000001").is_dir()
        assert sorted(os.listdir(folder)) == (["earlier-1"] if to_device else sorted(names))
    assert undone >= len(names)


def test_what_is_there_by_now_is_not_overwritten_by_what_is_put_back(tmp_path):
    (tmp_path / MOVING).mkdir()
    (tmp_path / MOVING / "test.json").write_text("old")
    (tmp_path / "test.json").write_text("new")
    put_back(tmp_path)
    assert (tmp_path / "test.json").read_text() == "new"
    assert (tmp_path / "earlier-1" / "test.json").read_text() == "old"


# ---- on the disk ---------------------------------------------------------------------------------


def test_all_that_gets_its_name_is_on_the_disk(workspace, two_models, monkeypatch, tiny_folder):
    """Both the files and the folders that contain their names are synchronised."""
    synced, fsync = set(), os.fsync

    def noted(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    model = two_models[0]
    model.compress(torch.arange(3, 40), source="book").save("deep/er/book.mem")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.save_pretrained("saved/model", include_base=True, tokenizer=tokenizer)
    save_weights(model, "new/list.pth")
    flags = ("--quiet", "--set=model.save_ckp=elsewhere/ckp")
    assert call(*TRAIN, *flags) == 0 and call("test.py", "--env_conf", "env.json", *flags) == 0
    wanted = [Path(name) for name in ("deep", "saved", "new", "out", "elsewhere")]
    wanted += [path for folder in wanted for path in folder.rglob("*")]
    loose = (
        "out/log.txt",
        "out/lock",
        "out/tensorboard",
        "elsewhere/.ckp-lock",
    )  # nothing rests on them
    unsynced = [str(path) for path in wanted if path.stat().st_ino not in synced]
    assert [path for path in unsynced if not path.startswith(loose)] == []


def test_left_over_work_of_dead_processes_goes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f"{WORK}{machine_id()}-{dead.pid}-0"
    left.mkdir()
    (left / "half").touch()
    living, elsewhere = work_path(tmp_path), tmp_path / f"{WORK}00000000-{dead.pid}-0"
    for path in (living, elsewhere, tmp_path / "mine"):
        path.touch()
    with atomic_file(tmp_path / "a") as work:
        work.touch()
    names = sorted(path.name for path in (living, elsewhere, tmp_path / "mine", tmp_path / "a"))
    assert sorted(os.listdir(tmp_path)) == names


def test_names_as_long_as_a_name_can_be(tmp_path):
    for name in ("x" * 255, "x" * 200 + "." + "y" * 54, "ü" * 127):
        with atomic_file(tmp_path / name) as work:
            work.write_text("a")
        assert (tmp_path / name).read_text() == "a"


def test_parents_are_made(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


WRITING = {
    "write_text",
    "write_bytes",
    "save_file",
    "savefig",
    "save_pretrained",
    "replace",
    "rename",
}
WRITING |= {"move", "savez", "to_csv", "to_html", "NamedTemporaryFile", "mkdtemp"}
# Calls that move finished files, and calls that only test whether a folder is writable.
ALLOWED = {
    "src/uiollms/files/atomic.py": {"write_text", "replace", "rename"},
    "src/uiollms/runs/run_files.py": {"rename"},
    "src/uiollms/runs/run.py": {"rename"},
    "src/uiollms/runs/checks.py": {"NamedTemporaryFile"},
    # Into temporary folders, for the process of kvpress and back.
    "src/uiollms/alternatives/presses.py": {"write_text", "save_file", "save_pretrained"},
    "src/uiollms/alternatives/press_worker.py": {"write_text", "save_file"},
    "test.py": {"NamedTemporaryFile"},
}


def test_all_writes_are_atomic():
    """All code writes through files/atomic.py: the argument of every writing call is the temporary
    path `work`."""
    found = []
    paths = [ROOT / "train.py", ROOT / "test.py", *(ROOT / "src").rglob("*.py")]
    paths += [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "docs").rglob("*.py")]
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            words = ast.unparse(node)
            if called in ("replace", "move") and not words.startswith(("os.", "shutil.")):
                continue  # of a text, of a tensor
            if called in WRITING - ALLOWED.get(name, set()) and "work" not in words:
                found.append(f"{name}: {words[:80]}")
    assert found == []


# ---- TensorBoard ---------------------------------------------------------------------------------


def warned(caplog) -> str:
    (record,) = caplog.records
    said = record.getMessage()
    assert said.endswith("the run continues without TensorBoard, metrics.jsonl has all numbers")
    assert "\n" not in said
    return said


def test_a_folder_of_tensorboard_that_goes_away(tmp_path, caplog):
    board = Board(tmp_path / "board")
    board.add(1, [("a", 1.0)])
    uiollms.files.atomic.remove(tmp_path / "board")
    for iteration in (2, 3):
        board.add(iteration, [("a", 1.0)])
    assert "No such file or directory" in warned(caplog) and not (tmp_path / "board").exists()


def test_a_place_where_tensorboard_cannot_write(tmp_path, caplog):
    (tmp_path / "board").touch()
    board = Board(tmp_path / "board")
    board.add(1, [("a", 1.0)])
    assert "board: cannot be written (" in warned(caplog)


def test_tensorboard_is_not_installed(tmp_path, caplog, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    Board(tmp_path / "board").add(1, [("a", 1.0)])
    assert "tensorboard" in warned(caplog)


def test_a_disk_that_is_full_for_tensorboard(workspace):
    """The last kilobytes go to the metrics; the run ends as if there were no TensorBoard."""

    def run() -> int:
        real = Board.append

        def full(self: Board, events: object, mode: str) -> None:
            if mode == "xb":
                return real(self, events, mode)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            try:
                real(self, events, mode)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        Board.append = full
        return call(*TRAIN, "--set=train.tasks=[]")

    assert run_forked(run, output="said") == 0
    assert "Traceback" not in Path("said").read_text()
    assert Path("out/log.txt").read_text().count("the run continues without TensorBoard") == 1
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 3


def test_going_back_is_told_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Board(tmp_path)
    for iteration in (1, 2, 3):
        first.add(iteration, [("a", float(iteration))])
    os.utime(first.path, (1, 1))
    Board(tmp_path, purge=2).add(2, [("a", 20.0)])
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("a")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 20.0)]


# ---- torn metrics --------------------------------------------------------------------------------


def test_a_run_goes_on_from_metrics_that_were_cut_anywhere(workspace):
    """Behind an inner brace, within a character, behind all but the line's end."""
    for book in Path(".").glob("book*.txt"):
        book.rename(f"bücher-{book.name}")
    flags = ("--set=train.tasks=[]", "--set=train.corpus.0.name=files:bücher*.txt", "--quiet")
    assert call(*TRAIN, *flags) == 0
    path = Path("out/metrics.jsonl")
    *whole, last = path.read_bytes().splitlines()
    last = json.dumps(json.loads(last) | {"note": "ü"}, ensure_ascii=False).encode()
    letter = last.index("ü".encode())
    for cut in (1, last.index(b"}") + 1, letter + 1, letter + 2, len(last)):
        path.write_bytes(b"\n".join([*whole, last[:cut]]))
        assert call(*TRAIN, "--resume", *flags) == 0
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert [line["iteration"] for line in lines] == [1, 2] + [3] * (cut == len(last))


def test_a_damaged_folder_is_still_said_to_be_damaged(tmp_path):
    model = MemoryLM(make_base("llama", torch.float32), MEMORY)
    save_weights(model, tmp_path / "ckp")
    (tmp_path / "ckp" / "tokens.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="the checkpoint is damaged"):
        load_weights(model, tmp_path / "ckp")
    (tmp_path / "ckp" / "tokens.safetensors").unlink()
    os.mkfifo(tmp_path / "ckp" / "tokens.safetensors")
    with pytest.raises(ConfigError, match="tokens.safetensors: is a named pipe, expected a file"):
        load_weights(model, tmp_path / "ckp")
    os.mkfifo(tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="list.pth: (not a file|is a named pipe)"):
        load_weights(model, tmp_path / "list.pth")
