"""Tests on a GPU. It must give the CPU's values and gradients in every precision, and a step must
not make the CPU wait for it.

    python -m pytest -m gpu                              on a machine with CUDA
    UIOLLMS_TEST_DEVICE=cpu python -m pytest -m gpu      the same tests on the CPU

Tolerances: float64 has 1e-6, because transformers' RoPE tables are float32 and a GPU computes other
cosines there. float32 without TF32 has 1e-4, because a GPU adds in another order. bfloat16 has 8
significant bits: 3e-2 is a few roundings in each of three layers, while a wrong mask or position
changes values by tenths.
"""

import os
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_train
from benchmarks.cuda_graphs import Recorder
from conftest import MEMORY, gradients, make_model, random_ids, relative_error, worst_error
from processes import TRAIN
from safetensors.torch import load_file
from test_commands import call
from test_parity import CASES, Case

import uiollms

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
