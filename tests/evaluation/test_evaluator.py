"""Tests evaluation tasks from config to numbers: every task type, retrieval trials, stored scores,
and tasks that are refused."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MEMORY, make_base, random_ids
from rich.console import Console
from safetensors import safe_open
from test_commands import ROOT, call

import uiollms
from uiollms import MemoryLM
from uiollms.build import load_memory_lm
from uiollms.config.corpora import TaskEntry, TaskType
from uiollms.config.load import load_env_config, load_tasks, parse
from uiollms.data import Document
from uiollms.data.builder import SampleBuilder
from uiollms.data.retrieval import WORDS, make_trials
from uiollms.data.sample import Sample
from uiollms.data.tokens import tokenize
from uiollms.evaluation.answer_metrics import exact_match, token_f1
from uiollms.evaluation.copying import written_chunk
from uiollms.evaluation.evaluator import Evaluation
from uiollms.evaluation.instances import Instance, evaluation_documents, find_partner
from uiollms.evaluation.results import ScoredTask, TaskScores, TaskSummary
from uiollms.evaluation.saved_results import load_token_nlls
from uiollms.evaluation.scoring import token_losses
from uiollms.evaluation.statistics import DocumentScore, bleu4, bleu4_interval, bootstrap, rouge_l
from uiollms.reports.curves import plot_training
from uiollms.reports.tables import print_results, print_written, written_chunks

TEXT = "The harbour has three walls, and on calm days their stones can be counted under the water. "


@pytest.fixture
def tiny(workspace):
    """(model, tokenizer) of the tiny folder, with 2 slots per chunk of 16, 128 positions and one
    token per byte."""
    return load_memory_lm(load_env_config("env.json"), "env.json")


@pytest.fixture
def corpora(workspace, monkeypatch):
    """Sets raw_data to the repository's examples, and the hub to a folder with four datasets."""
    monkeypatch.setenv("UIOLLMS_CACHE", str(workspace / "cache"))
    monkeypatch.setenv("UIOLLMS_RAW_DATA", str(ROOT / "raw_data" / "examples"))
    monkeypatch.setenv("UIOLLMS_HUB_DIR", str(workspace / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workspace / "arrow")
    story = dict(
        story=f"Ada met Bob. {TEXT}",
        questions=["Who?", "Whom?"],
        answers=["Ada", "Bob"],
        summary="They met.",
    )
    for name, rows in {
        "Yukang/LongAlpaca-12k": [dict(instruction=TEXT, output="It has three.")] * 400,
        "glnmario/news-qa-summarization": [story] * 4,
        "emozilla/pg19": [dict(text=TEXT * 3)] * 4,
        "yuyijiong/LongData-Corpus": [dict(text=TEXT)] * 4,
    }.items():
        path = workspace / "hub" / name / "train.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def entry(task_type: str = "perplexity", **fields) -> TaskEntry:
    """Returns a task entry, parsed as that of a config."""
    task = dict(task_type=task_type, task_name="files:book*.txt", num_instance=2, truncation=100)
    return parse(TaskEntry, task | fields, "here")


# ---- All tasks through the commands --------------------------------------------------------------


def short_tasks() -> list[dict]:
    """Returns the tasks of config/tasks/every-task.json with few enough tokens for the tiny
    model."""
    tasks = json.loads((ROOT / "config/tasks/every-task.json").read_text())["tasks"]
    short = {"passkey": 230, "needle": 180}
    return [
        task | dict(num_instance=2, truncation=short.get(task["task_type"], 96)) for task in tasks
    ]


def test_every_task_type_evaluates(workspace, corpora, capsys):
    """Runs test.py on the tiny model with every task of config/tasks/every-task.json and checks
    what it writes into the run folder."""
    Path("test.json").write_text(json.dumps(dict(tasks=short_tasks())))
    kinds = {task.task_type for task in load_tasks("test.json")}
    assert kinds == set(TaskType.__args__)
    assert call("test.py", "--env_conf", "env.json") == 0, capsys.readouterr().err
    table = capsys.readouterr().out
    results = json.loads(Path("out/test.json").read_text())["results"]
    # One task has perplexity under two protocols.
    assert len(results) == len(short_tasks()) + 1
    news = [result["task_type"] for result in results if "news" in result["task"]]
    assert news == ["news qa summation", "news qa summation v2"]
    for result in results:
        assert result["documents"] >= 1 and result["scored_tokens"] > 0, result["task_type"]
        for mode in {"memory", "window", "raw", "shuffled"} & result.keys():
            assert math.isfinite(result[mode]["nll"])
        assert result["task_type"] in table
    named = {(r["task_type"], r["protocol"], r["task"]): r for r in results}
    perplexity = named["perplexity", "document", "sotu.test"]
    assert {"window", "raw", "shuffled", "memory"} <= perplexity.keys()
    distilled = named["activation beacons", None, "beacons sampled.8192.distill"]["memory"]
    # The loss is a divergence, not an NLL.
    assert distilled["loss"] != pytest.approx(distilled["nll"])
    answers = named["question answering", None, "longalpaca.test.false"]
    assert 0 <= answers["memory"]["rouge_l"] <= 1
    for mode in ("memory", "raw", "window"):
        assert 0 <= answers[mode]["exact_match"] <= answers[mode]["token_f1"] <= 1
    copies = named["auto encoding", None, "minipile copy 256.test"]["memory"]
    assert {"bleu4", "rouge_l", "token_accuracy"} <= copies.keys()
    passkey = named["passkey", None, "sotu.train"]
    assert [depth["depth"] for depth in passkey["memory"]["by_depth"]] == [0, 0.5, 1]
    assert passkey["documents"] == 6
    # 230 tokens are past the 128 positions.
    assert "raw" not in passkey
    assert Path("out/test.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "corpus",
    [
        "sotu.train",
        "longalpaca.train.false",
        "minipile copy 256.train",
        "longdata-corpus copy",
        "beacons sampled.8192",
        "beacons sampled.8192.distill",
        "newsqasum.train.lm",
        "newsqasum.train.distill",
        "newsqasumv2",
        "memory util 2k.train",
    ],
)
def test_every_task_trains(workspace, corpora, capsys, corpus):
    """Three iterations on a corpus of every task have finite losses and nonzero gradients."""
    entries = json.dumps([dict(name=corpus, partition=1, truncation=96)])
    settings = [f"--set=train.corpus={entries}", "--set=train.tasks=[]"]
    settings.append("--set=train.chunk_batch=64")
    assert call("train.py", "--env_conf", "env.json", *settings) == 0, capsys.readouterr().err
    logged = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 3 and all(math.isfinite(m["nll"]) and m["grad_norm"] > 0 for m in logged)


def test_auto_encoding_trains_on_one_chunk_at_a_time(tiny):
    """A sample has one chunk, which the model compresses and reproduces from memory alone."""
    document = Document("".join(chr(97 + i % 26) for i in range(50)), "here", task="auto encoding")
    builder, chunks = SampleBuilder(*tiny), set()
    for seed in range(20):
        sample = builder.make(document, None, random.Random(seed))
        assert sample.chunks.shape == (1, 16) and len(sample.rows) == 1 and sample.rows[0].repeat
        assert torch.equal(sample.rows[0].targets, sample.chunks[0])
        chunks.add(tuple(sample.chunks[0].tolist()))
    # 50 tokens have three complete chunks.
    assert len(chunks) == 3


def test_tasks_inside_a_training_run(workspace):
    """Every evaluation logs the summary that test.py writes, and the curve is drawn from it."""
    tasks = [
        entry(compare=["window"], protocols=["document", "paper"]),
        entry("auto encoding", num_instance=1, truncation=40, compare=["window"]),
        entry("passkey", num_instance=1, truncation=230, depths=[0.5]),
    ]
    dumped = json.dumps([task.model_dump() for task in tasks])
    assert call("train.py", "--env_conf", "env.json", f"--set=train.tasks={dumped}") == 0
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    logged = lines[-1]["eval"]
    task_types = [result["task_type"] for result in logged]
    assert task_types == ["perplexity", "perplexity", "auto encoding", "passkey"]
    # The task has the paper's protocol, as the training loss has, so the plot has one panel.
    assert plot_training(lines, Path("one.png")).stat().st_size > 1000
    Path("test.json").write_text(dumped)
    assert call("test.py", "--env_conf", "env.json") == 0
    assert json.loads(Path("out/test.json").read_text())["results"] == logged
    saved = load_token_nlls(Path("out/test-nll.safetensors"), Path("out/test.json").read_bytes())
    assert [scores.task.task_type for scores in saved] == task_types
    # No task has the protocol of the training loss, so the evaluation has a separate panel.
    lines = [lines[0], lines[-1] | {"eval": logged[:1]}]
    assert plot_training(lines, Path("two.png")).stat().st_size > 1000


# ---- Stored tokens, means, intervals -------------------------------------------------------------


def test_stored_nlls_equal_the_scores(workspace, tiny):
    model, tokenizer = tiny
    compared = dict(compare=["window", "raw", "shuffled"], protocols=["paper", "document"])
    task = entry(num_instance=3, **compared)
    Path("test.json").write_text(json.dumps([task.model_dump()]))
    assert call("test.py", "--env_conf", "env.json") == 0
    texts = [Path(f"book{i}.txt").read_text() for i in range(3)]
    ids = [torch.tensor(tokenizer(text).input_ids[:100]) for text in texts]
    make_sample = {"paper": Sample.language_modeling, "document": Sample.document}
    with safe_open("out/test-nll.safetensors", "pt") as file:
        # There are 2 protocols, 3 documents and 4 modes, with NLLs and positions.
        assert len(file.keys()) == 2 * 3 * 4 * 2
        assert [json.loads(file.metadata()[r])["protocol"] for r in "01"] == ["paper", "document"]
        for r, protocol in enumerate(task.protocols):
            for d, document in enumerate(ids):
                for mode in ("memory", "window", "raw"):
                    expected = uiollms.score(model, document, protocol, mode)
                    nll = file.get_tensor(f"{r}.{d}.{mode}.nll")
                    positions = file.get_tensor(f"{r}.{d}.{mode}.positions")
                    assert torch.equal(nll, expected.nll.float())
                    assert torch.equal(positions, expected.positions)
                # Document d reads the memories of document d + 1, the last one those of the first.
                other = ids[(d + 1) % 3][:96].view(6, 16)
                sample = make_sample[protocol](document, 16)
                shuffled = token_losses(model, sample, "shuffled", other)[1]
                assert torch.equal(file.get_tensor(f"{r}.{d}.shuffled.nll"), shuffled.float())


def test_means_by_position_and_chunk_recombine_to_the_total(tiny):
    (scores,) = Evaluation(*tiny, [entry(protocols=["document"])]).run()
    numbers = scores.summarize().modes["memory"]
    for groups in (numbers["by_position"], numbers["by_chunk"]):
        tokens = sum(group["tokens"] for group in groups)
        total = sum(group["nll"] * group["tokens"] for group in groups)
        assert tokens == 2 * 99 and total / tokens == pytest.approx(numbers["nll"])
    by_position, by_chunk = numbers["by_position"], numbers["by_chunk"]
    ranges = [(group["start"], group["stop"]) for group in by_position]
    assert ranges == [(2**i, 2 ** (i + 1)) for i in range(7)]
    assert [group["tokens"] for group in by_position] == [2 * n for n in (1, 2, 4, 8, 16, 32, 36)]
    counts = [(group["chunk"], group["tokens"]) for group in by_chunk]
    assert counts == [*((chunk, 32) for chunk in range(6)), (6, 6)]


def scores_of(*documents: tuple[float, int], **fields) -> dict[int, DocumentScore]:
    """Returns the scores of documents, each given as its NLL at every token and its number of
    tokens."""
    found = {}
    for i, (nll, count) in enumerate(documents):
        nlls = torch.full((count,), nll)
        found[i] = DocumentScore(nlls, nlls, torch.arange(1, count + 1), **fields)
    return found


def test_summary_numbers():
    two = scores_of((math.log(10), 30), (math.log(20), 10))
    scores = {
        "memory": two,
        "window": scores_of((math.log(40), 40)),
        "raw": scores_of((math.log(5), 40)),
    }
    task = ScoredTask("x", "perplexity", 100, 8, "paper")
    summary = TaskScores(task, scores).summarize().as_json()
    weighted = math.exp((30 * math.log(10) + 10 * math.log(20)) / 40)
    # NLLs are stored in float32.
    near = 1e-6
    assert summary["memory"]["perplexity"] == pytest.approx(weighted, rel=near)
    found = (summary["mean"], summary["max"], summary["min"])
    assert found == pytest.approx((15, 20, 10), rel=near)
    assert summary["memory"]["document_mean"] == pytest.approx(15, rel=near)
    assert summary["scored_tokens"] == 40
    for interval in ("interval_95", "document_mean_interval_95"):
        assert summary["memory"][interval] == pytest.approx((10, 20), rel=near)
    assert json.loads(json.dumps(summary)) is not None


def test_the_bootstrap_interval_has_the_expected_width():
    """The mean of 100 values 0 .. 1 has a standard error of about 0.029, so the interval reaches
    1.96 * 0.029 to either side."""
    values = [i / 99 for i in range(100)]
    low, high = bootstrap(values, lambda drawn: sum(drawn) / len(drawn))
    assert low == pytest.approx(0.5 - 1.96 * 0.029, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.029, abs=0.015)
    assert bootstrap([3.0], max) == (3.0, 3.0)


def test_the_interval_of_bleu_equals_that_of_drawn_documents():
    """The twin computes the corpus BLEU-4 of all pairs of every draw."""
    words = TEXT.split()
    documents = [
        tuple((TEXT, " ".join(words[: n + i])) for i in range(2)) for n in (4, 7, 11, len(words))
    ]
    expected = bootstrap(documents, lambda drawn: bleu4([pair for d in drawn for pair in d]))
    assert bleu4_interval(documents) == pytest.approx(expected)
    assert expected[0] < bleu4([pair for d in documents for pair in d]) < expected[1]


def test_bleu_and_rouge_of_texts():
    same = (TEXT, TEXT)
    assert bleu4([same]) == pytest.approx(100) and rouge_l([same]) == 1
    assert bleu4([(TEXT, "nothing of it")]) < 5 and rouge_l([(TEXT, "something else")]) == 0
    # The longest common subsequence is a c d.
    assert rouge_l([("a b c d", "a x c d")]) == pytest.approx(0.75)


# ---- Documents and modes -------------------------------------------------------------------------


@pytest.mark.parametrize("new", [5, None])
def test_answers_are_those_that_each_mode_generates(workspace, tiny, new):
    model, tokenizer = tiny
    documents = [dict(input=f"{i} {TEXT[:50]} Who? ", output=f"Ada {i}") for i in range(2)]
    Path("q.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    modes = ["window", "shuffled", "recent", "raw"]
    task = entry(
        "question answering",
        task_name="files:q.jsonl",
        generate=True,
        max_new_tokens=new,
        compare=modes,
    )
    (result,) = Evaluation(model, tokenizer, [task]).run()
    own, other = (tokenize(tokenizer, d["input"]) for d in documents)
    start = (len(own) - 1) // 16 * 16
    prompts = dict(
        memory=own,
        window=own[start:],
        shuffled=torch.cat([other[:start], own[start:]]),
        recent=own[start - start // 16 * 2 :],
        raw=own,
    )
    for mode, prompt in prompts.items():
        answering = model if mode in ("memory", "shuffled") else model.base
        new_tokens = new or len(documents[0]["output"])
        found = answering.generate(prompt[None], do_sample=False, max_new_tokens=new_tokens)
        answer = tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)
        ((reference, given),) = result.scores[mode][0].texts
        assert (reference, given) == (documents[0]["output"], answer), mode
    pairs = [d.texts[0] for d in result.scores["raw"].values()]
    numbers = result.summarize().modes["raw"]
    for name, metric in (("token_f1", token_f1), ("exact_match", exact_match)):
        expected = sum(metric(given, [wanted]) for wanted, given in pairs) / 2
        assert numbers[name] == pytest.approx(expected), name


def test_a_raw_answer_may_use_all_positions_of_a_stretched_base():
    rope = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e4)
    base = make_base(max_position_embeddings=64, rope_parameters=rope)
    model = MemoryLM(base, MEMORY)
    instance = Instance((), prompt=random_ids(100), response=random_ids(20))
    evaluation = Evaluation(model, None, [])
    assert evaluation._answer_length(instance, "raw", None) == 20
    assert evaluation._answer_length(instance, "raw", 500) == 256 - 100


def test_the_base_is_scored_once_and_memory_in_every_run(tiny):
    model, tokenizer = tiny
    compared = dict(compare=["window", "raw", "shuffled"])
    evaluation = Evaluation(
        model,
        tokenizer,
        [entry(**compared), entry("auto encoding", truncation=40, compare=["window"])],
    )
    first = evaluation.run()
    first_modes = [scores.summarize().modes for scores in first]
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    second = evaluation.run()
    second_modes = [scores.summarize().modes for scores in second]
    for mode, changes in dict(memory=True, shuffled=True, window=False, raw=False).items():
        assert (first_modes[0][mode] != second_modes[0][mode]) == changes, mode
    assert first[0].scores["raw"] is second[0].scores["raw"]
    # The repeat token is trained, so copies without memory change too.
    assert first_modes[1]["window"] != second_modes[1]["window"]


def test_documents_do_not_influence_each_other(tiny):
    """The released program scores document 2 with document 1's memories before its own."""
    both = Evaluation(*tiny, [entry()]).run()[0].scores["memory"]
    second = entry(task_name="files:book1.txt", num_instance=1)
    alone = Evaluation(*tiny, [second]).run()[0].scores["memory"]
    assert torch.equal(both[1].nll, alone[0].nll) and not torch.equal(both[0].nll, both[1].nll)


def test_evaluation_leaves_the_training_mode_unchanged(tiny):
    model, tokenizer = tiny
    for training in (True, False):
        model.train(training)
        Evaluation(model, tokenizer, [entry()]).run()
        assert model.training == training


LENGTHS = {"a": 50, "b": 0, "c": 1, "d": 9, "e": 300, "f": 90, "g": 17, "h": 95}


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(num_instance=3), [50, 9, 90]),  # b is blank, of c's one token nothing is scored
        (dict(num_instance=3, documents="first"), [50, 9, 90]),
        (dict(num_instance=9), [50, 9, 90, 90, 17, 90]),
        (dict(num_instance=3, documents="full"), [90, 90, 90]),  # e f h
        (dict(num_instance=5, documents="full"), [90, 90, 90, 50, 17]),  # d fits a chunk of 16
        (dict(num_instance=2, truncation=None), [50, 9]),
        (dict(num_instance=2, truncation=None, documents="full"), [50, 300]),  # none fills 926
    ],
)
def test_the_first_or_the_full_documents_are_scored(workspace, tiny, fields, expected):
    """They are the first, as in the release, or those that fill `truncation`."""
    for name, length in LENGTHS.items():
        Path(f"doc-{name}.txt").write_text(name * length or " \n")
    task = entry(task_name="files:doc-*.txt", truncation=90).model_copy(update=fields)
    result = Evaluation(*tiny, [task]).run()[0]
    found = evaluation_documents(*tiny, task)
    assert [len(ids) for ids in found] == expected
    scored = [len(score.nll) for score in result.scores["memory"].values()]
    # All tokens of a chunk but the first are scored.
    assert scored == [sum(len(part) - 1 for part in ids.split(16)) for ids in found]
    assert all(math.isfinite(document.nll.sum()) for document in result.scores["memory"].values())


@pytest.mark.parametrize("documents", ["first", "full"])
def test_every_document_of_protocol_later_has_a_token_that_reads_memory(workspace, tiny, documents):
    """Documents of one chunk of 16 and one more token have none."""
    for length in (9, 17, 18, 40):
        Path(f"doc-{length}.txt").write_text("x" * length)
    task = entry(task_name="files:doc-*.txt", truncation=90, num_instance=4)
    task = task.model_copy(update=dict(documents=documents, protocols=("document", "later")))
    for result, first in zip(Evaluation(*tiny, [task]).run(), (1, 17), strict=True):
        scores = result.scores["memory"].values()
        assert [len(score.nll) for score in scores] == [18 - first, 40 - first]
        assert math.isfinite(result.summarize().modes["memory"]["perplexity"])


def test_a_document_in_one_chunk_is_scored_without_memory(workspace, tiny):
    Path("short.txt").write_text("a few words")
    compared = dict(task_name="files:short.txt", num_instance=1, compare=["window", "raw"])
    result = Evaluation(*tiny, [entry(**compared)]).run()[0]
    memory, window, raw = (result.scores[mode][0].nll for mode in ("memory", "window", "raw"))
    assert len(memory) == 10 and torch.equal(memory, window) and torch.allclose(memory, raw)


def test_a_shuffled_document_reads_the_next_that_is_long_enough(workspace, tiny):
    def instance(*lengths: int) -> Instance:
        return Instance(tuple(Sample.document(random_ids(n), 8) for n in lengths))

    short, middle, long = ring = [instance(9), instance(20), instance(33)]
    assert [find_partner(ring, i) for i in range(3)] == [middle, long, None]
    assert find_partner([instance(9, 9), short, long, several := instance(9, 9, 9)], 0) is several
    Path("short.txt").write_text("a document of a few words")
    texts = dict(task_name="files:[bs]*.txt", num_instance=5, compare=["shuffled"])
    result = Evaluation(*tiny, [entry(**texts, truncation=90)]).run()[0]
    assert len(result.scores["shuffled"]) == 5
    # The books have one length.
    books = entry(compare=["shuffled"], truncation=None, num_instance=4)
    result = Evaluation(*tiny, [books]).run()[0]
    assert len(result.scores["shuffled"]) == 4


def test_auto_encoding_reads_each_chunk_alone(tiny):
    """The NLL is that of `reconstruct` on the document's chunks, given the true tokens."""
    model, tokenizer = tiny
    task = entry("auto encoding", num_instance=1, truncation=40)
    document = Evaluation(model, tokenizer, [task]).run()[0].scores["memory"][0]
    chunks = torch.tensor(tokenizer(Path("book0.txt").read_text()).input_ids[:32]).view(2, 16)
    with torch.no_grad():
        logits = model.reconstruct(chunks).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, chunks.flatten(), reduction="none")
    # In float32, batched and single rows round differently.
    torch.testing.assert_close(document.nll, expected, rtol=1e-4, atol=1e-5)
    assert document.positions.tolist() == list(range(32)) and document.hits[1] == 32
    assert [reference for reference, _ in document.texts] == [
        tokenizer.decode(chunk) for chunk in chunks
    ]


def test_results_show_a_greedy_copy_and_guided_guesses(tiny, capsys):
    """The text "alone" is the greedy copy from memory. Its tokens are right if the original has
    them in the same order. The text "guided" is the likeliest token after the true ones."""
    model, tokenizer = tiny
    task = entry("auto encoding", num_instance=2, truncation=40, compare=["shuffled"])
    result = Evaluation(model, tokenizer, [task]).run()[0]
    summary = result.summarize()
    written = summary.modes["memory"]["written"]
    chunk = torch.tensor(tokenizer(Path("book0.txt").read_text()).input_ids[:16])
    with torch.no_grad():
        guesses = model.reconstruct(chunk[None])[0].argmax(-1)
    assert written["original"] == tokenizer.decode(chunk) and written["tokens"] == 16
    assert written["guided"]["right"] == int((guesses == chunk).sum())
    texts = [piece for piece, _ in written["guided"]["pieces"]]
    assert "".join(texts) == tokenizer.decode(guesses, skip_special_tokens=True)
    alone = "".join(piece for piece, _ in written["alone"]["pieces"])
    assert alone == result.scores["memory"][0].texts[0][1]

    again = TaskSummary.from_json(json.loads(json.dumps(summary.as_json())))
    captions = [chunk.caption for chunk in written_chunks([again])]
    assert [caption.split(" and ")[0].split(",")[0] for caption in captions] == [
        "each token guessed from its own memory",
        "written down from its own memory alone",
        "each token guessed from another document's memory",
        "written down from another document's memory alone",
    ]
    print_results([again])
    output = capsys.readouterr().out
    words = " ".join(output.split())
    assert written["original"] in output and all(caption in words for caption in captions)


def test_tokens_in_the_order_of_the_original_are_right(tiny):
    tokenizer = tiny[1]
    original, copy = torch.tensor([10, 11, 12, 13, 14, 15]), torch.tensor([40, 10, 11, 13, 14, 50])
    guesses = torch.tensor([10, 40, 12, 13, 40, 15])
    written = written_chunk(original, copy, guesses, tokenizer.decode)
    runs = {key: [right for _, right in written[key]["pieces"]] for key in ("alone", "guided")}
    assert runs == {"alone": [False, True, False], "guided": [True, False, True, False, True]}
    assert written["alone"]["right"] == 4 and written["guided"]["right"] == 4
    text = written["guided"]["pieces"][2][0]
    console = Console(width=100, record=True)
    task = ScoredTask("x", "auto encoding", 6, 6, None, 2)
    summary = TaskSummary(task, {}, {"memory": dict(documents=1, written=written)})
    print_written([summary], console)
    assert f"\u27e6{text}\u27e7" in console.export_text()


def test_longdata_copy_positions_and_texts(tiny):
    task = entry("longdata copy", num_instance=1, truncation=40)
    document = Evaluation(*tiny, [task]).run()[0].scores["memory"][0]
    assert document.positions.tolist() == list(range(32)) and len(document.texts) == 2


REFUSED = [
    (
        dict(task_type="question answering"),
        "book0.txt is for language modeling, .* takes documents for question answering",
    ),
    (
        dict(task_type="news qa summation"),
        "book0.txt is for language modeling, .* takes documents for news qa summation",
    ),
    (
        dict(task_name="files:qa.jsonl"),
        "is for question answering, task_type 'perplexity' takes documents for language mod",
    ),
    (
        dict(task_type="passkey", task_name="files:qa.jsonl", truncation=300),
        "'passkey' takes documents for language",
    ),
    (
        dict(task_type="passkey", truncation=100),
        "passkey: a trial of 100 tokens is too short, truncation must be at least 1",
    ),
    (
        dict(task_type="passkey", task_name="files:blank.txt", truncation=300),
        "the corpus has 1 documents, all of them blank",
    ),
    (
        dict(task_name="files:few.txt", documents="full"),
        "no document for perplexity that is long enough for memory",
    ),
    (
        dict(task_name="files:[a-b]*.txt", truncation=1),
        "no document for perplexity that has a token to score",
    ),
    (
        dict(task_type="auto encoding", task_name="files:few.txt"),
        "no document for auto encoding that is long enough",
    ),
    (
        dict(task_name="files:book0.txt", compare=["shuffled"]),
        "shuffled needs 2 documents, the corpus has one that fits",
    ),
    (
        dict(
            task_type="activation beacons", task_name="beacons sampled.8192.distill", truncation=400
        ),
        "400 tokens, the base",
    ),
]


@pytest.mark.parametrize("task, message", REFUSED)
def test_unsuitable_documents_are_refused_before_scoring(corpora, tiny, task, message):
    Path("qa.jsonl").write_text(json.dumps(dict(input=TEXT, output="three")))
    Path("few.txt").write_text("a few words")
    Path("blank.txt").write_text(" \n")
    with pytest.raises(uiollms.ConfigError, match=message):
        Evaluation(*tiny, [entry(**task)])


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(task_type="longdata copy", compare=["raw"]),
            "compare: raw: longdata copy decodes from memory alone; allowed",
        ),
        (dict(compare=["shuffled"], num_instance=1), "num_instance must be at least 2, found 1"),
        (
            dict(task_type="needle", protocols=["document"]),
            "protocols is for perplexity and language modeling",
        ),
        (
            dict(task_type="passkey", depths=[1.5]),
            "depths.0.: Input should be less than or equal to 1",
        ),
    ],
)
def test_fields_that_do_not_fit_the_task_are_refused(fields, message):
    with pytest.raises(uiollms.ConfigError, match=message):
        entry(**fields)


def test_task_types_may_be_upper_case():
    assert entry("News QA_Summation").task_type == "news qa summation"
    task = entry("passkey", truncation=500)
    # The config of a run folder, which contains all defaults, loads again.
    assert parse(TaskEntry, json.loads(task.model_dump_json()), "resolved") == task


# ---- Retrieval -----------------------------------------------------------------------------------


def text_of(trial, tokenizer) -> tuple[str, str]:
    """Returns the text of a whole trial and that of its scored tokens."""
    ids = torch.cat([row.input_ids for row in trial.sample.rows])
    answer = torch.cat([row.targets[row.scored] for row in trial.sample.rows])
    return tokenizer.decode(ids), tokenizer.decode(answer)


@pytest.mark.parametrize(
    "task_type, sentence", [("passkey", "the secret number of this text is"), ("needle", "hides a")]
)
def test_the_sentence_is_at_the_given_depth(tiny, task_type, sentence):
    tokenizer = tiny[1]
    filler = [Document(f"{i}. {TEXT}", "here") for i in range(3)]
    depths = [0.0, 0.3, 1.0]
    found = make_trials(task_type, filler, tokenizer, 400, 16, 2, depths)
    assert [trial.depth for trial in found] == [0, 0, 0.3, 0.3, 1, 1]
    for trial in found:
        text, answer = text_of(trial, tokenizer)
        assert sum(len(row.input_ids) for row in trial.sample.rows) == 400 and text.endswith(answer)
        # The answer is in the sentence and at the end.
        assert text.count(answer) == 2
        if task_type == "passkey":
            start = text.index("\nTake note")
            stop = text.index(".\n", start) + 2
        else:
            start = text.index("\nThe gardener")
            stop = text.index("stairs.\n") + 8
        # One byte is one token.
        filler_length = text.index("\nQuestion") - (stop - start)
        assert start == trial.position == round(trial.depth * filler_length)
        assert sentence in text[start:stop]
    answers = [text_of(trial, tokenizer)[1] for trial in found]
    # Trials have different answers, the same at every depth.
    assert answers[:2] == answers[2:4] == answers[4:] and answers[0] != answers[1]
    again = make_trials(task_type, filler, tokenizer, 400, 16, 2, depths)
    assert [text_of(t, tokenizer) for t in again] == [text_of(t, tokenizer) for t in found]


def test_passkeys_have_five_digits_and_needles_are_words(tiny):
    filler = [Document(TEXT, "here")]
    tokenizer = tiny[1]
    trials = make_trials("passkey", filler, tokenizer, 400, 16, 30, [0.5])
    keys = [text_of(trial, tokenizer)[1] for trial in trials]
    assert all(key[0] == " " and len(key) == 6 and key[1:].isdigit() for key in keys)
    assert len(set(keys)) == 30
    trials = make_trials("needle", filler, tokenizer, 400, 16, len(WORDS), [0.5])
    words = [text_of(trial, tokenizer)[1].strip() for trial in trials]
    assert sorted(words) == sorted(WORDS)


@torch.no_grad()
def test_accuracy_counts_the_answers_that_the_model_would_give(tiny):
    """The trials at depth 0 get the model's greedy answers. Those at depth 1 have random answers,
    which the model cannot predict."""
    model, tokenizer = tiny
    task = entry("passkey", truncation=230, depths=[0.0, 1.0], num_instance=2)
    evaluation = Evaluation(model, tokenizer, [task])
    instances = evaluation.measurements[0].instances
    for i in (0, 1):
        ids = torch.cat([row.input_ids for row in instances[i].samples[0].rows])
        for position in range(224, 230):
            ids[position] = model(ids[None, :position]).logits[0, -1].argmax()
        labels = ids.clone()
        labels[:224] = -100
        instances[i] = replace(instances[i], samples=(Sample.beacon(ids, labels, 16),))
    numbers = evaluation.run()[0].summarize().modes["memory"]
    by_depth = [(d["depth"], d["accuracy"], d["trials"]) for d in numbers["by_depth"]]
    assert by_depth == [(0, 1, 2), (1, 0, 2)]
    assert numbers["accuracy"] == 0.5 and numbers["accuracy_interval_95"] == (0, 1)
