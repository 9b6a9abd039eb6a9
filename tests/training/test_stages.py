"""Tests of runs in stages (their corpora, sizes and learning rates) and of the tasks of corpora."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import random_ids
from processes import TRAIN, run_forked, send_signal, train, train_with_action
from test_commands import call
from test_resume import metrics_of, tensors_of
from test_schedule import section

from uiollms import Sample
from uiollms.build import check_env, load_memory_lm
from uiollms.config.corpora import CorpusEntry
from uiollms.config.load import load_env_config
from uiollms.data import Document
from uiollms.data.builder import SampleBuilder, task_fault, teaches_memory
from uiollms.data.stream import SampleStream
from uiollms.evaluation.scoring import token_losses
from uiollms.files.errors import ConfigError
from uiollms.planning.planner import make_plan
from uiollms.reports.curves import stage_starts
from uiollms.reports.page import stage_words
from uiollms.runs.checks import check_training
from uiollms.training.schedule import Course, Schedule, rate_of_document
from uiollms.training.weighting import normalize_gains, scale_token_weights, weigh_tokens

STAGES = [
    dict(
        share=0.4,
        corpus=[dict(name="files:book[01].txt", partition=1, task="auto encoding", truncation=64)],
        max_lr=2e-2,
        sizes=[[8, 2], [16, 2], [16, 4]],
    ),
    dict(share=0.2, warmup=0.0),
    dict(
        share=0.4,
        max_lr=5e-3,
        sizes=[[8, 1], [16, 8]],
        corpus=[
            dict(
                name="files:book*.txt", partition=0.5, truncation=70, crop="random", kl_weight=0.5
            ),
            dict(name="files:book*.txt", partition=0.5, truncation=70, token_weighting="context"),
        ],
    ),
]


@pytest.fixture
def staged(workspace) -> Path:
    """The folder of a run of 10 documents in 5 steps. The stages have 2, 1 and 2 steps."""
    memory = json.loads(Path("memory.json").read_text())
    Path("memory.json").write_text(json.dumps(memory | dict(lora_dropout=0.2)))
    env = json.loads(Path("env.json").read_text())
    env["train"] |= dict(train_iters=10, save=2, eval=10, accum_grad=2, stages=STAGES)
    Path("env.json").write_text(json.dumps(env))
    return workspace / "out"


def check(*changes: str) -> None:
    check_env(load_env_config("env.json", [*changes]), "env.json")


# ---- the schedule --------------------------------------------------------------------------------


def stages(*shares: float, **changes) -> list[dict]:
    return [dict(share=share, **changes) for share in shares]


def test_stages_begin_between_steps():
    run = Schedule(section(train_iters=100, accum_grad=8, stages=stages(0.3, 0.3, 0.4)), 8)
    # The exact borders would be at 3.75 and 7.5 of 12.5 steps.
    assert run.borders == (32, 64)
    assert [run.stage(done) for done in run.steps()] == [0] * 4 + [1] * 4 + [2] * 4
    assert Schedule(section(), 1).borders == ()


def test_every_stage_has_a_separate_warm_up_and_decay():
    train = section(
        train_iters=100,
        max_lr=1e-3,
        warmup=0.1,
        stages=[dict(share=0.5), dict(share=0.5, max_lr=4e-3, warmup=0.2)],
    )
    found = [Schedule(train, 1).learning_rate(done) for done in range(1, 101)]
    expected = [rate_of_document(i, Course(50, 1e-3, 0.1)) for i in range(50)]
    expected += [rate_of_document(i, Course(50, 4e-3, 0.2)) for i in range(50)]
    assert found == expected
    assert max(found[:50]) == 1e-3 and max(found[50:]) == 4e-3


def test_one_stage_equals_a_run_without_stages():
    plain, staged = section(accum_grad=4), section(accum_grad=4, stages=stages(1.0))
    for done in (4, 400, 9_000, 10_000):
        assert Schedule(plain, 4).learning_rate(done) == Schedule(staged, 4).learning_rate(done)


def test_more_iterations_lengthen_only_the_last_stage():
    shorter = Schedule(section(train_iters=100, stages=stages(0.5, 0.5)), 1)
    train = section(train_iters=300, stages=stages(0.5, 0.5))
    longer = Schedule(train, 1, "documents", shorter.borders)
    assert longer.borders == (50,)
    for done in range(1, 51):
        assert longer.learning_rate(done) == shorter.learning_rate(done)
    assert longer.learning_rate(300) < 1e-7 < longer.learning_rate(100)


def test_a_stage_without_a_step_is_refused():
    message = r"train.stages\[1\]: .* of 100 .* less than one step of 8"
    with pytest.raises(ConfigError, match=message):
        Schedule(section(train_iters=100, stages=stages(0.5, 0.02, 0.48)), 8)
    # This run is shortened so far that no step of its last stage remains.
    with pytest.raises(ConfigError, match=r"train.stages\[1\]"):
        Schedule(section(train_iters=50, stages=stages(0.5, 0.5)), 1, "documents", (50,))


def test_sizes_are_drawn_from_the_seed_and_the_step():
    sizes = [[64, 16], [64, 8], [128, 32]]
    first, again = (Schedule(section(stages=stages(1.0, sizes=sizes), seed=3), 1) for _ in range(2))
    drawn = [first.size(done) for done in range(1, 3001)]
    assert drawn[1000:] == [again.size(done) for done in range(1001, 3001)]
    # Every size is drawn for about a third of the 3,000 steps.
    assert {drawn.count(tuple(size)) // 100 for size in sizes} <= {9, 10}
    assert Schedule(section(), 1).size(7) is None


# ---- a run ---------------------------------------------------------------------------------------


def test_a_run_in_stages_is_resumed_bit_for_bit_across_stages(staged):
    assert run_forked(train()) == 0
    metrics, tensors = metrics_of(staged), tensors_of(staged)
    steps = [line for line in metrics if "nll" in line]
    assert [line["stage"] for line in steps] == [1, 1, 2, 3, 3]
    assert all(line["size"] in STAGES[0]["sizes"] for line in steps[:2])
    assert steps[2]["size"] is None
    assert all(line["size"] in STAGES[2]["sizes"] for line in steps[3:])
    assert json.loads((staged / "ckp" / "memory_config.json").read_text())["chunk_size"] == 16
    for event in (40, 70, 110):
        code = run_forked(train_with_action(event, send_signal(15), "--restart"))
        while code != 0:
            code = run_forked(train("--resume"))
        assert metrics_of(staged) == metrics and tensors_of(staged) == tensors


def test_a_lengthened_run_leaves_its_first_stages_unchanged(staged):
    assert call(*TRAIN) == 0
    assert call(*TRAIN, "--resume", "--set=train.train_iters=16") == 0
    lines = [line for line in metrics_of(staged) if "nll" in line]
    assert [line["stage"] for line in lines] == [1, 1, 2, 3, 3, 3, 3, 3]
    state = json.loads((staged / "checkpoints" / "step-00000016" / "state.json").read_text())
    assert state["borders"] == [4, 6]
    assert (staged / "curve.png").exists()


def test_curves_and_reports_describe_stages():
    lines = [
        dict(iteration=2, nll=3.0, stage=1),
        dict(iteration=4, nll=3.0, stage=1),
        dict(iteration=6, stage=2, skipped=["x"]),
        dict(iteration=8, nll=2.0, stage=2),
        dict(iteration=8, eval=[]),
    ]
    assert stage_starts(lines) == {1: 2, 2: 6} and stage_starts([dict(iteration=2, nll=3.0)]) == {}
    first, second = section(stages=STAGES[:1] + [dict(share=0.6)]).stages
    assert stage_words(first) == "40% of files:book[01].txt (auto encoding) at 8/2, 16/2, 16/4"
    assert stage_words(second) == "60%"


def test_every_stage_draws_from_its_corpora(staged):
    config = load_env_config("env.json")
    model, tokenizer = load_memory_lm(config, "env.json")
    samples = SampleStream(config, tokenizer, model, partial(weigh_tokens, model))
    with model.sized((8, 2)):
        first = samples.take(4)
    assert {drawn.source.split("book")[1][0] for drawn in first} <= {"0", "1"}
    assert all(drawn.sample.chunks.shape == (1, 8) for drawn in first)
    last = samples.take(8, stage=2)
    kinds = {drawn.sample.kl_weight for drawn in last}
    assert kinds == {0.0, 0.5} and all(drawn.sample.chunks.shape[1] == 16 for drawn in last)
    assert model.memory_config.chunk_size == 16

    state = json.loads(json.dumps(samples.state_dict()))
    expected = samples.take(3, stage=2)
    again = SampleStream(config, tokenizer, model, partial(weigh_tokens, model))
    again.load_state_dict(state)
    found = again.take(3, stage=2)
    assert [d.source for d in found] == [d.source for d in expected]
    assert [d.rng.random() for d in found] == [d.rng.random() for d in expected]


@pytest.mark.parametrize(
    "change, message",
    [
        ("train.stages.0.share=0.3", "the shares of the stages sum to 0.9, they must sum to 1"),
        (
            "train.stages.0.sizes=[[10,4]]",
            "sizes: chunk_size 10 must be a multiple of num_memory 4",
        ),
        ("train.stages.0.sizes=[]", "train.stages[0].sizes"),
        ("train.stages.0.corpus=[]", "train.stages[0].corpus"),
        ("train.stages.2.corpus.0.partition=0.7", "partitions sum to 1.2"),
        (
            "train.stages.2.corpus.0.truncation=8",
            "train.stages[2].corpus[0].truncation: of 8 tokens nothing would read memory, "
            "chunk_size "
            "is 8; use at least 10 (under train.stages[2].sizes[0])",
        ),
        (
            "train.stages.2.corpus.1.truncation=129",
            "train.stages[2].corpus[1].truncation: found 129 tokens; with token_weighting context "
            "the base "
            "reads documents raw and has 128 positions; set truncation to 128 or less",
        ),
        (
            "train.stages.2.corpus.0.truncation=null",
            "truncation: found none; with kl_weight 0.5 the base reads documents raw",
        ),
        (
            "train.stages.0.sizes=[[256,2]]",
            "train.stages[0].sizes[0]: chunk_size 256 is past the base's 128",
        ),
        (
            "train.corpus.0.truncation=1000",
            "train.corpus[0].truncation: 1000 tokens is past the capacity",
        ),
        (
            "train.stages.2.corpus.0.name=nothing",
            "train.stages[2].corpus[0].name: corpus 'nothing'",
        ),
        ("train.stages.0.corpus.0.kl_weight=0.5", "a copy is decoded from memory alone"),
        ("train.stages.1.max_lr=0", "train.stages[1].max_lr"),
        ("train.stages.0.share=0", "train.stages[0].share"),
    ],
)
def test_wrong_stages_are_refused_before_a_model_is_loaded(staged, change, message):
    with pytest.raises(ConfigError) as error:
        check(change)
    assert any(message in line for line in str(error.value).splitlines()), str(error.value)


def test_a_plan_is_for_the_longest_document_of_all_stages(staged):
    """Auto-encoding takes one chunk, however long the document is, so the second stage, which has
    no truncation here, does not count."""
    copying = json.dumps([STAGES[0]["corpus"][0] | dict(truncation=None)])
    stage = f"train.stages.1.corpus={copying}"
    for changes, longest in (([stage], 70), ([stage, "train.stages.2.corpus.1.truncation=90"], 90)):
        plan = make_plan(load_env_config("env.json", changes), "env.json")
        assert plan.length == longest


def test_a_truncation_must_fit_every_size(staged):
    """With 128 positions, the size 64/1 has a capacity of thousands of tokens and 16/8 one of
    16 * 15 + 8."""
    change = (
        'train.stages.2.corpus.0={"name": "files:book*.txt", "partition": 0.5, "truncation": 249}'
    )
    with pytest.raises(ConfigError, match=r"249 tokens is past the capacity 248 .*sizes\[1\]"):
        check(change)
    check(change.replace("249", "248"))


# ---- objectives ----------------------------------------------------------------------------------


@pytest.fixture
def builder(workspace) -> SampleBuilder:
    config = load_env_config("env.json", ["model.model_dtype=fp64"])
    return SampleBuilder(*load_memory_lm(config, "env.json"), "document")


def entry(**fields) -> CorpusEntry:
    return CorpusEntry(name="files:x.txt", partition=1.0, **fields)


TEXT = Document("It was a bright cold day, and the clocks were striking thirteen. " * 6, "x.txt")
PAIR = Document(TEXT.text, "x.jsonl", response="thirteen of them", task="question answering")


def test_plain_text_becomes_samples_of_the_entrys_task(builder):
    l = builder.model.memory_config.chunk_size

    def sample(document=TEXT, **fields) -> Sample:
        return builder.train(document, entry(truncation=5 * l, **fields), random.Random(0))

    assert [row.num_memories for row in sample().rows] == [0, 1, 2, 3, 4]
    (row,) = sample(task="auto encoding").rows
    assert row.repeat
    assert [row.num_memories for row in sample(task="Longdata_Copy").rows] == [5] * 5
    utilization = sample(task="memory utilization")
    assert utilization.kl_weight == 1 and len(utilization.rows) == 1
    distilled = sample(kl_weight=0.25)
    assert distilled.kl_weight == 0.25 and len(distilled.teachers) == 1
    answer = sample(PAIR, kl_weight=0.5)
    assert answer.kl_weight == 0.5 and answer.num_scored == 16


def test_synthetic_recall_hides_facts_in_any_plain_text(builder):
    with builder.model.sized((64, 2)):
        corpus = entry(task="synthetic recall", truncation=192)
        sample = builder.train(TEXT, corpus, random.Random(1))
        text = builder.tokenizer.decode(torch.cat([row.input_ids for row in sample.rows]))
    assert 0 < sample.num_scored < 64 and "clocks were striking" in text


@pytest.mark.parametrize(
    "task, kind, suitable",
    [
        ("question answering", "language modeling", False),
        ("question answering", "question answering", True),
        ("question answering", "synthetic recall", True),
        ("synthetic recall", "synthetic recall", True),
        ("synthetic recall", "language modeling", True),
        ("synthetic recall", "question answering", False),
        ("auto encoding", "question answering", False),
        ("auto encoding", "language modeling", True),
        ("language modeling", "activation beacons", False),
    ],
)
def test_tasks_accept_only_suitable_documents(task, kind, suitable):
    assert (task_fault(task, kind) is None) == suitable


def test_a_task_without_suitable_documents_is_refused(workspace, builder):
    for name, task in (
        ("longalpaca.train.true", "auto encoding"),
        ("sotu.train", "question answering"),
    ):
        changes = [f"train.corpus.0.name={name}", f"train.corpus.0.task={task}"]
        with pytest.raises(ConfigError, match=r"train.corpus\[0\].task: corpus .* has"):
            check_training(load_env_config("env.json", changes), "env.json")
    with pytest.raises(ConfigError, match="x.jsonl: has documents for question answering"):
        builder.train(PAIR, entry(task="auto encoding"), random.Random(0))


def test_token_weights_are_the_gain_of_raw_context(builder):
    """They are compared with the logits of the base, token by token. The tolerance 1e-9 in float64
    allows for another order of summation."""
    model = builder.model
    l = model.memory_config.chunk_size
    ids = random_ids(4 * l + 3)
    sample = weigh_tokens(model, Sample.document(ids, l))
    base = model.base

    def nll(text: torch.Tensor) -> torch.Tensor:
        logits = base(text[None]).logits[0, :-1].log_softmax(-1)
        return -logits.gather(1, text[1:, None])[:, 0]

    raw = nll(ids)
    starts = range(0, len(ids) - 1, l)
    no_memory = torch.cat([nll(ids[start : start + l + 1]) for start in starts])
    gain = (no_memory - raw).clamp(min=0)
    expected = gain / gain.mean() / (len(ids) - 1)
    found = torch.cat([row.token_weights[row.scored] for row in sample.rows])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found[:l].abs().max() < 1e-12 and teaches_memory(sample)
    nlls = [token_losses(model, s)[1] for s in (sample, Sample.document(ids, l))]
    # The NLLs of the tokens stay the same; only their weights change.
    torch.testing.assert_close(*nlls)


def test_a_document_without_gain_from_context_trains_nothing():
    assert normalize_gains(torch.tensor([-1.0, -0.5])).tolist() == [0, 0]
    assert normalize_gains(torch.tensor([-1.0, 1.0, 3.0])).tolist() == pytest.approx(
        [0, 0.75, 2.25]
    )
    sample = Sample.document(random_ids(20), 8)
    assert teaches_memory(sample)
    assert not teaches_memory(scale_token_weights(sample, torch.zeros(19, dtype=torch.float64)))


def test_token_weighting_needs_a_truncation_and_language_modeling():
    with pytest.raises(ValueError, match="set truncation"):
        entry(token_weighting="context")
    with pytest.raises(ValueError, match="token_weighting context with auto encoding"):
        entry(token_weighting="context", truncation=64, task="auto encoding")
