"""Bases of 4 bits. A stand-in layer that stores packed bytes runs everywhere; bitsandbytes' own
layers run where the package is installed, on a CPU.

Tolerance against a base that stores the same matrices unpacked, in float32: 1e-5, a few hundred
roundings of 6e-8. A gradient through a wrong matrix differs by tenths.
"""

import importlib.util

import pytest
import torch
from conftest import MEMORY, gradients, make_base, random_ids, relative_error, worst_error
from test_commands import call
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import uiollms
from uiollms import MemoryLM, Sample
from uiollms.build import check_env, count_parameters, load_memory_lm
from uiollms.config.load import load_env_config
from uiollms.distributed.device_map import CPU, place_modules
from uiollms.files.errors import ConfigError
from uiollms.kernels import quantized
from uiollms.kernels.quantized import keep_differentiable
from uiollms.model.fingerprint import fingerprint
from uiollms.planning.step_simulation import StepSimulation
from uiollms.runs.checks import check_training
from uiollms.weights.base_models import load_causal_lm, resolve_dtype

NEAR = 1e-5
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes"
)


class PackedLinear(nn.Linear):
    """Stores a weight [O, I] as two 4-bit numbers a byte, [O * I / 2, 1], with one scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (linear.weight.detach() / self.scale).round().add(8).to(torch.uint8).flatten()
        packed = (codes[::2] * 16 + codes[1::2])[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)

    def matrix(self) -> torch.Tensor:
        codes = torch.cat([self.weight // 16, self.weight % 16], 1).view(
            self.out_features, self.in_features
        )
        return (codes.to(self.scale.dtype) - 8) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.matrix().to(x.dtype), self.bias)


def replace_linears(base, make) -> None:
    for layer in base.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, make(child))


def unpacked(linear) -> nn.Linear:
    plain = nn.Linear(
        linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=torch.float32
    )
    weight = linear.matrix() if hasattr(linear, "matrix") else dequantised(linear.weight)
    plain.weight.data = weight.float()
    if linear.bias is not None:
        plain.bias.data = linear.bias.data
    return plain


def dequantised(weight) -> torch.Tensor:
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def with_random_weights(base) -> MemoryLM:
    model = MemoryLM(base, MEMORY)
    torch.manual_seed(3)
    for parameter in model.trainable_parameters().values():
        nn.init.normal_(parameter, std=0.3)
    return model


def check_like_plain(packed: MemoryLM, plain: MemoryLM) -> None:
    """Steps with graphs of one batch and of several, scores and generation."""
    assert packed.dtype == packed.master_dtype == torch.float32
    shapes = {name: p.shape for name, p in plain.trainable_parameters().items()}
    assert {name: p.shape for name, p in packed.trainable_parameters().items()} == shapes
    assert all(p.dtype == torch.float32 for p in packed.trainable_parameters().values())
    assert count_parameters(packed) == count_parameters(plain)
    ids = random_ids(45)
    before = uiollms.score(packed, ids).nll  # a call without a graph changes nothing
    assert relative_error(before, uiollms.score(plain, ids).nll) < NEAR
    for batch in (2, 8):
        packed.chunk_batch = plain.chunk_batch = batch
        results = [
            uiollms.gradient_step(each, Sample.document(ids, 8), estimator="uio", S=2, rng=1)
            for each in (packed, plain)
        ]
        assert relative_error(results[0].losses, results[1].losses) < NEAR
        assert worst_error(gradients(packed), gradients(plain)) < NEAR
    assert torch.equal(uiollms.score(packed, ids).nll, before)
    options = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(packed.generate(ids[None], **options), plain.generate(ids[None], **options))


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without and with biases
def test_layers_that_store_packed_bytes(name, tmp_path):
    base, other = (make_base(name, torch.float32) for _ in range(2))
    replace_linears(base, PackedLinear)
    replace_linears(other, PackedLinear)
    replace_linears(other, unpacked)
    packed, plain = with_random_weights(base), with_random_weights(other)
    check_like_plain(packed, plain)
    packed.base.config._name_or_path = "packed"
    packed.save_pretrained(tmp_path / "saved")
    again = MemoryLM.from_pretrained(tmp_path / "saved", base=base)
    assert fingerprint(again) == fingerprint(packed)


def test_layers_are_not_packed_for_inference():
    """A layer of bitsandbytes packs its weights at the first call without a graph, and its later
    results have no gradient. The stand-in behaves so."""

    class Inference(PackedLinear):
        support_avx512bf16_for_cpu, without_gradient = True, False

        def state_dict(self, *arguments, **options):
            self.without_gradient = False
            return super().state_dict(*arguments, **options)

        def forward(self, x):
            if self.support_avx512bf16_for_cpu and not (self.training or x.requires_grad):
                self.without_gradient = True
            result = super().forward(x)
            return result.detach() if self.without_gradient else result

    linear = Inference(nn.Linear(4, 4)).eval()
    x = torch.ones(1, 4)
    linear(x)
    assert not linear(x.requires_grad_()).requires_grad
    keep_differentiable(nn.ModuleList([linear]))
    linear(torch.ones(1, 4))
    assert linear(x).requires_grad


@needs_bitsandbytes
def test_bitsandbytes_in_four_bits(workspace, tiny_folder):
    """A config with nf4: a step, scores and saved weights, against the dequantised matrices. The
    matrices have at least one block of 64 numbers."""
    import bitsandbytes

    config = load_env_config("env.json", ["model.quantization=nf4"])
    check_training(config, "env.json")
    loaded, _ = load_memory_lm(config, "env.json")
    linear = loaded.base.model.layers[0].self_attn.q_proj
    assert isinstance(linear, bitsandbytes.nn.Linear4bit)
    assert linear.weight.dtype == torch.uint8 and linear.weight.quant_state.quant_type == "nf4"
    other = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    for layer, quantised in zip(other.model.layers, loaded.base.model.layers, strict=True):
        for name, child in list(layer.named_modules()):
            if isinstance(child, nn.Linear):
                child.weight.data = dequantised(quantised.get_submodule(name).weight).float()
    check_like_plain(with_random_weights(loaded.base), with_random_weights(other))


@needs_bitsandbytes
def test_a_run_in_four_bits(workspace, capsys):
    """Training and evaluation as commands, a saved base of 4 bits, and its fingerprint."""
    flags = ("--env_conf", "env.json", "--set=model.quantization=nf4")
    assert call("train.py", *flags) == call("test.py", *flags) == 0
    model, _ = load_memory_lm(load_env_config("env.json", ["model.quantization=nf4"]), "env.json")
    model.save_pretrained("whole", include_base=True)
    again = MemoryLM.from_pretrained("whole", dtype=torch.float32)
    assert again.base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert not fingerprint(again).differences(model)
    with pytest.raises(ConfigError, match="left for the disk, where weights of 4 bits cannot be"):
        place_modules(again.base, {"": "disk"}, "e.json")
    weight = again.base.model.layers[0].mlp.up_proj.weight
    weight.quant_state.absmax *= 2  # the same codes with other scales are another base
    assert fingerprint(again).base_weights != fingerprint(model).base_weights


@needs_bitsandbytes
def test_a_folder_is_loaded_in_four_bits(workspace, tiny_folder):
    """`quantization` gives the base that a config with nf4 gives."""
    config = load_env_config("env.json", ["model.quantization=nf4"])
    expected, _ = load_memory_lm(config, "env.json")
    expected.save_pretrained("model")
    for base in (None, str(tiny_folder)):
        loaded = MemoryLM.from_pretrained(
            "model", base=base, dtype=torch.float32, quantization="nf4"
        )
        assert loaded.base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        assert not fingerprint(loaded).differences(expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(quantization="int8"), "quantization 'int8' is not known; use \"nf4\" or None"),
        (dict(quantization="nf4", dtype="fp64"), 'quantization "nf4" computes in at most 32 bits'),
        (dict(quantization="nf4", base=make_base()), "the given base is loaded already"),
    ],
)
def test_what_a_folder_in_four_bits_cannot_be(workspace, tiny_folder, settings, message):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    MemoryLM(base, MEMORY).save_pretrained("model")
    with pytest.raises(ValueError, match=message):
        MemoryLM.from_pretrained("model", **settings)


def test_the_package_is_missing(workspace, monkeypatch, tiny_folder):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    config = load_env_config("env.json", ["model.quantization=nf4"])
    message = r'model.quantization: "nf4": the package bitsandbytes is not installed; run: pip'
    with pytest.raises(ConfigError, match=f"env.json: {message}"):
        check_training(config, "env.json")
    with pytest.raises(ConfigError, match=message):
        load_causal_lm(str(tiny_folder), "nf4", dtype=torch.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.model_dtype=fp64", 'model.quantization: "nf4" computes in at most 32 bits'),
        ('model.device_map={"":"disk"}', 'model.device_map: puts modules on "disk", where weights'),
    ],
)
def test_what_four_bits_cannot_do(workspace, change, message):
    with pytest.raises(ConfigError, match=message):
        check_env(load_env_config("env.json", ["model.quantization=nf4", change]), "env.json")


def test_the_plan_counts_four_bits(workspace):
    """Of every matrix but the largest, 4.5 bits a number instead of 32."""
    plain, packed = (
        StepSimulation(load_env_config("env.json", flags), "env.json", {CPU: 2**40})
        for flags in ([], ["model.quantization=nf4"])
    )
    numbers = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) - 32 * 48
    saved = plain.need(4, 4)[CPU].weights - packed.need(4, 4)[CPU].weights
    assert saved == round(numbers * (4 - 4.5 / 8))


# ---- float16 -------------------------------------------------------------------------------------


def test_float16_is_refused_for_training(workspace):
    config = load_env_config("env.json", ["model.model_dtype=fp16"])
    message = 'env.json: model.model_dtype: found "fp16", in which gradients vanish; training takes'
    for check in (check_training, check_env):
        with pytest.raises(ConfigError, match=message):
            check(config, "env.json")
    model = MemoryLM(make_base(dtype=torch.float16), MEMORY)
    with pytest.raises(ValueError, match="gradient_step: the base is in float16, in which"):
        uiollms.gradient_step(model, Sample.document(random_ids(20), 8))
    assert uiollms.score(model, random_ids(20)).nll.isfinite().all()  # evaluation works


@pytest.mark.parametrize("native", [False, True])
def test_auto_is_never_float16(monkeypatch, native):
    monkeypatch.setattr("uiollms.weights.base_models.computes_bf16", lambda device: native)
    expected = torch.bfloat16 if native else torch.float32
    assert resolve_dtype("auto", CPU) == resolve_dtype("auto", torch.device("cuda", 0)) == expected
