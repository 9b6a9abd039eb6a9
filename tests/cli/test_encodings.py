"""Tests that files, names and terminals with any letters are read and written without errors."""

import ast
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_chat import trained  # noqa: F401  a fixture
from test_commands import call
from tokenizers import pre_tokenizers

from uiollms.cli.chat import lines_of
from uiollms.cli.chat import main as ask
from uiollms.cli.common import Output, reporting_errors
from uiollms.cli.data import main as show_data
from uiollms.data import open_corpus
from uiollms.files.errors import ConfigError
from uiollms.model.memory import Memory

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "train.py", ROOT / "test.py", *sorted((ROOT / "examples").glob("*.py"))]
SOURCES += sorted((ROOT / "src").rglob("*.py"))
FOREIGN = "東京の朝 \U0001f600 naïve → "


# ---- programs name the encoding of files ---------------------------------------------------------


def text_without_encoding(source: str) -> list[int]:
    """Returns the lines of a program that read or write text without naming an encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        settings = {keyword.arg: keyword.value for keyword in node.keywords}
        index = 0 if method else 1
        arguments = [*node.args[index : index + 1], *filter(None, [settings.get("mode")])]
        modes = [str(mode.value) for mode in arguments if isinstance(mode, ast.Constant)]
        if ast.unparse(node.func) == "plugin.open":  # of a corpus
            continue
        is_text = {
            "open": not arguments or (bool(modes) and "b" not in modes[0]),
            "read_text": method,
            "write_text": method,
            "FileHandler": True,
            "run": "text" in settings or "universal_newlines" in settings,
        }
        if is_text.get(name) and "encoding" not in settings:
            found.append(node.lineno)
    return found


def test_calls_without_an_encoding_are_detected():
    bad = ["open(p)", "open(p, 'a')", "p.open()", "p.open('w')", "p.read_text()", "p.write_text(t)"]
    bad += ["subprocess.run(c, text=True)", "logging.FileHandler(p)"]
    good = ["open(p, 'rb')", "p.open('wb')", "open(p, mode='rb')", "p.read_text(encoding='utf-8')"]
    good += ["mixture.open(draw)", "read_text(p)", "subprocess.run(c, text=True, encoding='utf-8')"]
    assert [text for text in bad + good if text_without_encoding(text)] == bad


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_text_files_name_their_encoding(path):
    assert text_without_encoding(path.read_text(encoding="utf-8")) == []


# ---- terminals and pipes -------------------------------------------------------------------------


@pytest.fixture(params=["ascii", "cp1252", "utf-8"])
def printed(request):
    """A function that runs a command with a stdout of an encoding, and returns what was written."""

    def run(command) -> str:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=request.param, write_through=True)
        with redirect_stdout(stream):
            assert reporting_errors(command) == 0
        return stream.buffer.getvalue().decode(request.param)

    run.shows_all = request.param == "utf-8"
    return run


def test_characters_that_the_terminal_cannot_show_are_escaped(trained, printed):  # noqa: F811
    Path("zh.txt").write_text(FOREIGN * 5, encoding="utf-8")
    env = ["--env_conf", "env.json"]
    letters = "東京" if printed.shows_all else "\\u6771\\u4eac"
    assert letters in printed(lambda: show_data(["--sample", "files:zh.txt"]))
    printed(lambda: ask(["compress", "zh.txt", "-o", "zh.mem", *env]))
    question = ["ask", "zh.mem", "東京?", *env, "--max_new_tokens", "4"]
    assert f"{letters}?" in printed(lambda: ask(question))


def test_json_is_json_in_every_encoding(workspace, printed):
    Path("zh.txt").write_text(FOREIGN, encoding="utf-8")
    text = printed(lambda: show_data(["--sample", "files:zh.txt", "--json"]))
    assert json.loads(text)["text"] == FOREIGN
    assert text.isascii() == (not printed.shows_all)


def test_a_name_that_is_no_text_is_printed_escaped(printed):
    # Python decodes a byte of a file name that is not UTF-8 to such a surrogate.
    name = "a\udcff.txt"
    assert printed(lambda: Output().print_text(name)) == "a\\udcff.txt\n"


def test_input_that_is_not_text_is_refused_in_one_line(trained, capsys):  # noqa: F811
    bad = io.TextIOWrapper(io.BytesIO(b"Who?\n\xff\n"), encoding="ascii")
    with pytest.raises(ConfigError, match="stdin: line 1: not text in ascii; PYTHONUTF8=1 reads"):
        list(lines_of(bad, ""))
    with pytest.raises(ConfigError, match="stdin: line 2: character 0 is half of a surrogate pair"):
        list(lines_of(io.StringIO("\ufeffWho?\n\udcff\n"), ""))
    assert list(lines_of(io.StringIO("\ufeffWho?\n/quit\n"), "")) == ["Who?"]
    code = reporting_errors(lambda: ask(["ask", "no.mem", "\udcff", "--env_conf", "env.json"]))
    error = capsys.readouterr().err
    assert (code, error) == (2, "ask: the question: character 0 is half of a surrogate pair\n")


# ---- data ----------------------------------------------------------------------------------------


WRITTEN = [b"\xef\xbb\xbfone. ", b"one.\r\ntwo. ", b"one.\rtwo. ", b"one.\ntwo. "]


@pytest.mark.parametrize("data", WRITTEN)
def test_compress_reads_files_as_training_does(trained, data):  # noqa: F811
    # The text is shorter than a chunk, so its tokens are stored uncompressed.
    Path("in.txt").write_bytes(data)
    ask(["compress", "in.txt", "-o", "in.mem", "--env_conf", "env.json", "--quiet"])
    text = open_corpus("files:in.txt")[0].text
    first = 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("o")
    ids = Memory.load("in.mem").open_ids.tolist()
    assert len(ids) == len(text) and ids[0] == first


def test_a_byte_order_mark_alone_on_a_line_is_a_blank_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"text": "one"}\n')
    assert [document.text for document in open_corpus(f"files:{tmp_path}/a.jsonl")] == ["one"]


ROWS = [
    {"text": "Plain words.", "input": None, "output": None},
    {"text": None, "input": "What?", "output": "That."},
    {"text": None, "input": "What?", "output": None},
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_of_a_table_may_have_nulls(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    corpus = open_corpus(f"files:{path}")
    assert [corpus[i].task for i in range(2)] == ["language modeling", "question answering"]
    assert corpus[0].text == "Plain words."
    assert (corpus[1].text, corpus[1].response) == ("What?", "That.")
    with pytest.raises(ConfigError, match=r"found \['input'\], and null \['output', 'text'\]"):
        corpus[2]


# ---- names ---------------------------------------------------------------------------------------


def texts(pattern: str) -> list[str]:
    return sorted(document.text for document in open_corpus(f"files:{pattern}"))


AWKWARD = ["my models ü", "50% #1", "[v1] data", "東京", "it's {a}", "[a-b]"]


@pytest.mark.parametrize("name", AWKWARD)
def test_files_in_folders_with_unusual_names_are_found(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    for i in range(3):
        (folder / f"book{i}.txt").write_text(str(i), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), folder / "rows.parquet")
    assert texts(f"{folder}/book0.txt") == ["0"]
    assert texts(f"{folder}/*.txt") == ["0", "1", "2"]
    assert texts(f"{folder}/book[0-1].txt") == ["0", "1"]
    assert texts(f"{folder}/**/*.txt") == ["0", "1", "2"]
    assert texts(f"{folder}/rows.parquet") == ["x"]
    monkeypatch.chdir(tmp_path)
    assert texts(f"{name}/book1.txt") == ["1"]
    assert texts(f"{name}/*1.txt") == ["1"]


def test_brackets_are_a_set_of_letters_or_a_name(tmp_path):
    for name in ("book1.txt", "book[1].txt", "book[2].txt", "book3.txt", "sub/part[9].txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name, encoding="utf-8")
    assert texts(f"{tmp_path}/book[1].txt") == ["book[1].txt"], "a name that is a file is that file"
    assert texts(f"{tmp_path}/book[13].txt") == ["book1.txt", "book3.txt"]
    assert texts(f"{tmp_path}/*/part[9].txt") == ["sub/part[9].txt"], "nothing else matches"
    with pytest.raises(ConfigError, match="no file matches"):
        texts(f"{tmp_path}/book[7].txt")


def test_training_reads_a_folder_with_an_unusual_name(workspace):
    folder = Path("[v1] bücher 50% #1")
    folder.mkdir()
    for book in Path().glob("book*.txt"):
        book.rename(folder / book.name)
    changes = [f"train.corpus.0.name=files:{folder}/book*.txt", f"train.run_dir={folder}/run"]
    settings = [f"--set={change}" for change in (*changes, "train.tasks=[]")]
    assert call("train.py", "--env_conf", "env.json", *settings, "--quiet") == 0
    assert (folder / "run" / "metrics.jsonl").exists()
