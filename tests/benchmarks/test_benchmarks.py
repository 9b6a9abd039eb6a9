"""Tests of the benchmarks: the FLOP count, the gradients of the baseline, and the whole command on
a tiny model."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import gradients, make_model, random_ids, worst_error
from torch.utils.flop_counter import FlopCounterMode

import uiollms
from uiollms import MemoryConfig, Sample
from uiollms.evaluation.scoring import score
from uiollms.training.estimators import window_from_draws

# benchmarks/ is not installed; it runs from the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.baseline import Baseline

from uiollms.planning.flops import Flops

MEMORY = MemoryConfig(num_memory=2, chunk_size=8, lora_rank=3, lora_alpha=6)


def matmul_flops(call) -> int:
    """Returns the FLOPs of the products outside attention, whose CPU kernel torch's counter does
    not count. The rotary embedding, which older versions of transformers write as a matrix
    product, is left out too."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    rotary = [
        sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if "Rotary" in name
    ]
    return counter.get_total_flops() - sum(rotary)


@pytest.mark.parametrize("length, S", [(16, 1), (27, 1), (43, 2), (45, 7)])
def test_the_baseline_gives_the_gradients_of_the_step(length, S):
    """The tolerance is 1e-10 in float64, as for every other twin of the step."""
    model, sample = make_model(), Sample.document(random_ids(length), 8)
    baseline, rng = Baseline(model), random.Random(length)
    draws = [rng.randint(0, c) for c in range(S, len(sample.rows))]
    loss = baseline.train_step(sample, S, draws)
    weights = window_from_draws(draws, S, True, len(sample.rows))
    result = uiollms.gradient_step(model, sample, weights=weights)
    found, expected = baseline.gradients(), gradients(model)
    found |= {name: torch.zeros_like(expected[name]) for name in expected.keys() - found.keys()}
    assert loss.item() == pytest.approx(result.losses.sum().item(), rel=1e-10)
    assert worst_error(found, expected) < 1e-10
    for name in ("encoder.layers.0.q_proj.lora_A", "decoder.layers.0.k_proj.lora_A"):
        assert found[name].abs().max() > 0


@pytest.mark.parametrize("whole", [False, True])
def test_the_baseline_gives_the_nll_of_score(whole):
    model, ids = make_model(), random_ids(43)
    baseline = Baseline(model)
    baseline.whole = whole
    found = baseline.score(Sample.document(ids, 8))
    torch.testing.assert_close(found, score(model, ids, "document").nll, rtol=1e-10, atol=0)


def test_the_whole_encoder_also_runs_its_last_layer_and_head():
    model = make_model()
    baseline, flops = Baseline(model), Flops.of(model)
    tokens = MEMORY.chunk_size + MEMORY.num_memory
    counts = []
    for baseline.whole in (False, True):
        counts.append(matmul_flops(lambda: baseline.encode(random_ids(MEMORY.chunk_size))))
    lora = flops.lora(tokens, flops.q) + flops.lora(tokens, flops.kv)
    last = flops.queries(tokens) + flops.keys_values(tokens) + lora + flops.head(tokens)
    assert counts[1] - counts[0] == last


def without_attention(flops: Flops) -> Flops:
    class Linear(Flops):
        def attention(self, pairs: int) -> int:
            return 0

    return Linear(**flops.__dict__)


@pytest.mark.parametrize("family", ["llama", "smollm2"])
def test_flops_of_forward_passes_equal_torchs_count(family):
    model = make_model(family)
    flops = without_attention(Flops.of(model))
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert matmul_flops(lambda: model.encode_layers(ids)) == flops.encoder_forward()
        memory = model.encode_layers(ids)
        assert matmul_flops(lambda: model.project(memory, [0])) == flops.project_forward()
        # The chunks are whole, because torch would count padding, which is not useful work.
        sample = Sample.document(random_ids(32), 8)
        counted = matmul_flops(lambda: score(model, random_ids(32), "document"))
        assert counted == flops.scoring(sample)


@pytest.mark.parametrize("family", ["llama", "smollm2"])
def test_flops_of_a_step_equal_torchs_count(family):
    """The step is the exact one of a document of one batch, which encodes nothing twice. torch
    computes more than the count in three ways. Memories are projected three times. The gradient of
    keys and values goes through LoRA's B twice (to its A and to the memories). In layer 0 of the
    encoder, ordinary tokens get a gradient that nothing reads."""
    model, sample = make_model(family), Sample.language_modeling(random_ids(24), 8)
    flops = without_attention(Flops.of(model))
    chunks = len(sample.chunks)
    unread = flops.keys_values(8) + flops.q_proj(8) + 2 * (2 * 8 * flops.rank * flops.hidden)
    twice = flops.layers * 2 * (2 * flops.slots * flops.rank * flops.kv)
    counted = matmul_flops(lambda: uiollms.gradient_step(model, sample, estimator="exact"))
    more = 2 * flops.project_forward() + twice + unread
    assert counted == flops.training(sample, chunks) + chunks * more


def test_flops_of_a_step_whose_slots_read_the_chunks_tokens():
    """The step is as above. Nothing before layer 0 is trained, so no unread gradient is
    computed."""
    model = make_model(config=MEMORY.model_copy(update={"slot_input": "last"}))
    sample = Sample.language_modeling(random_ids(24), 8)
    flops, chunks = without_attention(Flops.of(model)), len(sample.chunks)
    twice = flops.layers * 2 * (2 * flops.slots * flops.rank * flops.kv)
    counted = matmul_flops(lambda: uiollms.gradient_step(model, sample, estimator="exact"))
    more = 2 * flops.project_forward() + twice
    assert counted == flops.training(sample, chunks) + chunks * more
    assert Flops.of(model).attention(flops.slot_pairs) > 0
    full, learned = Flops.of(model), Flops.of(make_model())
    (_, queries, pairs), *_ = full.encoder_layers()
    below = full.keys_values(2) + full.q_proj(2) + 2 * (2 * 2 * full.rank * full.hidden)
    difference = learned.encoder_backward() - full.encoder_backward()
    assert difference == below + full.attention(pairs) // 2


def test_flops_with_recent_tokens_equal_torchs_count():
    """The counts are those of forward passes and of a step, as above. In the last layer torch also
    computes queries, outputs and MLPs of the recent tokens and their gradients, which nothing
    reads."""
    model = make_model(config=MEMORY.model_copy(update={"recent_tokens": 3}))
    flops, sample = without_attention(Flops.of(model)), Sample.document(random_ids(24), 8)
    with torch.no_grad():
        counted = matmul_flops(lambda: score(model, random_ids(24), "document"))
        # Rows without and with recent tokens are one batch, padded to the longer ones.
        padding = flops.layers * (flops.queries(3) + flops.keys_values(3))
        assert counted == flops.scoring(sample) + padding + 2 * flops.queries(3)
    plain = without_attention(Flops.of(make_model()))
    each = plain.layers * (flops.queries(3) + flops.keys_values(3)) - flops.queries(3)
    assert flops.scoring(sample) - plain.scoring(sample) == 2 * each
    back = (plain.layers - 2) * (flops.queries(3) + flops.keys_values(3)) + flops.keys_values(3)
    # In layer 0 only outputs and MLPs need gradients.
    back += flops.o_proj_mlp(3)
    assert flops.training(sample, 0) - plain.training(sample, 0) == 2 * (each + back)
    assert flops.generation(4) - flops.generation(0) == each // 8
    full, short = Flops.of(model), Flops.of(make_model())
    assert full.scoring(sample) > short.scoring(sample) + 2 * each


def test_flops_equal_a_computation_by_hand():
    """The sizes are D 4, q 4, kv 2, I 3, V 5, l 4, m 2 and r 1."""
    flops = Flops(layers=2, hidden=4, q=4, kv=2, intermediate=3, vocab=5, chunk=4, slots=2, rank=1)
    assert flops.slot_pairs == 2 + 4 + 2
    keys_values = 6 * 2 * (2 * 4 * 2)  # of 6 tokens
    queries_outputs_mlps = 2 * 2 * (2 * 4 * 4 + 3 * 4 * 3)  # of 2 slots
    lora = 2 * 2 * 8 + 6 * 2 * 6  # of q for 2 slots and of v for 6 tokens
    attention = 4 * 8 * 4  # of 8 pairs
    expected = keys_values + queries_outputs_mlps + lora + attention
    assert flops.encoder_forward() == expected
    # 3 tokens after one memory have 6 + 6 pairs. The head is computed for 2 of them.
    layer = 3 * 2 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 3) + 4 * 12 * 4
    assert flops.decoder_forward(3, 1, 2) == 2 * layer + 2 * 2 * 4 * 5


def test_make_bench_writes_all_tables_for_a_tiny_model(tmp_path, capsys):
    from benchmarks.__main__ import main

    main(["--model", "tiny", "--quick", "--repeats", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "bench.json").read_text())
    tables = report["models"]["tiny"]["tables"]
    assert list(tables) == [
        "against the baseline",
        "training against length",
        "scoring against length",
        "training against S",
        "training against chunk_batch",
        "generation against past",
    ]
    assert all(0 < row["utilisation"] < 1 for name in list(tables)[:3] for row in tables[name])
    assert (tmp_path / "bench.png").stat().st_size > 0
    assert (tmp_path / "bench.md").read_text().strip() == capsys.readouterr().out.strip()
    with pytest.raises(SystemExit):
        main(["--what", "speed"])


def test_memory_is_measured_in_a_new_process():
    from benchmarks.measure import in_new_process

    case = {"model": "tiny", "device": "cpu", "pass": "baseline uio", "length": 64}
    case |= {"S": 2, "chunk_batch": 4}
    result = in_new_process(case)
    assert result["seconds"] > 0 and result["bytes"] >= 0
    with pytest.raises(RuntimeError, match="KeyError"):
        in_new_process(case | {"model": "none"})
