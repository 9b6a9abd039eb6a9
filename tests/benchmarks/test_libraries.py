"""Tests of the comparison with libraries, on the CPU. A library that is missing is replaced by a
module with its signatures."""

import json
import sys
from types import ModuleType

import pytest
import torch
from benchmarks import libraries
from torch.nn import functional as F

CPU = torch.device("cpu")
TASKS = libraries.make_tasks(libraries.SHAPES["tiny"], torch.float32, CPU)


# The signatures of liger-kernel 0.8.5, liger_kernel/transformers/functional.py. None of its kernels
# runs on a CPU.
def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
    label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
    chunk_mem_const=1,
):  # fmt: skip
    return F.cross_entropy(input @ weight.T, target, reduction=reduction)


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place
    return F.rms_norm(X, W.shape, W, eps)


def liger_swiglu(a, b):
    return F.silu(a) * b


@pytest.fixture
def liger(monkeypatch):
    module = ModuleType("liger_kernel.transformers.functional")
    for function in (liger_fused_linear_cross_entropy, liger_rms_norm, liger_swiglu):
        setattr(module, function.__name__, function)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def eager(task: libraries.Task) -> libraries.Task:
    """Leaves out torch.compile, which takes half a minute."""
    ways = {name: way for name, way in task.ways.items() if name != "torch.compile"}
    return task._replace(ways=ways)


@pytest.mark.parametrize("name", list(TASKS))
def test_every_way_computes_the_same(name, liger):
    """In float32, 1e-5 is a hundred roundings of numbers of the size of the largest."""
    found = {line["way"]: line for line in libraries.compare(eager(TASKS[name]), 1, CPU)}
    missing = {way for way, line in found.items() if "left_out" in line}
    absent = set() if hasattr(F, "linear_cross_entropy") else {w for w in found if "linear_" in w}
    assert missing == absent | ({"FA4"} & set(found)) and next(iter(found)) == "ours"
    for way in found.keys() - missing:
        line = found[way]
        assert line["error"] < 1e-5 and line["gradient_error"] < 1e-5, line
        assert line["seconds"] > 0 and line["peak_mib"] > 0 and line["time / ours"] > 0


def test_a_wrong_way_is_seen():
    """The gradient of the second way is twice as large."""

    def twice_the_gradient(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product = F.silu(gate) * up
        return 2 * product - product.detach()

    wrong = libraries.Way(lambda: twice_the_gradient)
    task = TASKS["gate of the MLP"]._replace(ways={"ours": libraries.GATES["ours"], "wrong": wrong})
    found = list(libraries.compare(task, 1, CPU))
    assert found[1]["error"] < 1e-5 and found[1]["gradient_error"] == pytest.approx(1, rel=0.01)


def test_a_missing_library_is_left_out_with_the_reason(capsys):
    libraries.main("--shapes tiny --repeats 1 --tasks attention".split())
    lines = {line["way"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert "flash_attn" in lines["FA4"]["left_out"] and lines["masked SDPA"]["error"] < 1e-5


def test_fa4_is_active_during_a_call_alone(monkeypatch):
    """torch's registry has a stand-in for FA4, whose kernels need a GPU."""
    registry = pytest.importorskip("torch.nn.attention._registry")

    class Handle:
        def remove(self):
            removed.append(True)

    removed = []
    monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, "FA4", Handle)
    with pytest.raises(ZeroDivisionError), libraries.fa4():
        assert torch.nn.attention.current_flash_attention_impl() == "FA4"
        raise ZeroDivisionError
    assert torch.nn.attention.current_flash_attention_impl() is None and removed == [True]
