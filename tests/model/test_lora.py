"""Tests that LoRA weights which are scaled and converted once a step give the values and gradients
of those that every call converts again."""

from __future__ import annotations

import pytest
import torch
from conftest import MEMORY, gradients, make_model, random_ids
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import uiollms
from uiollms import Sample
from uiollms.model.lora import LoRA, convert_once


def convert_in_every_call(self, x, seeds=None):
    """The slow, obvious `LoRA.forward`: autograd differentiates the conversions of every call."""
    if self.dropout and seeds is not None:
        x = x * self._dropout_mask(x, seeds)
    down = F.linear(x, self.lora_A.to(x.dtype))
    return F.linear(down, (self.scaling * self.lora_B).to(x.dtype))


class Conversions(TorchDispatchMode):
    """Counts the kernels that convert a matrix of
    rank 3 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.converted = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        of_lora = args and isinstance(args[0], torch.Tensor) and args[0].dim() == 2
        if of_lora and 3 in args[0].shape and func is torch.ops.aten._to_copy.default:
            self.converted += kwargs.get("dtype") == torch.bfloat16
        return func(*args, **kwargs)


def step(chunk_batch: int, checkpointing: bool, dtype: torch.dtype, estimator: str):
    """Returns the losses and gradients of a step on three documents with dropout. alpha / rank is
    7 / 3, which no dtype represents exactly."""
    changes = dict(lora_dropout=0.3, lora_alpha=7)
    model = make_model(dtype=dtype, config=MEMORY.model_copy(update=changes)).train()
    model.chunk_batch, model.checkpointing = chunk_batch, checkpointing
    samples = [Sample.document(random_ids(length, seed=length), 8) for length in (43, 19, 26)]
    results = uiollms.gradient_step(model, samples, estimator=estimator, S=2, rng=[1, 2, 3])
    return [result.losses for result in results], gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk_batch", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_convert_once_change_no_bit(monkeypatch, dtype, chunk_batch, checkpointing):
    """With a bfloat16 base the parameters are float32, and so are the sums of their gradients over
    the batches: a sum in bfloat16 would differ in its third digit."""
    found = step(chunk_batch, checkpointing, dtype, "uio")
    monkeypatch.setattr(LoRA, "forward", convert_in_every_call)
    expected = step(chunk_batch, checkpointing, dtype, "uio")
    assert all(map(torch.equal, found[0], expected[0]))
    for name, gradient in expected[1].items():
        assert gradient.dtype == torch.float32 and torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("chunk_batch", [1, 64])
def test_a_step_converts_each_weight_once(chunk_batch):
    """Two layers of the encoder and three of the decoder have two LoRAs each, however many batches
    there are."""
    with Conversions() as counts:
        step(chunk_batch, False, torch.bfloat16, "exact")
    assert counts.converted == 2 * 2 * (2 + 3)


def test_a_conversion_ends_with_its_context():
    """Outside of the context a call uses the parameters as they are now."""
    layer = LoRA(torch.nn.Linear(4, 4), 2, 4, 0.0, 0, torch.float32)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 3, 4, dtype=torch.bfloat16)
    with convert_once(), torch.no_grad():
        before = layer(x)
        layer.lora_B.mul_(2)
        assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), 2 * before)


def test_gradients_are_added_in_the_dtype_of_the_parameters():
    """The sum of five gradients in bfloat16 would lose their last digits, within one graph too."""
    layer = LoRA(torch.nn.Linear(4, 4), 2, 4, 0.0, 0, torch.float32)
    torch.nn.init.normal_(layer.lora_B)
    inputs = torch.randn(5, 1, 3, 4).bfloat16()
    with convert_once():
        with torch.no_grad():
            layer(inputs[0])
        torch.stack([layer(x).sum() for x in inputs]).sum().backward()
    found = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
    layer.zero_grad()
    for x in reversed(inputs):  # the order of autograd
        convert_in_every_call(layer, x).sum().backward()
    assert torch.equal(found[0], layer.lora_A.grad) and torch.equal(found[1], layer.lora_B.grad)
