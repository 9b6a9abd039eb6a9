"""The README as a user follows it: its sections Download Dataset, Pretrain and Benchmark command
by command, on a tiny Llama and tiny files in the tarball's layout; its snippet as printed."""

import json
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from conftest import SHAPE
from test_commands import ROOT, call
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from uiollms import MemoryConfig, MemoryLM
from uiollms.config.corpora import TaskEntry
from uiollms.config.load import load_env_config, load_tasks
from uiollms.files.folders import run_folder
from uiollms.weights.base_models import KNOWN_SHAPES

README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = "The clocks of the town were striking, and nobody knew which hour it was. "


def section(heading: str) -> str:
    """What stands under a heading, up to the next one of the same level or above."""
    level, _, _ = heading.partition(" ")
    found = re.split(rf"^#{{1,{len(level)}}} ", README, flags=re.MULTILINE)
    (text,) = [part for part in found if part.startswith(heading.removeprefix(f"{level} ") + "\n")]
    return text


def commands(heading: str) -> list[str]:
    """The lines of a section's first bash block."""
    block = re.search(r"```bash\n(.*?)```", section(heading), re.DOTALL)
    return [line for line in block[1].splitlines() if line]


def json_lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def clone(tmp_path, tiny_folder, monkeypatch) -> Path:
    """A clone called uiollms; in its 32x.json and test.json sizes, names and devices differ."""
    folder = tmp_path / "uiollms"
    files = (
        "train.py",
        "test.py",
        "32x.json",
        "test.json",
        "config/32x.json",
        "raw_data/README.md",
    )
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    change(folder / "config/32x.json", num_memory=2, chunk_size=64, lora_rank=2, lora_alpha=8)
    config = json.loads((folder / "32x.json").read_text())
    config["model"] |= dict(model_name=str(tiny_folder), device_map="cpu")
    config["train"] |= dict(train_iters=6, save=3, eval=6, max_lr=0.03)
    for entry, share in zip(config["train"]["corpus"], (0.4, 0.6), strict=True):
        entry["partition"] = share
    tests = json.loads((folder / "test.json").read_text())
    for entry in [*config["train"]["corpus"], *config["train"]["tasks"], *tests["tasks"]]:
        if entry["truncation"]:  # the shipped 4,096 .. 99,328 become 66 .. 1,600
            entry["truncation"] = entry["truncation"] * 1600 // 99328
        if "num_instance" in entry:
            entry["num_instance"] = 2
    change(folder / "32x.json", **config)
    change(folder / "test.json", **tests)

    hub = tmp_path / "hub/emozilla/pg19"
    hub.mkdir(parents=True)
    books = [{"text": f"Book {i}. {WORDS * 30}"} for i in range(3)]
    (hub / "test.jsonl").write_text(json_lines(*books))
    monkeypatch.setenv("UIOLLMS_HUB_DIR", str(tmp_path / "hub"))
    monkeypatch.setenv("UIOLLMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UIOLLMS_RAW_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.chdir(tmp_path)
    return folder


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tarball(path: str) -> None:
    """What wget would have fetched: the two files that the README names, and an unread one."""
    for name, row in {
        "pretrain/redpajama-sample.json": {"text": WORDS * 20},
        "finetune/longalpaca.json": {"input": WORDS * 20, "output": "Seven."},
        "finetune/booksum.json": {"input": "not", "output": "read"},
    }.items():
        file = Path("tar/activation-beacon", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json_lines(*[row] * 3))
    with tarfile.open(path, "w:gz") as file:
        file.add("tar/activation-beacon", "activation-beacon")


def follow(heading: str, root: Path, monkeypatch) -> None:
    """Runs a section's commands one after another, from the folder in which the clone lies."""
    monkeypatch.chdir(root.parent)
    for line in commands(heading):
        words = shlex.split(line)
        if words[0] == "cd":
            monkeypatch.chdir(words[1])
        elif words[0] == "wget":
            tarball(words[words.index("-O") + 1])
        elif words[0] == "python":
            assert call(*words[1:]) == 0
        else:
            subprocess.run(words, check=True, capture_output=True)


def numbers(path: str = "runs/32x/test.json") -> list[tuple]:
    results = json.loads(Path(path).read_text())["results"]
    return [(r["task"], r["truncation"], r["documents"], r["mean"]) for r in results]


def test_the_authors_readme_followed_step_by_step(clone, monkeypatch, capsys):
    follow("## Download Dataset", clone, monkeypatch)
    raw = clone / "raw_data"
    found = {path.name for path in raw.glob("*.json*")}
    assert found == {"redpajama-sample.json", "longalpaca.json"}

    monkeypatch.chdir(clone)
    assert call("train.py", "--env_conf", "32x.json") == 2
    (said,) = capsys.readouterr().err.splitlines()  # the file that is not in the tarball is missing
    missing = "raw_data/redpajama_book_sample.jsonl is missing"
    assert said.startswith(f"32x.json: train.corpus[0].name: {missing}")
    (raw / "redpajama_book_sample.jsonl").write_text(json_lines(*[{"text": WORDS * 40}] * 3))

    follow("## Pretrain", clone, monkeypatch)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"trained parameters [\d.]+ M, frozen [\d.]+ M in torch\.bfloat16", first)
    assert last == "metrics and curve.png are in runs/32x, weights in ckp/32x.pth"
    assert {"metrics.jsonl", "curve.png"} <= {path.name for path in Path("runs/32x").iterdir()}
    saved = torch.load("ckp/32x.pth", weights_only=True)
    assert isinstance(saved, list)  # the authors' format
    assert all(isinstance(tensor, torch.Tensor) for tensor in saved)
    logged = [json.loads(line) for line in Path("runs/32x/metrics.jsonl").read_text().splitlines()]
    (trained,) = [entry["eval"] for entry in logged if "eval" in entry]

    follow("### Language Modeling", clone, monkeypatch)
    assert capsys.readouterr().out.splitlines()[0] == "weights: ckp/32x.pth, base in torch.bfloat16"
    tasks = load_tasks("test.json")
    assert [found[:3] for found in numbers()] == [(t.task_name, t.truncation, 2) for t in tasks]
    assert len(tasks) == 5
    assert json.loads(Path("runs/32x/test.json").read_text())["weights"] == "ckp/32x.pth"

    own = ["--env_conf", "32x.json", "--use_env_conf_tasks"]
    assert "`--use_env_conf_tasks`" in section("### Language Modeling")
    assert call("test.py", *own) == 0
    (found,) = numbers()
    assert found[:3] == ("pg19.test.1m", 1600, 2)
    # What training scored at its end: the .pth holds the same float32 weights.
    assert found[3] == pytest.approx(trained[0]["mean"], rel=1e-6)
    assert call("test.py", *own, "--set=model.save_ckp=null", "--set=train.run_dir=untrained") == 0
    (untrained,) = numbers("untrained/test.json")
    assert abs(untrained[3] - found[3]) > 0.01 * found[3]


def test_the_readmes_task_is_one_that_32x_takes():
    block = re.search(r"```json\n(.*?)```", section("## Benchmark"), re.DOTALL)
    task = TaskEntry(**json.loads(block[1]))
    assert (task.task_type, task.task_name) == ("perplexity", "pg19.test.128k")
    assert (task.num_instance, task.truncation) == (100, 99_382)
    memory = MemoryConfig(**json.loads((ROOT / "config/32x.json").read_text()))
    positions = KNOWN_SHAPES["meta-llama/Llama-2-7b-chat-hf"].max_position_embeddings
    assert f"{memory.capacity(positions):,} tokens" in section("## Benchmark")
    assert task.truncation <= memory.capacity(positions)


def test_the_readmes_table_of_test_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = re.findall(r"^\| (`.*?) \| `(.*?)` \| (.*?) \|$", section("## Benchmark"), re.MULTILINE)
    told = {}
    for names, file, tasks in rows:
        told |= dict.fromkeys(re.findall(r"`(.*?)`", names), (file, tasks))
    assert told.keys() == {path.name for path in ROOT.glob("*.json")} - {"test.json"}
    for name, (file, tasks) in told.items():
        assert load_env_config(name).test == file
        lengths = re.findall(r"(?<![a-z\d,])\d[\d,]*\d", tasks)  # not pg19's
        assert lengths == [f"{task.truncation:,}" for task in load_tasks(file)]


def test_the_readme_names_the_folders_of_32x(monkeypatch):
    monkeypatch.chdir(ROOT)
    model = load_env_config("32x.json").model
    assert f"`{model.save_ckp}`" in section("## Pretrain")
    assert f"`{run_folder(None, model.save_ckp, '32x.json')}/`" in section("## Pretrain")


def test_the_readmes_sections_are_the_authors_in_their_order():
    headings = [heading.strip("# ") for heading in re.findall(r"^#+ .*$", README, re.MULTILINE)]
    authors = [
        "Experiment setup",
        "Download Dataset",
        "Pretrain",
        "Instructions on `32x.json` Config",
        "Benchmark",
        "Language Modeling",
        "Citation",
    ]
    places = [headings.index(heading) for heading in authors]
    assert places == sorted(places)
    assert commands("## Experiment setup") == [
        "conda env create -f environment.yaml",
        "conda activate uiollms",
    ]
    assert commands("## Pretrain") == ["cd uiollms", "python train.py --env_conf 32x.json"]
    assert commands("### Language Modeling") == ["cd uiollms", "python test.py --env_conf 32x.json"]
    hub = "https://huggingface.co/datasets/namespace-Pt/projects/resolve/main"
    tar = f"{hub}/activation-beacon.tar.gz?download=true"
    assert commands("## Download Dataset") == [
        "cd uiollms",
        f"wget {tar} -O ./raw_data/activation-beacon.tar.gz",
        "cd raw_data",
        "tar -xzvf activation-beacon.tar.gz",
        "cp activation-beacon/pretrain/redpajama-sample.json .",
        "cp activation-beacon/finetune/longalpaca.json .",
    ]
    instructions = section("### Instructions on `32x.json` Config")
    assert len(re.findall("^- ", instructions, re.MULTILINE)) == 5


def test_the_readmes_package_tree_exists():
    (tree,) = re.findall(r"```\nsrc/uiollms/\n(.*?)```", README, re.DOTALL)
    names = [name for line in tree.splitlines() for name in re.findall(r"\w+\.py|\w+/", line)]
    assert len(names) > 25
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "src" / "uiollms").rglob("*")}
    assert [name for name in names if name not in there] == []


def snippet() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return code


def test_the_readmes_snippet_runs_as_printed(tmp_path, tiny_folder, monkeypatch, capsys):
    """On a tiny model in the place of the shipped adapter, and a text as long as it can read."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    shape = LlamaConfig(**SHAPE | dict(vocab_size=259, max_position_embeddings=512))
    AutoModelForCausalLM.from_config(shape).save_pretrained("base")
    base = AutoModelForCausalLM.from_pretrained("base")
    model = MemoryLM(base, MemoryConfig(num_memory=4, chunk_size=32, lora_rank=2, lora_alpha=4))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.save_pretrained("adapters/smollm2-8x", tokenizer=tokenizer)
    Path("README.md").write_text(README[:1000])
    exec(compile(snippet(), "README.md", "exec"), {})
    *_, perplexity, losses = capsys.readouterr().out.splitlines()
    assert float(perplexity) > 1
    assert losses.startswith("tensor([")


@pytest.mark.slow
def test_the_readmes_snippet_runs_on_the_shipped_adapter(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(snippet(), "README.md", "exec"), {})
    perplexity = float(capsys.readouterr().out.splitlines()[-2])
    assert perplexity < 200  # of English text; chance is 49,152
