"""The study of what memory saves beside the raw context, on the tiny model."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, random_ids
from torch.nn.functional import cross_entropy

from uiollms.build import load_memory_lm
from uiollms.cli.study import main
from uiollms.cli.study_savings import join_documents
from uiollms.config.load import load_env_config
from uiollms.evaluation.scoring import score
from uiollms.files.errors import ConfigError
from uiollms.study.savings import STEPS, measure_context

OPTIONS = ["--env_conf", "env.json", "--corpus", "files:book*.txt", "--out", "s", "--quiet"]


def test_bytes_are_those_of_the_tensors(workspace):
    """Memory vectors are L x [C, m, D] and keys and values 2L x [H, slots, K], float32. 128
    positions: the raw context of 128 tokens is past them, with its new tokens."""
    main(["savings", *OPTIONS, "--lengths", "64", "128", "--repeats", "2"])
    found = json.loads(Path("s/results.json").read_text())
    model, _ = load_memory_lm(load_env_config("env.json"), "env.json")
    base, (l, m) = model.base.config, model.memory_config.size
    assert (found["setting"]["chunk_size"], found["setting"]["num_memory"]) == (l, m)
    rows = {(row["tokens"], row["mode"]): row for row in found["rows"]}
    assert len(rows) == 4
    heads, size = base.num_key_value_heads, model.base.model.layers[0].self_attn.head_dim
    for (tokens, mode), row in rows.items():
        slots = tokens // l * m if mode == "memory" else tokens
        read = 2 * base.num_hidden_layers * heads * slots * size * 4
        kept = base.num_hidden_layers * slots * base.hidden_size * 4 if mode == "memory" else read
        assert row["slots"] == slots
        assert row["read_mib"] * 2**20 == read
        assert row["kept_mib"] * 2**20 == kept
        assert min(row["context_s"], row["first_s"], row["token_ms"]) > 0
        assert ("past the base's 128 positions" in row["note"]) == ((tokens, mode) == (128, "raw"))
    assert Path("s/plot.png").stat().st_size > 10_000 and Path("s/table.md").exists()
    main(["savings", *OPTIONS, "--lengths", "64", "128", "--longest_raw", "64"])
    rows = json.loads(Path("s/results.json").read_text())["rows"]
    measured = [(row["tokens"], row["mode"]) for row in rows]
    assert measured == [(64, "memory"), (64, "raw"), (128, "memory")]


@pytest.mark.parametrize("mode, recent", [("memory", 0), ("memory", 4), ("raw", 0)])
def test_the_tokens_that_are_timed_are_predicted_as_ever(workspace, monkeypatch, mode, recent):
    """Their logits are those behind the model's own scores; the chunk's first token has none."""
    model, tokenizer = load_memory_lm(load_env_config("env.json"), "env.json")
    model.memory_config = model.memory_config.model_copy(update={"recent_tokens": recent})
    l = model.memory_config.chunk_size
    ids = join_documents("files:book*.txt", tokenizer, 4 * l)
    expected = score(model, ids, mode=mode).nll[-(l - 1) :]
    found, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: found.append(logits(hidden)))
    measure_context(model, ids[:-1], 3 * l, mode)
    nll = cross_entropy(torch.cat(found)[:, 0], ids[3 * l + 1 :], reduction="none")
    assert torch.allclose(nll, expected.float(), atol=1e-4)  # float32, other batches


def test_memory_vectors_and_what_is_read_of_them_have_their_own_sizes():
    """Here keys and values of a slot, 2 x 2 heads x 16 numbers, are twice its vector of 32."""
    model = make_model("qwen3", torch.float32)
    row = measure_context(model, random_ids(4 * 8 + 2), 4 * 8, "memory")
    slots, layers = 4 * 2, model.base.config.num_hidden_layers
    assert row["slots"] == slots
    assert row["kept_mib"] * 2**20 == layers * slots * 32 * 4
    assert row["read_mib"] * 2**20 == layers * slots * 64 * 4


@pytest.mark.parametrize(
    "lengths, message",
    [
        (["65"], "65 is not a multiple of the chunk size"),
        (["1600000"], "1600000 exceeds the capacity"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_without_the_model(
    workspace, monkeypatch, lengths, message
):
    monkeypatch.setattr("uiollms.cli.study_savings.load_study_model", None)
    with pytest.raises(ConfigError, match=message):
        main(["savings", *OPTIONS, "--lengths", *lengths])


def test_a_corpus_that_is_too_short_is_refused(workspace):
    Path("short.txt").write_text("one two three")
    with pytest.raises(ConfigError, match=f"the corpus has .* tokens, {64 + STEPS + 1} are needed"):
        main(
            [
                "savings",
                *OPTIONS[:2],
                "--corpus",
                "files:short.txt",
                "--out",
                "s",
                "--lengths",
                "64",
            ]
        )
