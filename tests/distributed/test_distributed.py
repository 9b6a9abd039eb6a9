"""Several processes do what one does: gradients to 1e-10 in float64, streams, checkpoints, and
the end of a run.

The processes are forked children on gloo, each under an alarm, so that nothing hangs; one test
goes through torchrun.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import MEMORY, gradients, make_model, random_ids, worst_error
from processes import TRAIN, run_forked, send_signal
from safetensors.torch import load_file
from test_commands import ROOT, call
from test_step import PROVEN, protocols, samples_with_teachers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import uiollms
from uiollms import MemoryConfig, Sample
from uiollms.build import load_memory_lm
from uiollms.config.load import load_env_config
from uiollms.data.stream import SampleStream
from uiollms.distributed.division import Division
from uiollms.distributed.groups import ALONE, Group, World
from uiollms.training.step import row_weights


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launched(
    size: int, function: Callable[[int], int], said: str = os.devnull, seconds: int = 90
) -> list[int]:
    """function(rank) in `size` forked processes with a launcher's environment: their exit codes."""
    port = free_port()

    def child(rank: int) -> int:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout has its own
        signal.alarm(seconds)
        names = dict(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=size,
            LOCAL_WORLD_SIZE=size,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        os.environ.update({name: str(value) for name, value in names.items()})
        return function(rank)

    output = said if said == os.devnull else f"{said}-{{}}"
    waits = [
        run_forked(lambda rank=rank: child(rank), output=output.format(rank), wait=False)
        for rank in range(size)
    ]
    return [wait() for wait in waits]


def in_a_world(
    size: int, function: Callable[[World], object], tmp_path: Path, ranks: int = 1
) -> list:
    """What function(world) gives in each of `size` processes."""

    def child(rank: int) -> int:
        dist.init_process_group("gloo")
        torch.save(function(World(dist.group.WORLD, ranks=ranks)), tmp_path / f"result-{rank}")
        dist.destroy_process_group()
        return 0

    codes = launched(size, child, said=str(tmp_path / "said"))
    assert codes == [0] * size, (tmp_path / f"said-{codes.index(max(codes, key=abs))}").read_text()
    return [torch.load(tmp_path / f"result-{rank}", weights_only=False) for rank in range(size)]


# ---- data parallelism ----------------------------------------------------------------------------

LENGTHS = (38, 17, 8, 61)  # uneven, and one that trains nothing


def documents_of(lengths=LENGTHS) -> list[Sample]:
    return [Sample.document(random_ids(length, seed=length), 8) for length in lengths]


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_summed_over_processes_are_one_processs(tmp_path, size):
    def summed(world: World) -> dict[str, torch.Tensor | None]:
        model = make_model()
        for number, sample in enumerate(documents_of()):
            if number % world.size == world.rank:
                uiollms.gradient_step(
                    model, sample, estimator="uio", S=1, rng=number, scale=1 / len(LENGTHS)
                )
        world.sum_gradients(list(model.trainable_parameters().values()))
        return {name: p.grad for name, p in model.trainable_parameters().items()}

    model = make_model()
    for number, sample in enumerate(documents_of()):
        uiollms.gradient_step(
            model, sample, estimator="uio", S=1, rng=number, scale=1 / len(LENGTHS)
        )
    nowhere = {name for name, p in model.trainable_parameters().items() if p.grad is None}
    assert (
        nowhere
    )  # the last layer's encoder LoRA and the repeat token: AdamW must not decay them in any world
    expected = gradients(model)
    first, *others = in_a_world(size, summed, tmp_path)
    assert {name for name, grad in first.items() if grad is None} == nowhere
    assert (
        worst_error(
            {n: g for n, g in first.items() if n not in nowhere},
            {n: expected[n] for n in first.keys() - nowhere},
        )
        < PROVEN
    )
    for other in others:  # to the bit, or the weights would drift apart
        assert all(torch.equal(first[n], other[n]) for n in first.keys() - nowhere)


def test_messages(tmp_path):
    def exchange(world: World) -> tuple:
        whole = torch.arange(6.0).view(6, 1) * (world.rank + 1)
        return (
            world.sum(1, world.rank), world.max(7 - world.rank), world.all_gather(world.rank), world.broadcast([world.rank]),
            world.gather(torch.full((2, 1), world.rank)).flatten().tolist(), world.reduce_scatter(whole).flatten().tolist(),
        )  # fmt: skip

    found = in_a_world(3, exchange, tmp_path)
    for rank, result in enumerate(found):
        assert result == (
            [3, 3],
            7,
            [0, 1, 2],
            [0],
            [0, 0, 1, 1, 2, 2],
            [6.0 * 2 * rank, 6.0 * (2 * rank + 1)],
        )
    assert exchange(ALONE) == ([1, 0], 7, [0], [0], [0, 0], [0, 1, 2, 3, 4, 5])


class Pretended(Group):
    """A process of a larger group that only says which it is."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def test_processes_share_one_stream(workspace, tmp_path):
    """Three take by turns what one takes, short documents skipped, and a restored stream may be
    shared by another number."""
    for name in ("short", "tiny"):
        Path(f"{name}.txt").write_text(name)
    config = load_env_config(
        "env.json", ["train.corpus.0.name=files:*.txt", "train.corpus.0.crop=random"]
    )
    model, tokenizer = load_memory_lm(config, "env.json")

    def taken(samples: SampleStream, count: int, group: Group = ALONE) -> list[tuple]:
        return [
            (d.source, d.sample.rows[0].input_ids.tolist(), d.rng.random())
            for d in samples.take(count, group)
        ]

    alone = SampleStream(config, tokenizer, model)
    expected = taken(alone, 6) + taken(alone, 6)

    def shared(world: World) -> list[tuple]:
        samples = SampleStream(config, tokenizer, model)
        first = taken(samples, 6, world)
        resumed = SampleStream(config, tokenizer, model)
        resumed.load_state_dict(json.loads(json.dumps(samples.state_dict())))
        pair = Group(dist.new_group([0, 1])) if world.rank < 2 else dist.new_group([0, 1])
        return first, taken(resumed, 6, pair) if world.rank < 2 else [], samples.skipped

    found = in_a_world(3, shared, tmp_path)
    assert [
        pair for row in zip(*(first for first, _, _ in found), strict=True) for pair in row
    ] == expected[:6]
    assert [
        pair for row in zip(*(then for _, then, _ in found[:2]), strict=True) for pair in row
    ] == expected[6:]
    assert {skipped for *_, skipped in found} == {found[0][2]} and alone.skipped > found[0][2] > 0
    assert (
        len({number for *_, number in expected}) == 12
    )  # every document has reservoirs of its own


# ---- one document over many processes ------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("chunks", [0, 1, 4, 7])
def test_a_division_deals_every_chunk_once(size, chunks):
    needed = [s for s in range(chunks) if s % 3]
    hands = [Division(Pretended(rank, size), chunks, needed) for rank in range(size)]
    assert sorted(s for hand in hands for s in hand.owned_chunks) == list(range(chunks))
    assert len({len(hand.local_chunks) for hand in hands}) == 1 and all(
        hand.owned_chunks <= set(hand.local_chunks) for hand in hands
    )
    shares = [len(hand.owned_chunks & set(needed)) for hand in hands]
    assert max(shares) - min(shares) <= 1


DROPOUT = MemoryConfig(**MEMORY.model_dump() | dict(lora_dropout=0.4))
ESTIMATORS = [
    dict(estimator="exact"),
    *(dict(estimator=name, S=2) for name in ("tbptt", "uio", "importance")),
]


class Counting(Group):
    """Counts the bytes that this process receives."""

    received = 0

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        self.received += (self.size - 1) * own.numel() * own.element_size()
        return super().gather(own)

    def reduce_scatter(self, whole: torch.Tensor) -> torch.Tensor:
        self.received += (self.size - 1) * whole.numel() // self.size * whole.element_size()
        return super().reduce_scatter(whole)


def chunked_samples() -> list[Sample]:
    ids = random_ids(70)
    return [*protocols(ids).values(), Sample.copy(ids, 8), Sample.document(random_ids(13), 8), Sample.document(ids[:8], 8),
            *samples_with_teachers().values()]  # fmt: skip


def every_step(group: Group) -> list[tuple]:
    """Gradients, NLL, scored tokens of every estimator on every kind of sample, for this
    process. Three chunks a process come in two batches, a shorter sample's keep their graphs."""
    found = []
    model = make_model(config=DROPOUT)
    model.chunk_batch = 2
    model.train()
    for sample in chunked_samples():
        for settings in ESTIMATORS if sample.num_scored > 40 else ESTIMATORS[::2]:
            result = uiollms.gradient_step(model, sample, **settings, rng=3, group=group)
            found.append((gradients(model), result.nll, result.scored, result.reencoded))
    return found


def test_chunks_over_processes_are_one_process(tmp_path):
    """Every estimator, protocol and teacher, with LoRA dropout, on three processes: their
    gradients add up to one's."""
    parts = in_a_world(3, lambda world: every_step(world.chunks), tmp_path, ranks=3)
    for number, expected in enumerate(every_step(ALONE)):
        grads, nlls, scored, reencoded = zip(*(part[number] for part in parts), strict=True)
        total = {name: sum(grad[name] for grad in grads) for name in grads[0]}
        assert worst_error(total, expected[0]) < PROVEN, number
        assert abs(sum(nlls) - expected[1]) < PROVEN * abs(expected[1]) and torch.equal(
            sum(scored), expected[2]
        )
        assert sorted(s for part in reencoded for s in part) == sorted(expected[3])


def test_recent_tokens_over_processes_are_one_process(tmp_path):
    def step(group: Group) -> tuple:
        model = make_model(config=MEMORY.model_copy(update={"recent_tokens": 3}))
        samples = [Sample.document(random_ids(45), 8), samples_with_teachers()["questions, plain"]]
        options = dict(estimator="uio", S=1, rng=[3, 4], group=group)
        results = uiollms.gradient_step(model, samples, **options)
        return gradients(model), sum(result.nll for result in results)

    (one, nll), *others = in_a_world(2, lambda world: step(world.chunks), tmp_path, ranks=2)
    for grads, more in others:
        one, nll = {name: one[name] + grads[name] for name in one}, nll + more
    expected, total = step(ALONE)
    assert worst_error(one, expected) < PROVEN and abs(nll - total) < PROVEN * abs(total)


def test_packed_documents_over_processes_are_one_after_another(tmp_path):
    """Two processes divide the chunks and rows of documents that go through a step together. With
    every estimator, dropout, recent tokens and a teacher, their gradients add up to those of one
    process that takes one document after the other."""
    config = DROPOUT.model_copy(update={"recent_tokens": 3})

    def documents() -> list[Sample]:
        plain = [Sample.document(random_ids(length, seed=length), 8) for length in (45, 19, 26)]
        return [*plain, plain[1].distilled(0.5)]

    def together(world: World) -> list[dict[str, torch.Tensor]]:
        found = []
        for settings in ESTIMATORS:
            model = make_model(config=config).train()
            model.chunk_batch = 3
            rngs = list(range(len(documents())))
            uiollms.gradient_step(model, documents(), **settings, rng=rngs, group=world.chunks)
            found.append(gradients(model))
        return found

    first, second = in_a_world(2, together, tmp_path, ranks=2)
    for settings, one, other in zip(ESTIMATORS, first, second, strict=True):
        model = make_model(config=config).train()
        model.chunk_batch = 3
        for number, sample in enumerate(documents()):
            uiollms.gradient_step(model, sample, **settings, rng=number)
        found = {name: one[name] + other[name] for name in one}
        assert worst_error(found, gradients(model)) < PROVEN, settings


def test_what_a_document_over_processes_sends(tmp_path):
    """The formula at the top of distributed.py, and that both processes have work."""
    model, chunks, layers, heads, size, m = make_model(), 8, 3, 2, 8, 2
    sample = Sample.document(random_ids(8 * (chunks + 1)), 8)

    def received(world: World) -> list[tuple]:
        found = []
        for weights in (
            None,
            row_weights(
                sample,
                torch.rand(chunks + 1, chunks + 1, generator=torch.Generator().manual_seed(0)),
            ),
        ):
            group = Counting(world.group)
            result = uiollms.gradient_step(model, sample, weights=weights, group=group)
            found.append((group.received, len(result.reencoded), int((result.scored > 0).sum())))
        return found

    slot = (
        2 * heads * size * 8 * m * layers
    )  # bytes: keys and values of float64; its gradients' sums are float64 too
    for plain, weighted in in_a_world(2, received, tmp_path, ranks=2):
        assert plain == (2 * slot * chunks // 2, 4, plain[2]) and weighted == (
            3 * slot * chunks // 2,
            4,
            weighted[2],
        )
        assert plain[2] in (4, 5)


def test_a_mesh_of_documents_and_chunks(tmp_path):
    """Four processes, two to a document."""

    def summed(world: World) -> tuple:
        model = make_model()
        for number, sample in enumerate(documents_of()):
            if number % world.data.size == world.data.rank:
                uiollms.gradient_step(
                    model, sample, estimator="uio", S=1, rng=number, scale=1 / 4, group=world.chunks
                )
        world.sum_gradients(list(model.trainable_parameters().values()))
        return gradients(model), (
            world.data.rank,
            world.data.size,
            world.chunks.rank,
            world.chunks.size,
        )

    model = make_model()
    for number, sample in enumerate(documents_of()):
        uiollms.gradient_step(model, sample, estimator="uio", S=1, rng=number, scale=1 / 4)
    expected = gradients(model)
    found = in_a_world(4, summed, tmp_path, ranks=2)
    assert [places for _, places in found] == [
        (0, 2, 0, 2),
        (0, 2, 1, 2),
        (1, 2, 0, 2),
        (1, 2, 1, 2),
    ]
    assert all(worst_error(total, expected) < PROVEN for total, _ in found)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def run_folder(workspace) -> Path:
    """A float64 run of 8 documents in 4 steps, with crops, reservoirs, LoRA dropout and
    documents too short to train."""
    Path("memory.json").write_text(
        json.dumps(dict(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4, lora_dropout=0.2))
    )
    Path("bookshort.txt").write_text("short")
    env = json.loads(Path("env.json").read_text())
    env["model"]["model_dtype"] = "fp64"
    env["train"] |= dict(train_iters=8, save=4, eval=8, accum_grad=2)
    env["train"]["corpus"][0] |= dict(crop="random", truncation=70)
    Path("env.json").write_text(json.dumps(env))
    return workspace / "out"


def in_processes(size: int, *flags: str, said: str = os.devnull) -> list[int]:
    return launched(size, lambda rank: call(*TRAIN, *flags), said)


def outcome(folder: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    last = max(Path(folder, "checkpoints").glob("step-*"))
    tensors = {
        f"{p.relative_to(last)}/{n}": t
        for p in sorted(last.rglob("*.safetensors"))
        for n, t in load_file(p).items()
    }
    return [line for line in lines if "nll" in line], tensors


def test_runs_of_more_processes_are_the_run_of_one(run_folder):
    """Two with accum 1, two to a document, and one that goes on alone where two had been: the
    same metrics and weights."""
    at = "--set=train.run_dir={}".format
    assert call(*TRAIN, at("one"), "--set=train.tasks=[]") == 0
    plain = ("--set=train.tasks=[]", "--set=model.save_ckp=null")
    assert in_processes(2, at("two"), "--set=train.accum_grad=1", *plain) == [0, 0]
    assert in_processes(2, at("chunks"), "--set=train.chunk_parallel=true", *plain) == [0, 0]
    lines, expected = outcome("one")
    for folder in ("two", "chunks"):
        found_lines, found = outcome(folder)
        for line, other in zip(lines, found_lines, strict=True):
            assert all(
                abs(line[k] - other[k]) <= PROVEN * abs(line[k])
                for k in ("nll", "lr", "grad_norm", "tokens")
            ), folder
        assert worst_error(found, expected) < 1e-8, (
            folder
        )  # AdamW divides by the root of small squares
    assert (
        call(
            *TRAIN, "--resume", "two/checkpoints/step-00000004", at("alone"), "--set=train.tasks=[]"
        )
        == 0
    )
    assert worst_error(outcome("alone")[1], expected) < 1e-8
    said = Path("alone/log.txt").read_text()
    assert (
        "changed since the checkpoint: processes: 2 -> 1" in said
        and "changed since the checkpoint: train.accum_grad: 1 -> 2" in said
    )
    assert json.loads(Path("two/versions.json").read_text())["processes"] == "2"


LONG = ("--set=train.train_iters=500", "--set=train.save=1", "--set=train.tasks=[]")


def once_saved(action: Callable[[], None]) -> None:
    """Does it, in a thread, when the run's first checkpoint stands."""

    def wait() -> None:
        while not list(Path("out").glob("checkpoints/step-*")):
            time.sleep(0.02)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_a_killed_process_ends_the_run(run_folder):
    """The other says so in one line, and the checkpoint is whole."""

    def child(rank: int) -> int:
        if rank:
            once_saved(send_signal(signal.SIGKILL))
        return call(*TRAIN, *LONG)

    assert launched(2, child, said="said") == [2, -signal.SIGKILL]
    said = Path("said-0").read_text()
    assert "Traceback" not in said
    assert (
        "another process of this run has ended or cannot be reached"
        in said.strip().splitlines()[-1]
    )
    newest = max(Path("out/checkpoints").glob("step-*"))
    assert (
        call(*TRAIN, "--resume", *LONG[1:], f"--set=train.train_iters={int(newest.name[5:]) + 2}")
        == 0
    )


def test_a_signal_to_one_process_stops_all(run_folder):
    """A second one, as a launcher sends it on when the terminal has told all already, does not
    end it at once."""

    def both() -> None:
        send_signal(signal.SIGINT)()
        time.sleep(0.1)
        send_signal(signal.SIGTERM)()

    def child(rank: int) -> int:
        if rank:
            once_saved(both)
        return call(*TRAIN, *LONG)

    assert launched(2, child) == [130, 130]
    lines, _ = outcome("out")
    assert lines[-1]["iteration"] == int(max(Path("out/checkpoints").glob("step-*")).name[5:]) < 500


def test_a_bad_step_is_skipped_by_all(run_folder):
    """A learning rate that makes everything infinite: all processes count the same steps, and
    stop at the same one."""
    flags = (
        "--set=train.max_lr=1e300",
        "--set=train.tasks=[]",
        "--set=train.train_iters=9",
        "--set=train.max_bad_steps=1",
    )
    assert in_processes(2, *flags, said="said") == [2, 2]
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert all(
        len(line["skipped"]) == 4 for line in lines if "nll" not in line
    )  # the documents of both processes


TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
ACCELERATE = [
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--main_process_port",
]


@pytest.mark.parametrize(
    "launcher",
    [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)],
    ids=["torchrun", "accelerate"],
)
def test_launchers(run_folder, launcher):
    """The commands of docs/processes.md."""
    command = [sys.executable, "-m", *launcher, str(free_port())]
    command += [str(ROOT / "train.py"), "--env_conf", "env.json"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 8, 8] and "eval" in lines[-1]
    assert done.stdout.count("trained parameters") == 1


def test_a_world_smaller_than_asked_for_warns(run_folder, monkeypatch, caplog):
    """What `accelerate launch --cpu --num_processes 2` of accelerate 1.15 sets, and what a batch
    system does."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert call(*TRAIN, "--set=train.train_iters=2", "--set=train.tasks=[]") == 0
    assert (
        "several processes were requested, 1 trains here: start them with torchrun" in caplog.text
    )
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert call(*TRAIN, "--resume", "--set=train.train_iters=4", "--set=train.tasks=[]") == 0
    assert "4 processes were requested, 1 trains here" in caplog.text


def test_chunk_ranks_must_divide(run_folder):
    flags = ("--set=train.chunk_parallel=true", "--set=train.chunk_ranks=2")
    assert in_processes(3, *flags, said="said") == [2, 2, 2]
    assert (
        "train.chunk_ranks: 2 processes per document do not divide the 3 processes of this run"
        in Path("said-0").read_text()
    )


# ---- models that do not fit ----------------------------------------------------------------------


def test_a_base_sharded_by_fsdp(tmp_path):
    """As docs/devices.md has it: frozen linear layers sharded, documents of equal length; equal
    gradients."""

    def document(rank: int) -> Sample:
        return Sample.document(random_ids(38, seed=rank), 8)

    def summed(world: World) -> tuple:
        model = make_model()
        whole = sum(p.numel() for layer in model.base.model.layers for p in layer.parameters())
        mesh = init_device_mesh("cpu", (world.size,))
        for layer in model.base.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    fully_shard(module, mesh=mesh)
        uiollms.gradient_step(
            model, document(world.rank), estimator="tbptt", S=2, scale=1 / world.size
        )
        world.sum_gradients(list(model.trainable_parameters().values()))
        parts = [p for layer in model.base.model.layers for p in layer.parameters()]
        return gradients(model), sum(
            (p.to_local() if isinstance(p, DTensor) else p).numel() for p in parts
        ) / whole

    model = make_model()
    for rank in range(2):
        uiollms.gradient_step(model, document(rank), estimator="tbptt", S=2, scale=1 / 2)
    expected = gradients(model)
    for found, share in in_a_world(2, summed, tmp_path):
        assert worst_error(found, expected) < PROVEN and share < 0.51
