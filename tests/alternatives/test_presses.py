"""Runs the worker of presses with a stand-in for kvpress, and with kvpress itself where
`make setup-kvpress` has installed it."""

import json
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import MEMORY, make_model, random_ids, relative_error
from rich.console import Console
from transformers import DynamicCache

from uiollms.alternatives import press_worker, presses
from uiollms.alternatives.presses import FOLDER, Presses, PressFailure
from uiollms.build import load_memory_lm
from uiollms.config.corpora import TaskEntry
from uiollms.config.load import load_env_config
from uiollms.config.modes import parse_press
from uiollms.data.sample import Sample
from uiollms.evaluation.evaluator import Evaluation
from uiollms.evaluation.results import TaskSummary
from uiollms.evaluation.saved_results import load_token_nlls, save_token_nlls
from uiollms.evaluation.scoring import losses_of, pressed_hidden, token_losses
from uiollms.files.folders import shipped_dir
from uiollms.model.memory_lm import MemoryLM
from uiollms.reports.tables import print_results, rows_of

L, M = MEMORY.chunk_size, MEMORY.num_memory
REAL = shipped_dir() / FOLDER / "bin" / "python"
STAND_IN = Path(__file__).with_name("stand_in")


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


@pytest.fixture
def tiny(workspace):
    """(model, tokenizer) of the tiny folder: chunks of 16 into 2 slots, 128 positions."""
    return load_memory_lm(load_env_config("env.json"), "env.json")


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """An interpreter whose kvpress is the stand-in. It drops the option -I, with which it would not
    read PYTHONPATH."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift\nPYTHONPATH="{STAND_IN}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("UIOLLMS_KVPRESS", str(python))
    return python


@pytest.fixture(params=["stand-in", "kvpress"])
def environment(request, monkeypatch):
    if request.param == "stand-in":
        return request.getfixturevalue("stand_in")
    if not REAL.exists():
        pytest.skip("needs make setup-kvpress")
    monkeypatch.setenv("UIOLLMS_KVPRESS", str(REAL))


def model_of(recent: int = 0) -> MemoryLM:
    config = MEMORY.model_copy(update=dict(recent_tokens=recent))
    return make_model("smollm2", torch.float32, config=config)


def knorm_hidden(base, context, slots, row, scored):
    """The slow twin: a whole cache, of which every head keeps the keys of the smallest norms."""
    cache = DynamicCache()
    if len(context):
        base.model(input_ids=context[None], past_key_values=cache)
    for layer in cache.layers if len(context) > slots else ():
        order = layer.keys.norm(dim=-1).sort(dim=-1).indices[..., :slots].sort(-1).values
        keep = order[..., None].expand(-1, -1, -1, layer.keys.shape[3])
        layer.keys, layer.values = layer.keys.gather(2, keep), layer.values.gather(2, keep)
    positions = torch.arange(len(context), len(context) + len(row))[None]
    output = base.model(input_ids=row[None], past_key_values=cache, position_ids=positions)
    return output.last_hidden_state[0, scored]


@torch.no_grad()
@pytest.mark.parametrize("recent", [0, 3])
def test_a_press_keeps_as_many_slots_as_memory_has(environment, recent):
    """Every row's context becomes n * m slots, at the positions of its tokens. Float32 has relative
    errors of 6e-8 an operation, and two versions of transformers sum in another order: 1e-4."""
    model, ids = model_of(recent), random_ids(5 * L + 3)
    samples = [Sample.document(ids, L), Sample.later(random_ids(3 * L, seed=1), L)]
    found = Presses(model, NoTokenizer()).run("knorm", samples, measured=True)
    for sample, hidden in zip(samples, found.hidden, strict=True):
        expected = []
        for t, row in enumerate(sample.with_recent(recent).rows):
            context = sample.chunks[:t].flatten()[: t * L - row.recent]
            if len(row.scored):
                expected.append(knorm_hidden(model.base, context, t * M, row.input_ids, row.scored))
        assert relative_error(hidden, torch.cat(expected)) < 1e-4
    cost = found.cost
    assert (cost.slots, cost.context, cost.process) == (5 * M, 5 * L - recent, "kvpress")
    assert cost.compress_seconds > 0 and cost.token_seconds > 0 and cost.peak_bytes >= 0
    nll = losses_of(model, samples[0], pressed_hidden(model, samples[0], found.hidden[0]))[1]
    raw = token_losses(model, samples[0], "raw")[1]
    assert nll.shape == raw.shape
    assert relative_error(nll[: L - 1], raw[: L - 1]) < 1e-4  # no context before chunk 0
    assert relative_error(nll, raw) > 1e-3


@torch.no_grad()
def test_a_press_that_masks_reports_its_mean_and_no_memory(stand_in):
    model, sample = model_of(), Sample.later(random_ids(3 * L), L)
    found = Presses(model, NoTokenizer()).run("press:MaskingPress", [sample], measured=True)
    # 3 heads of 16 keys, of which int(48 * 12 / 16) = 36, less one for rounding, are dropped.
    assert found.cost.slots == pytest.approx(16 - 35 / 3)
    assert found.cost.peak_bytes is None


@pytest.mark.parametrize(
    "name, arguments, why",
    [
        ("GreedyPress", {}, "the press kept 3 of 8 slots, 2 were to be kept"),
        ("NoPress", {}, "kvpress has no NoPress; it has DyingPress, GreedyPress, KnormPress"),
        ("KnormPress", {"window": 3}, "unexpected keyword argument 'window'"),
    ],
)
def test_presses_that_do_not_fit_are_refused(tiny_folder, monkeypatch, name, arguments, why):
    """In this process, because each of its own takes seconds to start."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    base = dict(base=str(tiny_folder), dtype="float32", device="cpu")
    model = press_worker.Model(base | dict(press=name, arguments=arguments))
    with pytest.raises((ValueError, TypeError), match=why), torch.no_grad():
        model.compress(random_ids(L), M)
    monkeypatch.delitem(sys.modules, "kvpress")


def test_a_process_that_fails_gives_its_last_line(stand_in):
    why = "the process of kvpress failed: TypeError: .* unexpected keyword argument 'window'"
    sample = Sample.document(random_ids(2 * L), L)
    with pytest.raises(PressFailure, match=why):
        Presses(model_of(), NoTokenizer()).run("press:KnormPress(window=3)", [sample], False)


def test_a_base_that_cannot_be_written_is_reported(stand_in, monkeypatch):
    model, sample = model_of(), Sample.document(random_ids(2 * L), L)

    def fail(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(model.base, "save_pretrained", fail)
    found = Presses(model, NoTokenizer())
    for _ in range(2):
        with pytest.raises(PressFailure, match="could not be written for kvpress: No space left"):
            found.run("knorm", [sample], False)


def test_the_environment_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presses, "shipped_dir", lambda: tmp_path / "checkout")
    monkeypatch.delenv("UIOLLMS_KVPRESS", raising=False)
    with pytest.raises(PressFailure, match="run make setup-kvpress, or set UIOLLMS_KVPRESS"):
        presses.find_python()
    python = tmp_path / "checkout" / FOLDER / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert presses.find_python() == python
    monkeypatch.setenv("UIOLLMS_KVPRESS", str(tmp_path / "other"))
    with pytest.raises(PressFailure, match="other', which is no environment and no Python"):
        presses.find_python()
    (tmp_path / "other" / "bin").mkdir(parents=True)
    (tmp_path / "other" / "bin" / "python").touch()
    assert presses.find_python() == tmp_path / "other" / "bin" / "python"


def test_an_evaluation_reports_costs_and_what_was_not_scored(tiny, stand_in, tmp_path):
    """Memory and modes of this process have costs, and so has a press. A press that fails is
    reported, and the rest runs."""
    model, tokenizer = tiny
    dotted = "press:KnormPress()"
    compare = ("window", "raw", "recent", "streaming", "pooled", dotted, "press:DyingPress")
    task = TaskEntry(
        task_type="perplexity",
        task_name="files:book*.txt",
        num_instance=2,
        truncation=60,
        compare=compare,
        costs=True,
    )
    (scores,) = Evaluation(model, tokenizer, [task]).run()
    result = scores.summarize()
    size, slots = model.memory_config.chunk_size, model.memory_config.num_memory
    context = 59 // size * size
    n = context // size * slots
    expected = dict.fromkeys(("memory", "recent", "streaming", "pooled", dotted), n)
    expected |= dict(window=0, raw=context)
    assert {mode: cost.slots for mode, cost in scores.costs.items()} == expected
    assert {cost.context for cost in scores.costs.values()} == {context}
    assert scores.costs[dotted].process == "kvpress" and scores.costs["raw"].process == "uiollms"
    why = "SIGKILL ended the process of kvpress; the machine may lack memory"
    written = json.loads(json.dumps(result.as_json()))
    assert written["not_scored"] == [{"mode": "press:DyingPress", "why": why}]
    assert written[dotted]["documents"] == 2 and written[dotted]["cost"]["slots"] == n
    read = TaskSummary.from_json(written)
    assert read.failures == result.failures
    assert json.loads(json.dumps(read.as_json())) == written
    rows = {row.mode: row for row in rows_of(read)}
    assert rows["press:DyingPress"].also == f"not scored: {why}"
    assert rows[dotted].slots == str(n) and rows[dotted].a_token.endswith(" ms")
    assert rows["raw context"].memory.endswith(" MiB")
    console = Console(width=80, file=StringIO())
    print_results([read], console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    start = next(i for i, line in enumerate(lines) if "compressed in" in line)
    (cost,) = (line for line in lines[start:] if line.strip().startswith(dotted + " "))
    assert " MiB " in cost and cost.strip().endswith(" ms")
    for broken in (3, ["raw"], [{"mode": "raw", "why": 3}]):
        with pytest.raises(ValueError, match="not_scored is"):
            TaskSummary.from_json(written | dict(not_scored=broken))
    save_token_nlls([scores], tmp_path / "nll.safetensors")
    assert load_token_nlls(tmp_path / "nll.safetensors")[0].scores.keys() == scores.scores.keys()


def test_without_kvpress_the_other_modes_are_scored(tiny, monkeypatch, tmp_path):
    model, tokenizer = tiny
    monkeypatch.setenv("UIOLLMS_KVPRESS", str(tmp_path / "absent"))
    fields = dict(task_name="files:book*.txt", num_instance=2)
    text = TaskEntry(task_type="perplexity", truncation=60, compare=("raw", "snapkv"), **fields)
    # 160 tokens are longer than the 128 positions.
    compare = ("raw", "bm25", "snapkv")
    passkey = TaskEntry(task_type="passkey", truncation=160, compare=compare, **fields)
    first, second = Evaluation(model, tokenizer, [text, passkey]).run()
    assert first.scores.keys() == {"memory", "raw"} and not first.costs
    assert "which is no environment" in first.failures["snapkv"]
    assert second.scores.keys() == {"memory", "bm25"}
    longer = "the context is longer than the base's positions"
    assert second.failures == dict(raw=longer, snapkv=longer)


def test_modes_of_a_config():
    assert parse_press("snapkv") == ("SnapKVPress", {})
    assert parse_press("press:TOVAPress") == ("TOVAPress", {})
    found = parse_press("press:SnapKVPress(window_size=32, kernel_size=5)")
    assert found == ("SnapKVPress", {"window_size": 32, "kernel_size": 5})
    fields = dict(task_type="perplexity", task_name="sotu.test", num_instance=2)
    for mode, message in (
        ("press:SnapKVPress(32)", "its arguments are not numbers with names"),
        ("press:SnapKVPress(window=x)", "its arguments are not numbers with names"),
        ("press:SnapKVPress(window=", "is no mode and no press: expected press:NAME"),
        ("press:KnormPress(compression_ratio=0.5)", "compression_ratio is computed from"),
        ("snapKV", "mode 'snapKV' is unknown; allowed are window, raw, .* and press:NAME"),
        ("bm25", "bm25 chooses passages by a question, perplexity has none"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskEntry(**fields, compare=(mode,))
    with pytest.raises(ValueError, match="compare: knorm: auto encoding decodes from memory alone"):
        TaskEntry(**fields | dict(task_type="auto encoding"), compare=("knorm",))
