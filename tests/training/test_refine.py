"""Training of the slots of one memory, with frozen weights."""

import math

import pytest
import torch
from conftest import make_model, random_ids, relative_error
from torch.nn import functional as F

from uiollms import ConfigError, Memory
from uiollms.model.state import KVPrefix, join_slots
from uiollms.training.refine import HELD_OUT, Refinement, Settings, distillation_gradients

SETTINGS = Settings(passage_size=6, num_passages=3, lr=0.05)
ROUNDING = 1e-10  # float64, over three layers


def refinement_of(model, length=8 * 9 + 3, settings=SETTINGS) -> Refinement:
    return Refinement(model, model.compress(random_ids(length), source="a book"), settings)


def slow_gradients(model, refinement, starts) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns loss and gradients of one graph, in which every row has a copy of the memory, and the
    KL comes from all logits."""
    sample = refinement.passages(starts)
    leaves = [layer.clone().requires_grad_() for layer in refinement.slots()]
    keys, values = model.project(leaves, range(len(sample.chunks)))
    loss = torch.zeros((), dtype=torch.float64)
    first = refinement.context(starts[0])
    context = refinement.text[first : first + refinement.context_size]
    for row in sample.rows:
        prefix = KVPrefix([[join_slots(k, 1)] for k in keys], [[join_slots(v, 1)] for v in values])
        num_slots = [row.num_memories * model.memory_config.num_memory]
        hidden = model.decode(row.input_ids[None], prefix, num_slots)
        student = model.logits(hidden)[0].log_softmax(-1)
        with torch.no_grad():
            logits = model.base(torch.cat([context, row.input_ids])[None]).logits[0]
        teacher = logits[len(context) :].log_softmax(-1)
        kl = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        loss = loss + (kl * row.token_weights)[row.scored].sum()
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def gradients_at(refinement, starts) -> tuple[float, list[torch.Tensor]]:
    sample, teachers = refinement.passages(starts), refinement.teacher_hidden(starts)
    return distillation_gradients(refinement.model, sample, refinement.slots(), teachers)


@pytest.mark.parametrize("chunk_batch", [1, 4])
def test_gradients_equal_those_of_one_graph(family, chunk_batch):
    model = make_model(family)
    model.chunk_batch = chunk_batch
    refinement, starts = refinement_of(model), [0, 11, 40]
    expected_loss, expected = slow_gradients(model, refinement, starts)
    loss, found = gradients_at(refinement, starts)
    assert loss == pytest.approx(expected_loss.item(), rel=ROUNDING) and loss > 0
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < ROUNDING
    assert all(p.grad is None for p in model.trainable_parameters().values())


def test_steps_bring_the_student_nearer_to_the_teacher_and_change_no_weight():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refinement = refinement_of(model)
    starts = refinement.starts
    first, _ = gradients_at(refinement, starts)
    for _ in range(20):
        refinement.step()
    last, _ = gradients_at(refinement, starts)
    assert last < 0.9 * first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_refined_memory_is_used_and_saved_as_any_other(tmp_path):
    model = make_model()
    refinement = refinement_of(model)
    refinement.step()
    refinement.best_nll = math.inf
    refinement.select()
    memory = refinement.memory()
    memory.save(tmp_path / "refined.mem")
    loaded = Memory.load(tmp_path / "refined.mem", model)
    original = refinement.original
    assert torch.equal(loaded.slots, memory.slots)
    assert not torch.equal(loaded.slots, original.slots)
    assert torch.equal(loaded.chunk_ids, original.chunk_ids)
    assert loaded.state(model).num_tokens == original.num_tokens


@torch.no_grad()
def test_the_nll_is_of_held_out_passages_after_all_slots():
    model = make_model()
    refinement = refinement_of(model)
    state = refinement.original.state(model)
    size, nlls = SETTINGS.passage_size, []
    for start in refinement.held_out:
        ids = refinement.text[start : start + size]
        prefix = state.prefix(state.num_slots, with_local=False)
        logits = model.logits(model.decode(ids[None], prefix, [state.num_slots]))[0, :-1]
        nlls.append(F.cross_entropy(logits, ids[1:], reduction="none"))
    found = refinement.nll(refinement.slots())
    assert found == pytest.approx(torch.cat(nlls).mean().item(), rel=ROUNDING)
    recent = []
    for start in refinement.held_out:
        first, end = max(0, start - state.num_slots), start + size
        logits = model.base(refinement.text[None, first:end]).logits[0, start - first : -1]
        ids = refinement.text[start + 1 : end]
        recent.append(F.cross_entropy(logits, ids, reduction="none"))
    expected = torch.cat(recent).mean().item()
    assert refinement.nll_of_recent() == pytest.approx(expected, rel=ROUNDING)
    # Slots of another document, of another length.
    other = list(model.compress(random_ids(8 * 4, seed=5), source="other").slots)
    assert refinement.nll(other) != pytest.approx(found, rel=1e-6)


def test_training_never_touches_a_held_out_token():
    refinement = refinement_of(make_model())
    size = SETTINGS.passage_size
    trained = {t for start in refinement.starts for t in range(start, start + size)}
    measuring, selecting = (
        {t for start in starts for t in range(start, start + size)}
        for starts in (refinement.held_out, refinement.selecting)
    )
    assert not trained & measuring and not trained & selecting and not measuring & selecting
    assert len(trained | measuring | selecting) == len(refinement.text)
    assert len(refinement.held_out) == len(refinement.text) // size // HELD_OUT
    assert len(refinement.selecting) >= len(refinement.held_out)


def test_the_result_are_the_slots_that_predict_the_selecting_passages_best():
    refinement = refinement_of(make_model())
    tried = [(refinement.nll(refinement.slots(), refinement.selecting), refinement.slots())]
    assert refinement.best_nll == tried[0][0]
    for _ in range(12):
        refinement.step()
        tried.append((refinement.select(), refinement.slots()))
    step = min(range(len(tried)), key=lambda i: tried[i][0])
    assert refinement.best_step == step and refinement.best_nll == tried[step][0]
    assert torch.equal(refinement.memory().slots, torch.stack(tried[step][1]))


@pytest.mark.parametrize("start", [0, 30, 66])
def test_the_teacher_reads_the_text_around_a_passage(start):
    """The text of 72 tokens and a passage of 6 do not fit the 64 positions of the base."""
    refinement = refinement_of(make_model())
    size, first = SETTINGS.passage_size, refinement.context(start)
    assert refinement.context_size == 64 - size
    assert 0 <= first <= start and start + size <= first + 64 - size <= len(refinement.text)
    assert len(refinement.starts_of) == 2  # from 0 and 14


def test_a_resumed_refinement_gives_the_same_slots(tmp_path):
    whole, first, second = (refinement_of(make_model()) for _ in range(3))
    for _ in range(5):
        whole.step()
        whole.select()
    for _ in range(3):
        first.step()
        first.select()
    first.save_state(tmp_path / "state")
    second.load_state(tmp_path / "state")
    assert second.num_steps == 3
    assert second.best_step == first.best_step and second.best_nll == first.best_nll
    assert torch.equal(first.memory().slots, second.memory().slots)
    for _ in range(2):
        second.step()
        second.select()
    assert torch.equal(torch.stack(whole.slots()), torch.stack(second.slots()))
    assert torch.equal(whole.memory().slots, second.memory().slots)


def test_states_of_other_settings_or_memories_are_refused(tmp_path):
    model, path = make_model(), tmp_path / "state"
    refinement_of(model).save_state(path)
    with pytest.raises(ConfigError, match="use the same settings"):
        refinement_of(model, settings=Settings(passage_size=6, lr=0.1)).load_state(path)
    with pytest.raises(ConfigError, match="written for another memory"):
        refinement_of(model, length=8 * 8).load_state(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="no state of a refinement"):
        refinement_of(model).load_state(path)


def test_what_cannot_be_refined_is_refused():
    model = make_model()
    with pytest.raises(ConfigError, match="which are 5 passages of 6; at least 8 are needed"):
        refinement_of(model, length=8 * 4)
    with pytest.raises(ConfigError, match="18 slots and a passage of 50 tokens need more than"):
        refinement_of(model, settings=Settings(passage_size=50))
    with pytest.raises(ConfigError, match="made by another model"):
        Refinement(make_model("qwen2"), refinement_of(model).original, SETTINGS)
