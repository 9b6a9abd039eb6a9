"""One model used by many threads. Each thread gets the result that it would get alone, and the base
is not changed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import MEMORY, gradients, make_base, make_model, random_ids
from processes import run_forked
from torch import Tensor

from uiollms import MemoryLM, gradient_step, score
from uiollms.data.sample import Sample
from uiollms.distributed.device_map import place_modules
from uiollms.evaluation.attention_mass import attention_fractions
from uiollms.model.fingerprint import hash_tensors
from uiollms.model.skeleton import make_skeleton
from uiollms.model.state import KVBuffer

THREADS = 50
DROPPING = MEMORY.model_copy(update={"lora_dropout": 0.5})


def run_concurrently(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Runs each call in its own thread, all started at the same time, and returns the results."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Tensor]) -> Tensor:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_hashing_works_in_a_forked_process():
    """In the child of a process that has set its number of threads, torch makes its thread pool
    again at the first parallel operation, which two threads must not do at the same time."""
    torch.set_num_threads(torch.get_num_threads())
    tensors = {f"{i}": torch.randn(256, 256) for i in range(64)}
    expected = hash_tensors(tensors)

    def hash_again() -> int:
        return int(hash_tensors(tensors) != expected)

    assert [run_forked(hash_again) for _ in range(40)] == [0] * 40


def mixed_calls(model: MemoryLM) -> list[Callable[[], Tensor]]:
    """Returns calls that score, generate, compress, run streams with and without a graph, and run
    the base alone."""
    texts = [random_ids(20 + i % 9, seed=i) for i in range(THREADS)]

    def encoder_gradient(ids: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = model(ids[None], labels=ids[None]).loss
            return torch.autograd.grad(loss, [model.encoder.get_parameter("retrieval_token")])[0]

    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda ids: score(model, ids).nll,
        lambda ids: score(model, ids, mode="raw").nll,
        lambda ids: model.generate(ids[None], max_new_tokens=8, do_sample=False),
        lambda ids: model.compress(ids).slots,
        lambda ids: model(ids[None]).logits,
        encoder_gradient,
        lambda ids: model.base(ids[None]).logits,
        lambda ids: model.encode_layers(ids[None, :8], seeds=[int(ids[0])])[-1],
        lambda ids: attention_fractions(model, ids),
    ]
    return [lambda i=i: kinds[i % len(kinds)](texts[i]) for i in range(THREADS)]  # type: ignore[misc]


@pytest.mark.parametrize("weights", ["in memory", "on disk"])
def test_fifty_threads_get_the_results_of_single_calls(tmp_path: Path, weights: str) -> None:
    """The results are equal to the bit, because the same kernels run on the same numbers. Weights on
    disk are loaded into the modules during a call."""
    base = make_base("qwen3")
    if weights == "on disk":
        place_modules(
            base, {"model": "cpu", "model.layers.1": "disk", "lm_head": "disk"}, "e.json", tmp_path
        )
    model = MemoryLM(base, DROPPING)
    model.load_memory_state_dict(make_model("qwen3").memory_state_dict())
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        calls = mixed_calls(model)
        alone = [call() for call in calls]
        for _ in range(2):
            for i, (found, expected) in enumerate(zip(run_concurrently(calls), alone, strict=True)):
                assert torch.equal(found, expected), i


def test_threads_can_share_a_base_that_accelerate_offloads() -> None:
    base, texts = (
        make_base(dtype=torch.float32),
        [random_ids(20 + i % 9, seed=i) for i in range(THREADS)],
    )
    with pytest.raises(
        ValueError, match="a float64 base whose weights are offloaded is not supported"
    ):
        MemoryLM(accelerate.cpu_offload(make_base()), MEMORY)
    plain = make_model(dtype=torch.float32)
    alone = [score(plain, ids).nll for ids in texts]
    model = MemoryLM(accelerate.cpu_offload(base), MEMORY)
    model.load_memory_state_dict(plain.memory_state_dict())
    calls = [lambda ids=ids: score(model, ids).nll for ids in texts]
    for found, expected in zip(run_concurrently(calls), alone, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_many_threads_can_continue_one_state() -> None:
    """The keys and values of an open chunk are in one buffer. One thread may append to it, and the
    others copy it."""
    model, ids = make_model(), random_ids(1, 19)
    state = model(ids).past_key_values
    state = model(
        ids[:, :1], state
    ).past_key_values  # the open chunk is now in buffers with free entries
    assert state.buffers
    calls = [lambda i=i: model(random_ids(1, 3, seed=i), state).logits for i in range(THREADS)]
    fresh = [
        model(torch.cat([ids, ids[:, :1], random_ids(1, 3, seed=i)], 1)).logits[:, -3:]
        for i in range(THREADS)
    ]
    for found, expected in zip(run_concurrently(calls), fresh, strict=True):
        assert torch.allclose(
            found, expected, atol=1e-12
        )  # float64; the same sums are split in another way


def test_entries_of_a_buffer_can_be_claimed_once() -> None:
    buffer = KVBuffer(torch.zeros(1, 1, 9, 1), torch.zeros(1, 1, 9, 1), 4)
    assert [buffer.claim(4, 2), buffer.claim(4, 2), buffer.claim(6, 1), buffer.length] == [
        True,
        False,
        True,
        7,
    ]


def test_models_with_one_base_can_train_concurrently() -> None:
    """Each model adds its LoRA to the layers that all of them share."""
    base = make_base()
    models = [MemoryLM(base, DROPPING) for _ in range(4)]
    for seed, model in enumerate(models):
        model.load_memory_state_dict(make_model(seed=seed).memory_state_dict())
        model.train()

    def step(i: int) -> Tensor:
        gradient_step(
            models[i],
            Sample.language_modeling(random_ids(30, seed=i), 8),
            estimator="uio",
            S=1,
            rng=i,
        )
        return torch.cat([g.flatten() for g in gradients(models[i]).values()])

    calls = [lambda i=i: step(i) for i in range(len(models))]
    alone = [call() for call in calls]
    for found, expected in zip(run_concurrently(calls), alone, strict=True):
        assert torch.equal(found, expected)


# ---- shells --------------------------------------------------------------------------------------


def test_a_skeleton_shares_the_parts_of_the_base_and_does_not_change_it() -> None:
    base = make_base("qwen3")
    base.set_attn_implementation("eager")
    names, before = set(dict(base.named_modules())), base.config.to_dict()
    model = MemoryLM(base, MEMORY)
    layer, shell = base.model.layers[1], model.encoder_layers[1]
    assert shell.mlp is layer.mlp and shell.self_attn.k_norm is layer.self_attn.k_norm
    assert shell is not layer and shell.self_attn is not layer.self_attn
    assert shell.self_attn.q_proj.linear is layer.self_attn.q_proj
    assert set(dict(base.named_modules())) == names and base.config.to_dict() == before
    assert not any("encoder_layers" in name for name in model.state_dict())
    hooks = [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]
    model(random_ids(1, 20))
    assert not hooks and base.config._attn_implementation == "eager"


@torch.no_grad()
def test_a_forward_that_a_library_replaces_on_a_layer_is_not_used_by_its_shell() -> None:
    """accelerate and torch.compile set a `forward` on the instance, which would run the original
    layer."""
    base = make_base()
    expected = MemoryLM(base, MEMORY)(random_ids(1, 20)).logits
    for layer in base.model.layers:
        layer._old_forward, layer.forward = layer.forward, lambda *_, **__: 1 / 0
    assert torch.equal(MemoryLM(base, MEMORY)(random_ids(1, 20)).logits, expected)


@torch.no_grad()
def test_a_copy_of_a_model_shares_no_weights() -> None:
    model, ids = make_model(), random_ids(1, 20)
    expected = model(ids).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(ids).logits, expected)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(model(ids).logits, expected) and not torch.equal(other(ids).logits, expected)
    assert torch.equal(
        model.to(torch.float32)(ids).logits.isfinite(), torch.ones_like(expected, dtype=torch.bool)
    )


def test_a_base_with_sharded_layers_raises_an_error() -> None:
    """fully_shard gives a module a class that inherits from the module's class and FSDPModule."""
    from torch.distributed.fsdp import FSDPModule

    base = make_base()
    layer = base.model.layers[0]
    layer.__class__ = type("FSDPLayer", (FSDPModule, type(layer)), {})
    with pytest.raises(
        ValueError,
        match="whole layers of the base are sharded by FSDP; shard its linear layers only",
    ):
        MemoryLM(base, MEMORY)


@torch.no_grad()
def test_forward_hooks_of_a_layer_run_for_its_shell() -> None:
    base, shapes = make_base(), []
    base.model.layers[1].register_forward_hook(
        lambda module, args, output: shapes.append(output.shape)
    )
    layers = make_skeleton(base)
    model = MemoryLM(base, MEMORY)
    model(random_ids(1, 8))
    assert len(layers) == 3 and shapes
