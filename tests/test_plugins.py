"""Tests of plugins: the packages of examples/plugins are installed with pip into a folder of their
own, and used by commands in child processes, so that this process never imports them."""

import itertools
import json
import os
import random
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from processes import TRAIN, run_forked
from safetensors.torch import load_file
from test_commands import call
from test_package import pip

from uiollms import __main__ as program

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "plugins"
PAGE = "<html><head><title>no text</title></head><body><h1>{0}</h1><p>{1}</p></body></html>"
USED = dict(
    corpus=[
        dict(
            name="plugin:epub",
            corpus_options=dict(files="books/*.epub"),
            partition=1,
            truncation=80,
            task="plugin:distant",
            task_options=dict(gap=1),
        )
    ],
    estimator="plugin:bernoulli",
    estimator_options=dict(keep=0.5),
    tasks=[
        dict(
            task_type="plugin:distant",
            task_options=dict(gap=2),
            task_name="plugin:epub",
            corpus_options=dict(files="books/*.epub"),
            num_instance=2,
            truncation=80,
            compare=["window", "raw", "shuffled"],
        )
    ],
)
VERSIONS = {
    "plugin.corpora.epub": "uiollms-epub 0.1.0",
    "plugin.tasks.distant": "uiollms-distant 0.1.0",
    "plugin.estimators.bernoulli": "uiollms-bernoulli 0.1.0",
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """The folder in which pip has installed the three examples."""
    folder = tmp_path_factory.mktemp("installed")
    sources = tmp_path_factory.mktemp("sources")  # setuptools writes into the folder that it builds
    for source in sorted(EXAMPLES.iterdir()):
        (sources / source.name).mkdir()
        for file in source.iterdir():
            if file.is_file():
                (sources / source.name / file.name).write_bytes(file.read_bytes())
    flags = ("--no-deps", "--no-build-isolation", "--target", folder)
    pip("install", *flags, *sorted(sources.iterdir()))
    return folder


def write_book(path: Path, *chapters: tuple[str, str]) -> None:
    """Writes an EPUB file whose chapters are stored in the opposite of their reading order."""
    names = [f"part {i}.xhtml" for i in range(len(chapters))]
    items = "".join(f'<item id="c{i}" href="part%20{i}.xhtml"/>' for i in range(len(chapters)))
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(chapters)))
    space = 'xmlns="http://www.idpf.org/2007/opf"'
    with zipfile.ZipFile(path, "w") as book:
        for name, (title, text) in reversed(list(zip(names, chapters, strict=True))):
            book.writestr(f"OPS/{name}", PAGE.format(title, text))
        package = f"<package {space}><manifest>{items}</manifest><spine>{spine}</spine></package>"
        book.writestr("OPS/book.opf", package)
        root = '<container><rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>'
        book.writestr("META-INF/container.xml", root)


@pytest.fixture
def shelf(workspace) -> Path:
    """A workspace with EPUB books and a config that uses all three examples, `plugins.json`."""
    (workspace / "books").mkdir()
    for i in range(3):
        text = f"{i}: It was a bright cold day, and the clocks were striking. " * 3
        write_book(workspace / "books" / f"{i}.epub", ("One", text), ("Two", text))
    env = json.loads((workspace / "env.json").read_text())
    env["train"] |= USED
    (workspace / "plugins.json").write_text(json.dumps(env))
    (workspace / "test.json").write_text(json.dumps(dict(tasks=USED["tasks"])))
    return workspace


def offer(folder: Path, group: str, entries: dict[str, str], code: str = "") -> None:
    """Installs the package `made` 1.0 with entry points of one group into a new folder."""
    info = folder / "made-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made\nVersion: 1.0\n")
    lines = [f"{name} = {value}\n" for name, value in entries.items()]
    (info / "entry_points.txt").write_text(f"[uiollms.{group}]\n{''.join(lines)}")
    (folder / "made.py").write_text(code)


def run(folders: list[Path], *command: str) -> tuple[int, str]:
    """Runs a command (train.py, test.py, or one of `uiollms`) in a child whose path begins with
    the folders. Returns its exit code and what it printed."""

    def run_command() -> int:
        sys.path[:0] = [str(folder) for folder in folders]
        if command[0].endswith(".py"):
            return call(*command)
        return program.reporting_errors(lambda: program.main([*command]))

    code = run_forked(run_command, output="printed.txt")
    return code, Path("printed.txt").read_text()


def refused(folders: list[Path], *changes: str, config: str = "plugins.json") -> str:
    """The only fault of a training that is refused before a model is loaded."""
    flags = [f"--set={change}" for change in changes]
    code, printed = run(folders, "train.py", "--env_conf", config, *flags)
    assert code == 2 and not Path("out").exists(), printed
    # pydantic counts a refused entry as a missing one, too.
    uncounted = "Tuple should have at least 1 item"
    lines = [line for line in printed.strip().splitlines() if uncounted not in line]
    assert len(lines) == 1, printed
    return lines[0]


# ---- use -----------------------------------------------------------------------------------------


def test_a_run_with_the_three_examples(shelf, examples):
    train = ("train.py", "--env_conf", "plugins.json")
    code, printed = run([examples], *train, "--set=model.save_ckp=whole/ckp")
    assert code == 0, printed
    versions = json.loads((shelf / "out" / "versions.json").read_text())
    assert versions.items() >= VERSIONS.items()
    (state,) = (shelf / "out" / "checkpoints").glob("step-00000003/state.json")
    assert json.loads(state.read_text())["environment"].items() >= VERSIONS.items()
    lines = [json.loads(line) for line in (shelf / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "nll" in line] == [1, 2, 3]
    (result,) = next(line["eval"] for line in lines if "eval" in line)
    assert (result["task_type"], result["task"]) == ("plugin:distant", "plugin:epub")
    assert result["corpus_version"] == "uiollms-epub 0.1.0"
    # 80 tokens are 5 chunks of 16, of which the last two read memory with gap 2.
    assert result["scored_tokens"] == 2 * (16 + 15)
    assert {"memory", "window", "raw", "shuffled"} <= result.keys()

    evaluated = run([examples], "test.py", "--env_conf", "plugins.json", "--quiet")
    assert evaluated[0] == 0, evaluated[1]
    tested = json.loads((shelf / "out" / "test.json").read_text())
    used = {name: version for name, version in VERSIONS.items() if "estimators" not in name}
    assert {n: v for n, v in tested["versions"].items() if n.startswith("plugin.")} == used

    # A run in two parts is the same run; the second part has another version of a plugin.
    parts = ("--set=model.save_ckp=parts/ckp", "--set=train.run_dir=parts")
    assert run([examples], *train, *parts, "--set=train.save=1", "--set=train.keep_last=9")[0] == 0
    newer = shelf / "newer"
    newer.mkdir()
    for path in examples.iterdir():
        if path.name == "uiollms_bernoulli-0.1.0.dist-info":
            (newer / path.name).mkdir()
            for name in ("METADATA", "entry_points.txt"):
                text = (path / name).read_text().replace("Version: 0.1.0", "Version: 0.2.0")
                (newer / path.name / name).write_text(text)
    point = "--resume=parts/checkpoints/step-00000001"
    code, printed = run([newer, examples], *train, *parts, point)
    assert code == 0, printed
    change = "plugin.estimators.bernoulli: uiollms-bernoulli 0.1.0 -> uiollms-bernoulli 0.2.0"
    assert f"changed since the checkpoint: {change}" in (shelf / "parts/log.txt").read_text()
    whole, continued = (
        load_file(shelf / name / "ckp" / "encoder" / "adapter_model.safetensors")
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    # Without the plugin the run cannot go on.
    code, printed = run([], *train, *parts, point)
    assert code == 2 and "train.estimator: plugin:bernoulli is not installed" in printed


def test_two_processes_train_as_one(shelf, examples, monkeypatch):
    from test_distributed import in_processes

    monkeypatch.syspath_prepend(str(examples))
    config = Path("env.json")
    config.write_text(Path("plugins.json").read_text())
    found = {}
    for size, per_step in ((1, 2), (2, 1)):
        flags = (f"train.accum_grad={per_step}", "train.train_iters=4", "train.tasks=[]")
        flags += (f"model.save_ckp=of{size}.pth", f"train.run_dir=of{size}")
        codes = in_processes(size, *(f"--set={flag}" for flag in flags), said=f"said{size}")
        assert codes == [0] * size, Path(f"said{size}").read_text()
        found[size] = torch.load(f"of{size}.pth", weights_only=True)
    # Gradients of two documents are added in another order, in float32.
    for one, two in zip(found[1], found[2], strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)
    assert "uiollms_bernoulli" not in sys.modules


def test_the_plan_of_a_run_with_plugins(shelf, examples):
    code, printed = run([examples], *TRAIN[:2], "plugins.json", "--dry_run", "--quiet", "--json")
    assert code == 0 and json.loads(printed)["fits"], printed


def test_the_schemas_do_not_depend_on_what_is_installed(workspace, examples):
    assert run([examples], "schema", "--out", "copy")[0] == 0
    page = (workspace / "copy/docs/config.md").read_text()
    assert page == (ROOT / "docs" / "config.md").read_text()
    for path in (ROOT / "config" / "schema").iterdir():
        assert (workspace / "copy/config/schema" / path.name).read_text() == path.read_text()


def test_the_list_of_plugins(workspace, examples, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, printed = run([], "plugins")
    assert code == 0 and "no package with plugins is installed" in printed
    offer(workspace / "made", "tasks", {"broken": "made:Task"}, "import nothing_of_this_name")
    code, printed = run([examples, workspace / "made"], "plugins", "--json")
    rows = {row["name"]: row for row in map(json.loads, printed.splitlines())}
    assert code == 0 and rows.keys() == {
        "plugin:epub",
        "plugin:broken",
        "plugin:distant",
        "plugin:bernoulli",
    }
    assert rows["plugin:bernoulli"] == {
        "name": "plugin:bernoulli",
        "kind": "estimators",
        "package": "uiollms-bernoulli 0.1.0",
        "options": {"keep": "probability that a memory is kept"},
        "fault": None,
    }
    assert "ModuleNotFoundError" in rows["plugin:broken"]["fault"]
    _, printed = run([examples], "plugins")
    assert "corpus_options: files, min_characters" in printed
    assert run([examples], "plugins", "--quiet") == (0, "")


def test_the_documents_of_a_plugin(shelf, examples):
    options = ("--options", '{"files": "books/*.epub"}')
    code, printed = run([examples], "data", "--sample", "plugin:epub", "-n", "1", *options)
    assert code == 0 and "3 documents" in printed and "books/0.epub" in printed, printed
    (shelf / "books" / "1.epub").write_bytes(b"PK")
    code, printed = run([examples], "data", "--check", "plugin:epub", *options)
    assert code == 2 and "books/1.epub: is no readable EPUB file" in printed
    code, printed = run([examples], "data", "--sample", "plugin:epub", "--options", "[]")
    assert code == 2 and "--options: expected an object in JSON" in printed


# ---- refusals ------------------------------------------------------------------------------------

CORPUS, TASK = "env: train.corpus[0]", "env: train.tasks[0]"


@pytest.mark.parametrize(
    "change, line",
    [
        (
            "train.estimator=plugin:bernouli",
            "train.estimator: plugin:bernouli is not installed; did you mean plugin:bernoulli? "
            "installed are plugin:bernoulli (uiollms-bernoulli 0.1.0); built in are exact, tbptt, "
            "uio, importance; `pip install PACKAGE` installs a package whose entry points of the "
            "group uiollms.estimators have the name bernouli",
        ),
        (
            "train.estimator_options.kep=1",
            "train.estimator: plugin:bernoulli of uiollms-bernoulli 0.1.0: estimator_options: kep: "
            "unknown key; did you mean 'keep'?",
        ),
        (
            "train.estimator_options.keep=2.5",
            "train.estimator: plugin:bernoulli of uiollms-bernoulli 0.1.0: estimator_options: "
            "keep: Input should be less than or equal to 1, found 2.5",
        ),
        (
            "train.estimator=uio",
            "train: estimator_options are for a plugin, found with estimator 'uio': remove them",
        ),
        (
            'train.estimator="plugin:no name"',
            "train.estimator: String should match pattern '^plugin:[A-Za-z0-9][A-Za-z0-9_.-]*$', "
            'found "plugin:no name"',
        ),
        (
            "train.corpus.0.corpus_options={}",
            "train.corpus[0].name: plugin:epub of uiollms-epub 0.1.0: corpus_options: files: "
            "missing",
        ),
        (
            "train.corpus.0.corpus_options.files=no/*.epub",
            "train.corpus[0].name: no file matches no/*.epub; correct `files`",
        ),
        (
            "train.corpus.0.name=files:*.txt",
            "train.corpus[0]: corpus_options are for a plugin, found with name 'files:*.txt': "
            "remove them",
        ),
        (
            "train.corpus.0.task_options.gap=-1",
            "train.corpus[0].task: plugin:distant of uiollms-distant 0.1.0: task_options: gap: "
            "Input should be greater than or equal to 0, found -1",
        ),
        (
            "train.corpus.0.kl_weight=0.5",
            "train.corpus[0]: kl_weight 0.5 with plugin:distant: the plugin determines its loss; "
            "remove it",
        ),
        (
            "train.tasks.0.task_options.gap=true",
            "train.tasks[0].task_type: plugin:distant of uiollms-distant 0.1.0: task_options: gap: "
            "Input should be a valid integer, found true",
        ),
        (
            "train.tasks.0.task_type=perplexity",
            "train.tasks[0]: task_options are for a plugin, found with task_type 'perplexity': "
            "remove them",
        ),
    ],
)
def test_faults_are_found_before_a_model_is_loaded(shelf, examples, change, line):
    assert refused([examples], change) == f"plugins.json: {line}"


def test_names_of_built_in_ones_have_their_messages(shelf, examples):
    line = refused([examples], "train.estimator=bernoulli", config="env.json")
    allowed = "'uio', 'tbptt', 'exact' or 'importance'"
    assert line == f'env.json: train.estimator: Input should be {allowed}, found "bernoulli"'
    line = refused([examples], "train.corpus.0.name=q", config="env.json")
    assert "corpus 'q' is unknown; known: " in line and line.endswith(", plugin:NAME")


BASE = "import torch, uiollms\nfrom dataclasses import dataclass\n"
MADE = (
    BASE
    + """
@dataclass(frozen=True)
class Made(uiollms.Estimator):
    def weight_matrix(self, num_chunks, rng):
        return {weights}

class Plugin(uiollms.EstimatorPlugin):
    def make_estimator(self, S):
        return {estimator}
"""
)
GOOD_WEIGHTS = "torch.ones(num_chunks, num_chunks, dtype=torch.float64).tril(-1)"


@pytest.mark.parametrize(
    "weights, estimator, fault",
    [
        ("None", "S", "make_estimator returned int, expected an Estimator"),
        ("[]", "Made()", "weight_matrix returned list, not a Tensor"),
        (
            "torch.ones(4, 4)",
            "Made()",
            "weights of 4 chunks are float32 [4, 4], expected float64 [4, 4]",
        ),
        (
            "torch.ones(3, 3, dtype=torch.float64).tril(-1)",
            "Made()",
            "weights of 4 chunks are float64 [3, 3], expected float64 [4, 4]",
        ),
        (
            "torch.ones(4, 4, dtype=torch.float64).tril()",
            "Made()",
            "weights must be finite, and zero on and above the diagonal",
        ),
        (
            "torch.full((4, 4), float('nan'), dtype=torch.float64).tril(-1)",
            "Made()",
            "weights must be finite, and zero on and above the diagonal",
        ),
    ],
)
def test_weights_of_another_form_are_refused(workspace, weights, estimator, fault):
    code = MADE.format(weights=weights, estimator=estimator)
    offer(workspace / "made", "estimators", {"own": "made:Plugin"}, code)
    line = refused([workspace / "made"], "train.estimator=plugin:own", config="env.json")
    assert line.startswith(f"env.json: train.estimator: plugin:own: {fault}")


def test_a_name_of_this_package_and_a_name_of_two_packages_are_refused(shelf, examples):
    code = MADE.format(weights=GOOD_WEIGHTS, estimator="Made()")
    names = {"uio": "made:Plugin", "bernoulli": "made:Plugin"}
    offer(shelf / "made", "estimators", names, code)
    made = shelf / "made"
    line = refused([made], "train.estimator=plugin:uio", config="env.json")
    assert "plugin:uio of made 1.0: this package has a 'uio' itself" in line
    line = refused([made, examples])
    assert (
        "plugin:bernoulli is offered by made 1.0 and uiollms-bernoulli 0.1.0; uninstall one" in line
    )
    offer(shelf / "corpora", "corpora", {"sotu": "made:Plugin"}, code)
    line = refused([shelf / "corpora"], "train.corpus.0.name=plugin:sotu", config="env.json")
    assert "plugin:sotu of made 1.0: this package has a 'sotu' itself" in line


def test_a_broken_plugin_stops_only_the_runs_that_use_it(workspace):
    broken = "open('imported', 'w').close()\nimport nothing_of_this_name"
    offer(workspace / "made", "estimators", {"own": "made:Plugin"}, broken)
    line = refused([workspace / "made"], "train.estimator=plugin:own", config="env.json")
    assert line == (
        "env.json: train.estimator: plugin:own of made 1.0: made:Plugin cannot be imported "
        "(ModuleNotFoundError: No module named 'nothing_of_this_name'); mend or update the package"
    )
    (workspace / "imported").unlink()
    code, printed = run([workspace / "made"], *TRAIN, "--set=train.tasks=[]")
    assert code == 0 and not (workspace / "imported").exists(), printed


def test_a_class_of_another_kind_is_refused(workspace):
    offer(workspace / "made", "tasks", {"own": "made:Plugin"}, MADE.format(weights=0, estimator=0))
    change = "train.corpus.0.task=plugin:own"
    assert (
        "plugin:own of made 1.0: made:Plugin is not derived from uiollms.TaskPlugin, as the entry "
        "points of the group uiollms.tasks must be"
    ) in refused([workspace / "made"], change, config="env.json")


FAULTY = (
    BASE
    + """
class Answers(uiollms.TaskPlugin):
    accepts = ("question answering",)

class Task(uiollms.TaskPlugin):
    returned: str = "none"

    def make_sample(self, document, tokenizer, chunk_size, length, rng):
        ids = tokenizer(document.text, return_tensors="pt").input_ids[0, :length]
        return {
            "none": None,
            "wide": uiollms.Sample.document(ids, 2 * chunk_size),
            "copy": uiollms.Sample.copy(ids[:32], chunk_size),
        }[self.returned]
"""
)


def test_samples_of_another_form_are_refused(workspace):
    entries = {"answers": "made:Answers", "own": "made:Task"}
    offer(workspace / "made", "tasks", entries, FAULTY)
    made = [workspace / "made"]
    for change, where in (("corpus.0.task", "corpus[0]"), ("tasks.0.task_type", "tasks[0]")):
        # Corpora of plain text alone; the documents of files: may have any task.
        names = ('train.corpus.0.name="stdlib.train"', 'train.tasks.0.task_name="stdlib.test"')
        line = refused(made, f"train.{change}=plugin:answers", *names, config="env.json")
        assert line.startswith(f"env.json: train.{where}") and "plugin:answers" in line
        assert "has documents for language modeling" in line
        assert "takes documents for question answering" in line
    evaluate = ("test.py", "--env_conf", "env.json", "--use_env_conf_tasks")
    evaluate += ("--set=model.save_ckp=null", "--set=train.tasks.0.task_type=plugin:own")
    for returned, fault in {
        "none": "book0.txt: Task.make_sample returned NoneType, expected a Sample",
        "wide": "book0.txt: Task.make_sample returned chunks of 32 tokens, expected chunk_size 16",
        "copy": "book0.txt: plugin:own decodes from memory alone, which cannot be compared with raw",
    }.items():
        option = f"--set=train.tasks.0.task_options.returned={returned}"
        code, printed = run(made, *evaluate, option)
        assert code == 2 and fault in printed, printed
    code, printed = run(made, *evaluate, option, '--set=train.tasks.0.compare=["shuffled"]')
    assert code == 0, printed


def test_a_corpus_that_is_no_sequence_is_refused(workspace):
    code = BASE + "class Own(uiollms.CorpusPlugin):\n    def open(self):\n        return 'a text'\n"
    offer(workspace / "made", "corpora", {"own": "made:Own"}, code)
    code, printed = run([workspace / "made"], "data", "--sample", "plugin:own")
    assert code == 2
    assert printed.strip() == (
        "plugin:own of made 1.0: open() returned str, expected a sequence of Document"
    )


# ---- the examples --------------------------------------------------------------------------------


def test_the_examples_compute_what_they_describe(shelf, examples):
    """In a child, which alone imports them."""

    def check() -> int:
        sys.path.insert(0, str(examples))
        from uiollms_bernoulli import Bernoulli
        from uiollms_distant import Distant
        from uiollms_epub import Epub

        # The expectation over all outcomes of the kept memories is the exact gradient's matrix.
        class Draws:
            def __init__(self, outcome):
                self.outcome = iter(outcome)

            def random(self):
                return next(self.outcome)

        mean = torch.zeros(4, 4, dtype=torch.float64)
        estimator = Bernoulli(keep=0.25).make_estimator(S=2)
        for kept in itertools.product([True, False], repeat=4):
            probability = 0.25 ** sum(kept) * 0.75 ** (4 - sum(kept))
            drawn = estimator.weight_matrix(4, Draws([0.1 if k else 0.5 for k in kept]))
            mean += probability * drawn
        exact = torch.ones(4, 4, dtype=torch.float64).tril(-1)
        # 16 products and sums in float64
        assert torch.allclose(mean, exact, rtol=1e-12, atol=0), mean

        class Tokenizer:
            def __call__(self, text, return_tensors):
                ids = torch.tensor([[int(word) for word in text.split()]])
                return type("Encoding", (), {"input_ids": ids})

        from uiollms import Document

        document = Document(" ".join(map(str, range(14))), "numbers")
        sample = Distant(gap=1).make_sample(document, Tokenizer(), 4, 100, random.Random(0))
        assert sample.chunks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert [row.input_ids.tolist() for row in sample.rows] == [[8, 9, 10, 11], [12, 13]]
        assert [list(row.memories) for row in sample.rows] == [[0], [0, 1]]
        assert [row.targets.tolist() for row in sample.rows] == [[9, 10, 11, 12], [13, -100]]
        assert sum(row.token_weights[row.scored].sum().item() for row in sample.rows) == 1.0
        short = Distant(gap=3).make_sample(document, Tokenizer(), 4, 100, random.Random(0))
        assert short.rows == () and len(short.chunks) == 0

        write_book(Path("a.epub"), ("One &amp; only", "A  line.<br/>Another."), ("Two", "x" * 20))
        (book,) = Epub(files="a.epub").open()
        assert book.text == "One & only\nA line.\nAnother.\n\nTwo\n" + "x" * 20
        (book,) = Epub(files="a.epub", min_characters=25).open()
        assert book.text == "One & only\nA line.\nAnother."
        return 0

    assert run_forked(check, output="printed.txt") == 0, Path("printed.txt").read_text()
    assert os.environ.get("PYTHONPATH", "").find(str(examples)) == -1
