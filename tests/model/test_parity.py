"""Comparison with recordings of the authors' program: all values and gradients of every case.

The relative tolerance is 1e-9 in float64, against `f64r32`, a recording whose RoPE tables are float32
like those of transformers. It is 1e-4 in float32, where both sides round at every operation and in
different orders. The cases are in tests/parity/ and, where it exists, in ../shared/golden/.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import uiollms
from uiollms.training.estimators import all_pairs
from uiollms.weights.adapters import load_weights, save_weights

HERE = Path(__file__).parents[1]
SHARED = HERE.parent.parent / "shared" / "golden"
CASES = {
    d.name: d
    for root in (HERE / "parity", SHARED)
    if root.is_dir()
    for d in sorted(root.iterdir())
    if d.is_dir()
}
PRECISIONS = {"f64r32": (torch.float64, 1e-9), "f32": (torch.float32, 1e-4)}


class Case:
    def __init__(self, folder: Path, precision: str) -> None:
        self.dtype, self.tolerance = PRECISIONS[precision]
        self.meta = json.loads((folder / "meta.json").read_text())
        self.facts = self.meta["facts"][precision]
        self.forward = load_file(folder / f"forward_{precision}.safetensors")
        self.grads = load_file(folder / f"grads_{precision}.safetensors")
        self.data = load_file(folder / "data.safetensors")
        self.ids = self.data["input_ids"]
        shape = self.meta["model_config"]
        heads = shape["num_heads"]
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocab_size"],
                hidden_size=shape["hidden_size"],
                intermediate_size=shape["intermediate_size"],
                num_hidden_layers=shape["num_layers"],
                num_attention_heads=heads,
                num_key_value_heads=heads,
                rms_norm_eps=shape["rms_norm_eps"],
                rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
                max_position_embeddings=4096,
            )
        ).to(self.dtype)
        weights = load_file(folder / "weights.safetensors")
        base.load_state_dict(
            {k.removeprefix("base."): v for k, v in weights.items() if k.startswith("base.")}
        )
        self.model = uiollms.MemoryLM(base, uiollms.MemoryConfig(**self.meta["ccf_config"]))
        self.model.load_memory_state_dict(
            {k: v for k, v in weights.items() if not k.startswith("base.")}
        )
        self.chunk_size = self.model.memory_config.chunk_size

    def check(self, found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        error = relative_error(found, expected)
        assert error <= self.tolerance, f"{what}: relative error {error:.1e}"

    def recording(self, name: str) -> tuple[uiollms.Sample, torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the sample, the weight matrix and the gradients by name of a recording, such as
        "lm.tbptt2". Skips the test if this precision has no such recording."""
        protocol, mode = name.split(".")
        found = {
            k.removeprefix(f"{name}."): v for k, v in self.grads.items() if k.startswith(f"{name}.")
        }
        found.pop("memory_grad", None)
        if not found:
            pytest.skip("this precision has no such recording")
        if protocol == "lm":
            sample = uiollms.Sample.language_modeling(self.ids, self.chunk_size)
        else:
            sample = uiollms.Sample.beacon(self.ids, self.data["beacon_labels"], self.chunk_size)
        weights = all_pairs(len(sample.rows))
        if mode != "full":
            draws = [draw["j"] for draw in self.facts["gradients"][protocol][mode]["draws"]]
            weights = uiollms.window_from_draws(draws, int(mode[5]), compensate=False)
        return sample, weights, found


_built: dict[tuple[str, str], Case] = {}


@pytest.fixture(params=[(c, p) for c in CASES for p in PRECISIONS], ids="-".join)
def case(request) -> Case:
    name, precision = request.param
    return _built.setdefault(request.param, Case(CASES[name], precision))


def test_memories_equal_the_recording(case):
    full = case.ids.shape[1] // case.chunk_size
    memory = case.model.encode(case.ids[0, : full * case.chunk_size].view(full, -1))
    case.check(
        memory.transpose(0, 1), case.forward["memory"], "memory [chunk, layer, slot, hidden]"
    )


def test_logits_of_full_and_open_chunks_equal_the_recording(case):
    case.check(case.model(case.ids).logits, case.forward["logits.chunked"], "logits")


def test_logits_of_several_calls_equal_the_recording(case):
    expected = case.forward.get("logits.pieces_aligned", case.forward["logits.chunked"])
    state, pieces, start = None, [], 0
    for length in case.facts["pieces_aligned"]["lengths"]:
        output = case.model(case.ids[:, start : start + length], state)
        state, start = output.past_key_values, start + length
        pieces.append(output.logits)
    case.check(torch.cat(pieces, 1), expected, "logits by pieces")


def test_perplexity_equals_the_recording(case):
    score = uiollms.score(case.model, case.ids, "paper")
    case.check(-score.nll, case.forward["ppl.logprobs"], "log-probabilities")
    facts = case.facts["perplexity"]
    assert score.perplexity == pytest.approx(facts["first_instance"], rel=case.tolerance)
    second = uiollms.score(case.model, case.data["input_ids_second"], "paper")
    assert second.perplexity == pytest.approx(
        facts["second_instance_with_reset"], rel=case.tolerance
    )


@pytest.mark.parametrize("kind", ["ids", "ids_eos"])
def test_greedy_generation_equals_the_recording(case, kind):
    facts = case.facts["generate"]
    found = case.model.generate(
        case.ids[:, : facts["prompt_len"]],
        do_sample=False,
        max_new_tokens=facts["max_new_tokens"],
        eos_token_id=facts["eos_for_ids_eos"] if kind == "ids_eos" else None,
    )
    assert torch.equal(found, case.forward[f"generate.{kind}"])


def test_logits_during_generation_equal_the_recording(case):
    """Each new token is fed in a separate call, as in generation."""
    prompt = case.facts["generate"]["prompt_len"]
    new = case.forward["generate.ids"][:, prompt:]
    state = case.model(case.forward["generate.ids"][:, :prompt]).past_key_values
    logits = []
    for i in range(new.shape[1]):
        output = case.model(new[:, i : i + 1], state)
        state = output.past_key_values
        logits.append(output.logits)
    case.check(
        torch.cat(logits, 1)[:, :-1], case.forward["generate.logits"][:, 1:], "generation logits"
    )


def test_auto_encoding_equals_the_recording(case):
    case.check(
        case.model.reconstruct(case.ids[:, : case.chunk_size]),
        case.forward["ae.logits"],
        "auto-encoding logits",
    )


RECORDED = [
    "lm.full",
    "lm.tbptt1",
    "lm.tbptt2",
    "lm.tbptt4",
    "lm.tbptt4_last_admitted",
    "beacon.full",
    "beacon.tbptt2",
]


@pytest.mark.parametrize("chunk_batch", [1, 3, 8])
@pytest.mark.parametrize("recorded", RECORDED)
def test_gradients_and_losses_equal_the_recording(case, recorded, chunk_batch):
    protocol = recorded.split(".")[0]
    sample, weights, expected = case.recording(recorded)
    case.model.chunk_batch = chunk_batch
    for parameter in case.model.trainable_parameters().values():
        parameter.grad = None
    result = uiollms.gradient_step(case.model, sample, weights=weights)

    for name, parameter in case.model.trainable_parameters().items():
        if name in expected:
            case.check(parameter.grad, expected[name], name)
        else:  # nothing reads the last layer's encoder LoRA and the repeat token here
            assert parameter.grad is None, name
    losses = case.forward[f"{protocol}.losses"]
    scored = ~losses.isnan()
    case.check(result.losses[scored], losses[scored], "losses")
    facts = case.facts[f"{protocol}_losses"]
    assert result.scored.tolist() == facts["scored_tokens_per_chunk"]


def test_the_authors_checkpoint_can_be_loaded_and_saved(tmp_path):
    folder = CASES["c32_m4"]
    model = Case(folder, "f32").model
    expected = {k: v.clone() for k, v in model.memory_state_dict().items()}
    assert list(expected) == json.loads((folder / "meta.json").read_text())["ft_param_order"]
    for parameter in model.trainable_parameters().values():
        torch.nn.init.zeros_(parameter)
    load_weights(model, folder / "reference_checkpoint.pth")
    assert all(torch.equal(v, expected[k]) for k, v in model.memory_state_dict().items())
    save_weights(model, tmp_path / "copy.pth")
    theirs = torch.load(folder / "reference_checkpoint.pth", weights_only=True)
    ours = torch.load(tmp_path / "copy.pth", weights_only=True)
    assert len(ours) == len(theirs) and all(
        torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )
