"""Tests that many documents in one graph give the gradients of the two-pass step, which takes one
document at a time."""

import pytest
import torch
from benchmarks import packed
from benchmarks.recall_evaluation import MODES, document_nlls
from conftest import MEMORY, gradients, make_model, random_ids, worst_error

import uiollms
from uiollms.data.sample import IGNORED
from uiollms.evaluation.scoring import scored_positions, token_losses

L = 8


def make_model_with(family: str, recent_tokens: int):
    return make_model(family, config=MEMORY.model_copy(update={"recent_tokens": recent_tokens}))


@pytest.mark.parametrize("kl_weight, recent_tokens", [(0.0, 0), (0.4, 0), (0.4, 3), (0.0, L)])
def test_a_batch_of_documents_gives_the_gradients_of_the_step(family, kl_weight, recent_tokens):
    """Every chunk but the first is scored. The tolerance 1e-10 in float64 allows for another order
    of summation."""
    model = make_model_with(family, recent_tokens)
    ids, copied = random_ids(3, 4 * L + 1), [0, 4, 8]
    text, recall = torch.zeros(2, 3, 3 * L, dtype=torch.float64)
    text[:2] = 1 / (2 * 3 * L)
    recall[2, 2 * L + 2 : 2 * L + 5] = 1 / 3
    found = packed.document_losses(model, ids, text, recall, copied, kl_weight)
    (2 * found.text + 3 * found.recall + 5 * found.copy).backward()
    batched = gradients(model)

    for document in ids[:2]:
        labels = document.clone()
        labels[: L + 1] = IGNORED
        sample = uiollms.Sample.beacon(document, labels, L)
        sample = sample.distilled(kl_weight) if kl_weight else sample
        uiollms.gradient_step(model, sample, scale=2 / 2)
    labels = torch.full_like(ids[2], IGNORED)
    labels[3 * L + 3 : 3 * L + 6] = ids[2, 3 * L + 3 : 3 * L + 6]
    recalling = uiollms.Sample.beacon(ids[2], labels, L)
    recalling = recalling.distilled(kl_weight) if kl_weight else recalling
    uiollms.gradient_step(model, recalling, scale=3)
    for number in copied:
        chunk = ids[:, : 3 * L].reshape(-1, L)[number]
        uiollms.gradient_step(model, uiollms.Sample.copy(chunk, L), scale=5 / 3)
    assert worst_error(batched, gradients(model)) < 1e-10


@pytest.mark.parametrize("recent_tokens", [0, 3, L])
def test_document_nlls_equal_those_of_score(family, recent_tokens):
    """The tolerance is 1e-10 in float64, as above. The mode `recent` is compared with the base,
    chunk by chunk."""
    model, ids = make_model_with(family, recent_tokens), random_ids(2, 4 * L + 1)
    found = document_nlls(model, ids)
    expected: dict[str, list[torch.Tensor]] = {mode: [] for mode in MODES}
    for document, other in zip(ids, ids.flip(0), strict=True):
        sample = uiollms.Sample.document(document, L)
        nll = token_losses(model, sample, "shuffled", other[: 4 * L].view(4, L))[1]
        expected["shuffled"].append(nll[scored_positions(sample) > L])
        for mode, name in (("window", "window"), ("own", "memory"), ("raw", "raw")):
            score = uiollms.score(model, document, "document", name)
            expected[mode].append(score.nll[score.positions > L])
        for t in (1, 2, 3):
            # Memory has two slots for each chunk before, and `recent` as many tokens. Recent tokens
            # come on top, as far as the document has so many.
            start, stop = max(0, t * L - 2 * t - recent_tokens), (t + 1) * L
            logits = model.base(document[None, start:stop]).logits[0, -L:]
            target = document[t * L + 1 : stop + 1]
            expected["recent"].append(
                torch.nn.functional.cross_entropy(logits, target, reduction="none")
            )
    for mode, parts in expected.items():
        assert found[mode] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-10), mode
        # The parts are documents, or chunks of a document.
        last = torch.stack(parts).view(2, -1)[:, -L:].mean().item()
        assert found["last"][mode] == pytest.approx(last, rel=1e-10), mode
    assert found["bound"] == pytest.approx(found["shuffled"] - found["own"])


def test_a_batch_of_copied_chunks_gives_the_gradients_of_the_step(family):
    model, chunks = make_model(family), random_ids(3, L)
    packed.losses(model, packed.copy_chunks(model, chunks), chunks)[0].mean().backward()
    batched = gradients(model)
    for chunk in chunks:
        uiollms.gradient_step(model, uiollms.Sample.copy(chunk, L), scale=1 / 3)
    assert worst_error(batched, gradients(model)) < 1e-10
