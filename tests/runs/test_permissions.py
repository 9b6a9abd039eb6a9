"""What the commands write has the permissions that the umask allows, so that a group can share it."""

import ast
import os
from pathlib import Path

import pytest
from test_commands import call
from transformers import AutoTokenizer

import uiollms
from uiollms import __main__ as commands

PACKAGE = Path(uiollms.__file__).parent
# Functions of other packages whose files only their owner can read, whatever the umask is, and the
# modules that call them: inside atomic_file, atomic_folder and merged_folder, which add what the
# umask allows, or for files that do not stay.
PRIVATE = {"mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory"}
TEMPORARY = {"alternatives/presses.py", "model/pretrained.py", "runs/checks.py"}


@pytest.mark.parametrize(
    "umask, file_mode, folder_mode", [(0o027, 0o640, 0o750), (2, 0o664, 0o775)]
)
def test_files_of_a_run_follow_the_umask(
    workspace, tiny_folder, monkeypatch, umask, file_mode, folder_mode
):
    monkeypatch.setenv("UIOLLMS_CACHE", str(workspace / "cache"))
    before = {path for path in workspace.rglob("*")}
    flags = ("--env_conf", "env.json")
    old = os.umask(umask)
    try:
        assert call("train.py", *flags) == call("test.py", *flags) == 0
        for command in (
            ["compress", "book0.txt", "-o", "book.mem", *flags],
            [
                "refine",
                "book.mem",
                "-o",
                "refined.mem",
                "--steps",
                "1",
                "--passage_size",
                "8",
                *flags,
            ],
            ["report", "out", "--no_attention"],
        ):
            assert not commands.main(command), command
        model = uiollms.MemoryLM.from_pretrained("out/ckp", base=str(tiny_folder), dtype="fp32")
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        model.save_pretrained("model", include_base=True, tokenizer=tokenizer)
        Path("shared").mkdir()
        Path("shared/notes.txt").touch()
        model.save_pretrained("shared")
        uiollms.Memory.load("book.mem").to_peft("adapter", model)
    finally:
        os.umask(old)
    written = [path for path in workspace.rglob("*") if path not in before]
    assert {"log.txt", "metrics.jsonl", "book.mem", "refined.mem", "report.html"} <= {
        path.name for path in written
    }
    wrong = {
        str(path.relative_to(workspace)): oct(path.stat().st_mode & 0o777)
        for path in written
        if path.stat().st_mode & 0o777 != (folder_mode if path.is_dir() else file_mode)
    }
    assert wrong == {}


def test_no_other_module_makes_private_files():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
        and getattr(node, "attr", getattr(node, "id", "")) in PRIVATE
    }
    assert found == TEMPORARY
