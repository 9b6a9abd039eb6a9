"""The measurements of a training step (gradient norms of each part, tokens, memory), their names in
TensorBoard, and reading metrics.jsonl."""

import json
import math

import pytest
import torch
from conftest import make_model, random_ids

from uiollms import ConfigError
from uiollms.data.sample import Sample
from uiollms.runs.metrics import machine_use, peak_resident, read_metrics, scalars
from uiollms.training.optimizer import gradient_norms
from uiollms.training.step import gradient_step


def test_gradient_norms_by_part():
    model = make_model()
    gradient_step(model, Sample.language_modeling(random_ids(30), 8))
    squares = {"encoder_lora": 0.0, "decoder_lora": 0.0, "token_embeddings": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = (
                "token_embeddings"
                if "token" in name
                else "encoder_lora"
                if "encoder" in name
                else "decoder_lora"
            )
            squares[part] += float((parameter.grad**2).sum())
    assert gradient_norms(model) == pytest.approx(
        {part: math.sqrt(s) for part, s in squares.items()}
    )
    assert min(squares.values()) > 0
    model.zero_grad()
    assert set(gradient_norms(model).values()) == {0.0}


def test_tokens_of_a_sample():
    """A plain text counts each token once under both protocols, and so does a copy, although it
    reads each chunk again."""
    ids = random_ids(30)
    assert [Sample.language_modeling(ids, 8).num_tokens, Sample.document(ids, 8).num_tokens] == [
        30,
        30,
    ]
    assert Sample.copy(ids[:8], 8).num_tokens == 8


def test_machine_use():
    held = torch.ones(2**26)  # 256 MiB
    use = machine_use(600, 2.0)
    assert use["tokens_per_second"] == 300 and use["resident_gib"] * 2**30 == pytest.approx(
        peak_resident(), rel=0.1
    )
    # torch alone takes more than 64 MiB; the unit is right
    assert held.nbytes + 2**26 < peak_resident() < 2**40


def test_names_in_tensorboard():
    step = dict(
        iteration=3,
        seconds=1.0,
        nll=2.5,
        lr=1e-3,
        grad_norm=None,
        grad_norms=dict(encoder_lora=0.5),
        tokens=9,
    )
    assert dict(scalars(step | {"machine": {"resident_gib": 1.5}}, "document")) == {
        "train/nll/document": 2.5,
        "train/lr": 1e-3,
        "train/grad_norm/encoder_lora": 0.5,
        "train/resident_gib": 1.5,
    }
    numbers = {
        "perplexity": 20.0,
        "interval_95": [19.0, 21.0],
        "by_position": [{"start": 1, "nll": 3.0}],
    }
    text = dict(
        task="a/b c",
        task_type="perplexity",
        protocol="paper",
        truncation=100,
        memory=numbers,
        recovered=None,
    )
    copy = dict(
        task="d",
        task_type="auto encoding",
        protocol=None,
        truncation=None,
        window={"bleu4": 4.0},
        mean=2.0,
    )
    assert dict(scalars(dict(iteration=3, seconds=1.0, eval=[text, copy]), "document")) == {
        "eval/0.perplexity.paper.a_b_c.100/memory/perplexity": 20.0,
        "eval/1.auto_encoding.d/window/bleu4": 4.0,
        "eval/1.auto_encoding.d/mean": 2.0,
    }


def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path):
    """The cut may follow an inner brace, or lie within a character."""
    whole = '{"iteration": 1, "seconds": 1, "eval": [{"memory": {"nll": 2.5}}], "skipped": ["b\u00fccher.txt"]}'.encode()
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(whole)):
        path.write_bytes(whole + b"\n" + whole[:cut])
        assert read_metrics(tmp_path) == [json.loads(whole)], whole[:cut]
    path.write_bytes(whole + b"\n" + whole)
    assert len(read_metrics(tmp_path)) == 2, "only the line break was lost"


@pytest.mark.parametrize("line", [b'{"iteration": 1', b"[1]", b"\xff"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    good = b'{"iteration": 1, "seconds": 1}'
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(ConfigError, match="metrics.jsonl: line 2 is no JSON object"):
        read_metrics(tmp_path)
