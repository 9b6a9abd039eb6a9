"""Tests on a GPU. It must give the CPU's values and gradients in every precision, and a step must
not make the CPU wait for it.

    python -m pytest -m gpu                              on a machine with CUDA
    UIOLLMS_TEST_DEVICE=cpu python -m pytest -m gpu      the same tests on the CPU

Tolerances: float64 has 1e-6, because transformers' RoPE tables are float32 and a GPU computes other
cosines there. float32 without TF32 has 1e-4, because a GPU adds in another order. bfloat16 has 8
significant bits: 3e-2 is a few roundings in each of three layers, while a wrong mask or position
changes values by tenths.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_train
from benchmarks.cuda_graphs import Recorder
from conftest import MEMORY, gradients, make_model, random_ids, relative_error, worst_error
from processes import TRAIN
from safetensors.torch import load_file
from test_commands import call
from test_memory_attention import joined_attention
from test_parity import CASES, Case

import uiollms
from uiollms.config.load import load_env_config
from uiollms.kernels.devices import upload
from uiollms.kernels.flash_calls import supports_flash
from uiollms.kernels.memory_attention import MemoryLayout, memory_attention
from uiollms.model import state
from uiollms.training.optimizer import make_optimizer, optimizer_step

DEVICE = torch.device(os.environ.get("UIOLLMS_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    yield
    torch.set_float32_matmul_precision(before)


def case_on_device(name: str, precision: str) -> Case:
    """Returns a recording of the authors' program with its model on the tested device."""
    case = Case(CASES[name], precision)
    case.model.to(DEVICE)
    case.tolerance = max(case.tolerance, 1e-6)
    return case


@pytest.mark.parametrize("precision", ["f32", "f64r32"])
@pytest.mark.parametrize("recorded", ["lm.full", "lm.tbptt2", "beacon.tbptt2"])
def test_recordings_of_the_authors_program(precision, recorded):
    case = case_on_device("c32_m4", precision)
    sample, weights, expected = case.recording(recorded)
    uiollms.gradient_step(case.model, sample, weights=weights)
    found = case.model.trainable_parameters()
    for name, gradient in expected.items():
        case.check(found[name].grad.cpu(), gradient, name)


@pytest.mark.parametrize("precision", ["f32", "f64r32"])
def test_recorded_memories_and_logits(precision):
    case = case_on_device("c32_m4", precision)
    full = case.ids.shape[1] // case.chunk_size * case.chunk_size
    memory = case.model.encode(case.ids[0, :full].view(-1, case.chunk_size)).cpu()
    case.check(memory.transpose(0, 1), case.forward["memory"], "memory")
    case.check(case.model(case.ids).logits.cpu(), case.forward["logits.chunked"], "logits")


@pytest.mark.parametrize("chunk_batch", [1, 4])
@pytest.mark.parametrize("estimator", ["exact", "uio", "tbptt", "importance"])
def test_gradients_equal_those_of_the_cpu(family, estimator, chunk_batch):
    sample = uiollms.Sample.document(random_ids(45), MEMORY.chunk_size)
    settings = dict(estimator=estimator, rng=3)
    settings |= {} if estimator == "exact" else dict(S=2)
    model = make_model(family, torch.float32)
    model.chunk_batch = chunk_batch
    uiollms.gradient_step(model, sample, **settings)
    expected = gradients(model)
    model.to(DEVICE)
    uiollms.gradient_step(model, sample, **settings)
    found = {name: gradient.cpu() for name, gradient in gradients(model).items()}
    assert worst_error(found, expected) < 1e-4


def test_bfloat16_stays_near_float32(family):
    sample = uiollms.Sample.document(random_ids(45), MEMORY.chunk_size)
    wide, half = (make_model(family, dtype) for dtype in (torch.float32, torch.bfloat16))
    half.base.load_state_dict(wide.base.state_dict())
    half.load_memory_state_dict(wide.memory_state_dict())
    wide, half = wide.to(DEVICE), half.to(DEVICE)
    losses = [uiollms.gradient_step(model, sample).losses.cpu() for model in (wide, half)]
    assert relative_error(losses[1], losses[0]) < 3e-2
    joined = [
        torch.cat([gradient.flatten().double().cpu() for gradient in gradients(model).values()])
        for model in (wide, half)
    ]
    assert torch.cosine_similarity(*joined, dim=0) > 0.99


HALF = [torch.bfloat16, torch.float16]


def needs_flash(dtype: torch.dtype) -> None:
    """Skips a test where torch has no flash kernels for the card."""
    if not supports_flash(torch.empty(0, 64, dtype=dtype, device=DEVICE)):
        pytest.skip("torch has no flash kernels for this card")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize(
    "num_slots, first_slots",
    [
        ((130, 130, 130), None),
        ((8, 40, 200), None),
        ((0, 3, 6), None),
        ((40, 40, 72, 8), (0, 0, 72, 144)),  # rows of several documents
    ],
)
def test_flash_calls_give_the_attention_of_one_softmax(
    dtype, heads, kv_heads, num_slots, first_slots
):
    """Values and gradients are compared with one masked SDPA in float64 on the CPU, with the same
    numbers. The largest difference is 1 % of the largest value: a few roundings of bfloat16."""
    needs_flash(dtype)
    torch.manual_seed(0)
    last = max(n + f for n, f in zip(num_slots, first_slots or [0] * 4, strict=False))
    shapes = [(heads, 65), (kv_heads, 65), (kv_heads, 65), (kv_heads, last), (kv_heads, last)]
    wide = [
        torch.randn(1 if i > 2 else len(num_slots), h, t, 64).to(dtype).double().requires_grad_()
        for i, (h, t) in enumerate(shapes)
    ]
    half = [tensor.detach().to(DEVICE, dtype).requires_grad_() for tensor in wide]
    expected = joined_attention(*wide, num_slots, 0.3, first_slots)
    layout = MemoryLayout(num_slots, first_slots or [0] * len(num_slots), 65, DEVICE)
    found = memory_attention(*half, layout, 0.3).transpose(1, 2)
    grad = torch.randn(expected.shape).to(dtype)
    pairs = zip(
        (found, *torch.autograd.grad(found, half, grad.to(DEVICE))),
        (expected, *torch.autograd.grad(expected, wide, grad.double())),
        strict=True,
    )
    for a, b in pairs:
        assert relative_error(a.double().cpu(), b) < 1e-2


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("estimator", ["exact", "uio", "tbptt", "importance"])
def test_steps_with_flash_calls_give_those_with_a_mask(estimator, documents, monkeypatch):
    """The tolerance is that of bfloat16, as above; on a CPU the gradients differ by 0.6 % of their
    norm. Some chunks are singled out by `uio`, and several documents are packed into one step."""
    needs_flash(torch.bfloat16)
    samples = [
        uiollms.Sample.document(random_ids(n, seed=n), MEMORY.chunk_size)
        for n in (45, 30, 26)[:documents]
    ]
    # With 5 all chunks are drawn, whatever rounding does to the norms that `importance` reads.
    settings = dict(estimator=estimator)
    settings |= {} if estimator == "exact" else dict(S=5 if estimator == "importance" else 2)
    found = []
    for in_place in (True, False):
        if not in_place:
            monkeypatch.setattr(state, "supports_flash", lambda tensor: False)
        model = make_model("llama", torch.float32)
        model.base.to(torch.bfloat16)
        model.chunk_batch = 4
        rngs = [3 + i for i in range(documents)]
        results = uiollms.gradient_step(model.to(DEVICE), samples, rng=rngs, **settings)
        losses = torch.cat([result.losses.float().cpu() for result in results])
        joined = torch.cat([g.flatten().double().cpu() for g in gradients(model).values()])
        found.append((losses, joined))
    assert relative_error(found[0][0], found[1][0]) < 3e-2
    difference = (found[0][1] - found[1][1]).norm() / found[1][1].norm()
    assert difference < 3e-2


@pytest.mark.parametrize("mode", ["memory", "window", "raw"])
def test_scores_equal_those_of_the_cpu(family, mode):
    model, ids = make_model(family, torch.float32), random_ids(45)
    expected = uiollms.score(model, ids, "document", mode).nll
    found = uiollms.score(model.to(DEVICE), ids, "document", mode).nll
    assert relative_error(found.cpu(), expected) < 1e-4


def test_generation_equals_that_of_the_cpu(family):
    model, ids = make_model(family, torch.float32), random_ids(1, 13)
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
    expected = model.generate(ids, **options)
    found = model.to(DEVICE).generate(ids.to(DEVICE), **options)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.skipif(not ON_GPU, reason="nothing waits for a CPU")
@pytest.mark.parametrize("estimator", ["exact", "uio"])
def test_a_step_never_waits_for_the_gpu(estimator):
    model = make_model("llama", torch.float32).to(DEVICE)
    sample = uiollms.Sample.document(random_ids(45), MEMORY.chunk_size)
    settings = dict(estimator=estimator, rng=0, report_all=False)
    settings |= {} if estimator == "exact" else dict(S=2)
    # The first step loads kernels and builds tables, which may wait.
    uiollms.gradient_step(model, sample, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        uiollms.gradient_step(model, sample, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not ON_GPU, reason="a CPU copies nothing")
def test_uploads_from_pinned_memory_arrive_whole():
    """The GPU is busy while 40 uploads are queued, and their sources are overwritten at once. So
    pinned memory that was reused too early would arrive with later numbers."""
    busy = torch.ones(4096, 4096, device=DEVICE)
    busy @= busy
    found = []
    for i in range(40):
        sources = [torch.full((1000,), i), torch.full((70, 3), float(i))]
        found.append(upload(sources, DEVICE))
        for source in sources:
            source.fill_(-1)
    for i, tensors in enumerate(found):
        assert [tensor.shape for tensor in tensors] == [(1000,), (70, 3)]
        assert all((tensor == i).all() for tensor in tensors)


def test_the_optimizer_gives_the_weights_of_the_cpu(workspace):
    """Three steps of AdamW. float32 has 1e-4, as above."""
    train = load_env_config("env.json").train
    weights = []
    for device in ("cpu", DEVICE):
        model = make_model("llama", torch.float32).to(device)
        optimizer = make_optimizer(model, train)
        for seed in range(3):
            sample = uiollms.Sample.document(random_ids(45, seed=seed), MEMORY.chunk_size)
            uiollms.gradient_step(model, sample)
            optimizer_step(optimizer, 1e-3, 1.0)
        weights.append({n: p.detach().cpu() for n, p in model.trainable_parameters().items()})
    assert worst_error(weights[1], weights[0]) < 1e-4


def test_the_plan_is_what_the_allocator_takes():
    """On a GPU the plan is within 10 % of what the allocator reserves with growing segments: the
    rest is the workspace of cuBLAS, and the granularity of segments. On a CPU it is within 3 % of
    the tensors, because the ids of a tiny model's document count."""
    model, case = ("midsize", "exact:16384:32") if ON_GPU else ("tiny", "exact:256:4")
    command = [sys.executable, "-m", "benchmarks.gpu_speed", "--device", DEVICE.type]
    command += ["--model", model, "--cases", case]
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    settings["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert ran.returncode == 0, ran.stderr
    line = json.loads(ran.stdout.splitlines()[-1])
    if ON_GPU:
        assert abs(line["plan_error_reserved"]) < 0.1, line
    assert abs(line["plan_error"]) < (0.1 if ON_GPU else 0.03), line


def test_packed_documents_never_wait_and_equal_separate_ones():
    """Two steps on three documents of different lengths. Their token ids come from pinned memory,
    which must not be used again before it is read, so the second step follows at once."""
    model = make_model("llama", torch.float32).to(DEVICE)
    steps = [
        [uiollms.Sample.document(random_ids(n, seed=n + step), 8) for n in (43, 19, 27)]
        for step in range(2)
    ]
    options = dict(estimator="uio", S=2, report_all=False)
    for samples in steps:
        for i, sample in enumerate(samples):
            uiollms.gradient_step(model, sample, rng=i, **options)
    expected = gradients(model)
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for samples in steps:
            uiollms.gradient_step(model, samples, rng=[0, 1, 2], **options)
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert worst_error(gradients(model), expected) < 1e-4


def test_uploaded_tensors_have_the_values_of_the_cpu():
    """Many copies from pinned memory follow each other, while the GPU is busy with the first."""
    large = torch.rand(2048, 2048, device=DEVICE)
    for _ in range(20):
        large = large @ large / 1024
    groups = [[torch.arange(i, i + 999), torch.full((3, 5), i / 3)] for i in range(200)]
    for group, found in [(group, upload(group, DEVICE)) for group in groups]:
        for tensor, other in zip(group, found, strict=True):
            assert other.device.type == DEVICE.type and torch.equal(tensor, other.cpu())


def test_the_optimizer_of_a_gpu_gives_the_update_of_the_cpu(workspace):
    """On a GPU it is the fused form. The tolerance is that of float32 above."""
    train = load_env_config("env.json").train
    updated = []
    for device in (torch.device("cpu"), DEVICE):
        model = make_model("llama", torch.float32).to(device)
        optimizer = make_optimizer(model, train)
        assert optimizer.defaults["fused"] is (True if device.type == "cuda" else None)
        for step in range(3):
            sample = uiollms.Sample.document(random_ids(30, seed=step), MEMORY.chunk_size)
            uiollms.gradient_step(model, sample, rng=0)
            optimizer_step(optimizer, 1e-3, 1.0)
        updated.append({name: t.cpu() for name, t in model.memory_state_dict().items()})
    assert worst_error(updated[1], updated[0]) < 1e-4


def test_a_compiled_encoder_gives_the_gradients_of_a_plain_one():
    """It compiles for a minute. Float32 without TF32, see above."""
    model = make_model("llama", torch.float32).to(DEVICE)
    sample = uiollms.Sample.document(random_ids(45), MEMORY.chunk_size)
    expected = []
    for model.compile_encoder in (False, True):
        uiollms.gradient_step(model, sample, estimator="exact")
        expected.append(gradients(model))
    assert worst_error(*expected) < 1e-4


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(workspace):
    """A run of three steps is repeated from the checkpoint of step 2. The weights are equal bit for
    bit on a CPU. A GPU may add gradients in another order, which is 1e-5 in float32 after a
    step."""
    where = f"--set=model.device_map={0 if ON_GPU else 'cpu'}"
    assert call(*TRAIN, where, "--set=train.save=2") == 0
    expected = trained_tensors(workspace / "out" / "ckp")
    (workspace / "out" / "checkpoints" / "step-00000002").rename("moved")
    assert call(*TRAIN, where, "--resume", "moved") == 0
    found = trained_tensors(workspace / "out" / "ckp")
    assert found.keys() == expected.keys() and len(found) > 10
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < 1e-5, name


def trained_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.parent.name} {name}": t for f in files for name, t in load_file(f).items()}


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_recorded_steps_give_the_gradients_of_plain_ones():
    """The tolerance of float32 is 1e-4, as above. The second batch differs from the recorded
    one."""
    model = make_model("llama").float().to(DEVICE)
    batches = [documents(seed) for seed in (0, 1)]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        loss, reported = gpu_train.Documents(*tensors).losses(model, 0.5)
        loss.backward()
        return reported.detach()

    expected = [(run(*batch), gradients(model)) for batch in batches]
    # The recorded kernels add to gradients, so gradients must exist before the recording.
    run(*batches[0])
    recorded = Recorder().record(run, *batches[0])
    parameters = model.trainable_parameters()
    for batch, (reported, by_name) in zip(batches, expected, strict=True):
        model.zero_grad(set_to_none=False)
        assert torch.allclose(recorded(*batch), reported, rtol=1e-4)
        found = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()
        }
        assert worst_error(found, by_name) < 1e-4


def documents(seed: int) -> gpu_train.Documents:
    """Returns three documents of four chunks. In the third, the last three tokens are values to
    recall."""
    l = MEMORY.chunk_size
    text, recall = torch.zeros(3, 3 * l), torch.zeros(3, 3 * l)
    text[:2] = 1 / (2 * 3 * l)
    recall[2, -3:] = 1 / 3
    ids = random_ids(3, 4 * l + 1, seed=seed)
    return gpu_train.Documents(*(tensor.to(DEVICE) for tensor in (ids, text, recall)))
