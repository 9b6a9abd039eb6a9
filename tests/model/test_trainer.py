"""transformers' own Trainer over a MemoryLM."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import make_model, random_ids
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import uiollms
from uiollms import MemoryConfig, MemoryLM

ROUNDING = 1e-5  # float32, over a few hundred operations
DOCUMENTS = [random_ids(30, seed=seed) for seed in range(16)]  # almost four chunks


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(DOCUMENTS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(input_ids=DOCUMENTS[index], labels=DOCUMENTS[index])


def make_named_model(family: str = "smollm2") -> MemoryLM:
    model = make_model(family, torch.float32)
    model.base.config._name_or_path = "someone/base"
    return model


def make_trainer(folder: Path, model: MemoryLM | None = None, **options) -> Trainer:
    options = dict(max_steps=6, save_steps=2, logging_steps=1, learning_rate=1e-2) | options
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(
        model=model or make_named_model(),
        args=arguments,
        train_dataset=Texts(),
        eval_dataset=Texts(),
    )


@pytest.fixture
def warnings() -> list[str]:
    """The messages that transformers logs during the test."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


def test_a_resumed_run_has_the_same_weights(tmp_path, warnings):
    before = make_named_model().memory_state_dict()
    whole = make_trainer(tmp_path / "run")
    whole.train()
    trained = whole.model.memory_state_dict()
    moved = {name for name in trained if not torch.equal(trained[name], before[name])}
    # Nothing reads the outputs of the encoder's last layer, and nothing here is a reconstruction.
    assert moved == {n for n in before if "encoder.layers.2" not in n and "repeat" not in n}
    frozen = make_named_model().base.state_dict()
    assert_equal(whole.model.base.state_dict(), frozen)

    resumed = make_trainer(tmp_path / "run", model=make_named_model())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal(resumed.model.memory_state_dict(), trained)
    assert not [message for message in warnings if "missing keys" in message]
    # Its checkpoints have replaced the first run's, with the Trainer's files beside them.
    names = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert {"optimizer.pt", "trainer_state.json", "memory_config.json"} <= names

    # Checkpoints are in the folder to which the Trainer saves last.
    resumed.save_model()
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").is_file()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-6"):
        loaded = MemoryLM.from_pretrained(folder, base=make_named_model().base)
        assert_equal(loaded.memory_state_dict(), trained)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, warnings):
    options = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    trainer = make_trainer(tmp_path, learning_rate=1.0, **options)  # far too large
    losses = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    losses += [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = Path(trainer.state.best_model_checkpoint)
    loaded = MemoryLM.from_pretrained(best, base=make_named_model().base)
    assert_equal(trainer.model.memory_state_dict(), loaded.memory_state_dict())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses[1:]), rel=ROUNDING)
    assert not [message for message in warnings if "missing keys" in message]


def test_the_loss_is_that_of_the_document_protocol(tmp_path):
    trainer = make_trainer(tmp_path)
    nlls = [uiollms.score(trainer.model, ids, "document").nll for ids in DOCUMENTS]
    expected = torch.cat(nlls).double().mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=ROUNDING)


class Gradients(TrainerCallback):
    """Stores the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **unused) -> None:
        self.checkpointing = model.checkpointing
        parameters = model.trainable_parameters()
        self.found = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(tmp_path, family):
    found = []
    for checkpointing in (False, True):
        options = dict(max_steps=1, max_grad_norm=0.0, gradient_checkpointing=checkpointing)
        gradients = Gradients()
        trainer = make_trainer(tmp_path, make_named_model(family), **options)
        trainer.add_callback(gradients)
        trainer.train()
        assert gradients.checkpointing == checkpointing
        found.append(gradients.found)
    assert len(found[0]) == 2 * 2 * 2 * 2 + 2 * 2 + 1  # LoRA of encoder and decoder, a token
    assert_equal(found[1], found[0])


def test_the_example_of_the_docs(tmp_path, monkeypatch, tiny_folder):
    """Runs the code of the section of docs/using.md, on a small model and with a small dataset."""
    page = (Path(__file__).parents[2] / "docs" / "using.md").read_text()
    section = page.partition("## With the classes of Hugging Face")[2].partition("\n## ")[0]
    blocks = [block.partition("```")[0] for block in section.split("```python\n")[1:]]
    assert len(blocks) == 3
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    memory = MemoryConfig(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4)
    monkeypatch.chdir(tiny_folder.parent)  # the base is found by the last part of its path
    MemoryLM(base, memory).save_pretrained(tmp_path / "my-model")
    names = {"dataset": Texts()}
    for block in blocks:
        for name in ("my-model", "run"):
            block = block.replace(f'"{name}', f'"{tmp_path / name}')
        block = block.replace("max_steps=4", "max_steps=4, report_to=[], use_cpu=True")
        exec(compile(block, "docs/using.md", "exec"), names)
    assert type(names["model"]) is MemoryLM
    assert_equal(names["model"].memory_state_dict(), names["trainer"].model.memory_state_dict())
