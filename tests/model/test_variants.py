"""Settings of the release and of a table in the paper: trained parameters in the base's dtype, and no
transfer head."""

import json
from pathlib import Path

import pytest
import torch
from conftest import MEMORY, gradients, make_base, make_model, random_ids, worst_error
from safetensors.torch import load_file
from test_commands import call

import uiollms
from uiollms import ConfigError, MemoryConfig, MemoryLM, Sample
from uiollms.config.load import load_env_config
from uiollms.planning.planner import make_plan
from uiollms.weights.adapters import load_weights, save_weights

TRAIN = ["train.py", "--env_conf", "env.json"]
WITHOUT = MemoryConfig(**MEMORY.model_dump() | dict(transfer_head=False))


# ---- "master_dtype": "base" ----------------------------------------------------------------------


@pytest.mark.parametrize("masters, expected", [("fp32", torch.float32), ("base", torch.bfloat16)])
def test_trained_parameters_have_the_master_dtype(masters, expected):
    """Their gradients and the optimizer's moments have it too. With a float64 base it is always
    float64."""
    model = MemoryLM(make_base(dtype=torch.bfloat16), MEMORY, masters)
    parameters = list(model.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    uiollms.gradient_step(model, Sample.document(random_ids(30), 8), estimator="uio", S=1, rng=0)
    optimizer.step()
    trained = [p for p in parameters if p.grad is not None]
    moments = [
        t for state in optimizer.state.values() for name, t in state.items() if name != "step"
    ]
    assert len(trained) > 10 and len(moments) == 2 * len(trained)
    assert {t.dtype for t in (*parameters, *(p.grad for p in trained), *moments)} == {expected}
    assert MemoryLM(make_base(dtype=torch.float64), MEMORY, masters).master_dtype == torch.float64


def test_sums_of_memory_gradients_have_the_master_dtype(monkeypatch):
    dtypes = []
    original = uiollms.training.step.MemoryGradients.__init__

    def recording(self, *args):
        original(self, *args)
        dtypes.append({t.dtype for t in (*self.total, *self.weighted)})

    monkeypatch.setattr(uiollms.training.step.MemoryGradients, "__init__", recording)
    for masters in ("fp32", "base"):
        model = MemoryLM(make_base(dtype=torch.bfloat16), MEMORY, masters)
        result = uiollms.gradient_step(
            model, Sample.document(random_ids(30), 8), estimator="uio", S=1, rng=0
        )
        assert result.nll.dtype == torch.float32  # a reported loss is no sum of gradients
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


def test_small_steps_vanish_in_the_bases_dtype(workspace, capsys):
    """With small updates most parameters do not change in bfloat16, while in float32 they do. The
    checkpoint has the master dtype of the run, and the run resumes only with that dtype."""
    changes = (
        "model.model_dtype=bf16",
        "train.tasks=[]",
        "train.max_lr=1e-5",
        "train.warmup=0",
        "train.save=1",
    )
    changed = {}
    for masters in ("fp32", "base"):
        settings = (
            f"train.master_dtype={masters}",
            f"train.run_dir={masters}",
            f"model.save_ckp={masters}.pth",
        )
        flags = [f"--set={change}" for change in (*changes, *settings)]
        assert call(*TRAIN, *flags) == 0
        saved = Path(masters) / "checkpoints" / "step-00000003"
        dtype = torch.float32 if masters == "fp32" else torch.bfloat16
        assert {t.dtype for t in torch.load(f"{masters}.pth", weights_only=True)} == {dtype}
        moments = load_file(saved / "optimizer.safetensors")
        assert {t.dtype for name, t in moments.items() if not name.endswith(".step")} == {dtype}
        model, _ = uiollms.build.load_memory_lm(
            load_env_config("env.json", [c[6:] for c in flags]), "env.json"
        )
        fresh = model.trainable_parameters()["encoder.layers.0.q_proj.lora_A"].detach().clone()
        load_weights(model, saved)
        changed[masters] = (
            (model.trainable_parameters()["encoder.layers.0.q_proj.lora_A"] != fresh).float().mean()
        )
    assert changed["fp32"] > 0.9 and changed["base"] < 0.5
    other = [flag.replace("master_dtype=base", "master_dtype=fp32") for flag in flags]
    assert call(*TRAIN, "--resume", *other) == 2
    assert (
        'train.master_dtype: "base" -> "fp32": a resumed run cannot change this'
        in capsys.readouterr().err
    )
    assert call(*TRAIN, "--resume", *flags, "--set=train.train_iters=4") == 0


def test_the_plan_depends_on_the_master_dtype(workspace):
    needs = {}
    for masters in ("fp32", "base"):
        changes = ["model.model_dtype=bf16", f"train.master_dtype={masters}"]
        plan = make_plan(load_env_config("env.json", changes), "env.json")
        (needs[masters],) = plan.need.values()
    assert needs["base"].kv_gradients == needs["fp32"].kv_gradients / 2
    assert needs["base"].trained < 0.6 * needs["fp32"].trained


# ---- "transfer_head": false ----------------------------------------------------------------------


def test_without_a_transfer_head_memory_is_read_through_the_frozen_weights(family):
    """Logits and gradients equal those with a decoder LoRA of zeros. The token is the only trained
    parameter of the decoder."""
    whole = make_model(family)
    for name, parameter in whole.trainable_parameters().items():
        if name.startswith("decoder.layers."):
            torch.nn.init.zeros_(parameter)
    bare = MemoryLM(whole.base, WITHOUT)
    rest = {
        n: t for n, t in whole.memory_state_dict().items() if not n.startswith("decoder.layers.")
    }
    bare.load_memory_state_dict(rest)
    assert set(bare.trainable_parameters()) == set(rest)
    ids = random_ids(1, 30)
    assert torch.equal(bare(ids).logits, whole(ids).logits)
    sample = Sample.document(ids[0], 8)
    for estimator in ("exact", "uio"):
        found, expected = [], []
        for model, into in ((bare, found), (whole, expected)):
            uiollms.gradient_step(model, sample, estimator=estimator, S=1, rng=0)
            into.append(gradients(model))
        assert any(t.abs().max() > 0 for t in found[0].values())
        expected = {name: t for name, t in expected[0].items() if name in rest}
        assert worst_error(found[0], expected) < 1e-12  # float64, the same products


@pytest.mark.parametrize("name", ["folder", "list.pth"])
def test_weights_without_a_transfer_head_are_saved_and_loaded(tmp_path, name):
    base = make_base(dtype=torch.float32)
    model, other = MemoryLM(base, WITHOUT), MemoryLM(base, WITHOUT)
    torch.nn.init.normal_(model.encoder.get_parameter("retrieval_token"))
    save_weights(model, tmp_path / name)
    load_weights(other, tmp_path / name)
    assert all(
        torch.equal(t, other.memory_state_dict()[k]) for k, t in model.memory_state_dict().items()
    )
    message = (
        "transfer_head False, the config has True" if name == "folder" else "expected a list of"
    )
    with pytest.raises(ConfigError, match=message):
        load_weights(MemoryLM(base, MEMORY), tmp_path / name)


def test_a_run_without_a_transfer_head(workspace):
    """It trains, resumes and plans. It cannot resume with a transfer head."""
    Path("memory.json").write_text(
        json.dumps(json.loads(Path("memory.json").read_text()) | dict(transfer_head=False))
    )
    assert call(*TRAIN) == 0
    line = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0])
    assert line["grad_norms"]["decoder_lora"] == 0 and line["grad_norms"]["encoder_lora"] > 0
    assert not Path("out/ckp/decoder").exists()
    assert call(*TRAIN, "--resume", "--set=train.train_iters=4") == 0
    assert call("test.py", "--env_conf", "env.json") == 0
    assert make_plan(load_env_config("env.json"), "env.json").flops > 0
    Path("memory.json").write_text(
        json.dumps(json.loads(Path("memory.json").read_text()) | dict(transfer_head=True))
    )
    assert call(*TRAIN, "--resume", "--set=train.train_iters=5") == 2
