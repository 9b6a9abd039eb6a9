"""Many documents in one graph give the gradients of the two-pass step, document by document."""

import pytest
import torch
from benchmarks import packed
from conftest import gradients, make_model, random_ids, worst_error

import uiollms
from uiollms.tasks import IGNORED

L = 8


@pytest.mark.parametrize("kl_weight", [0.0, 0.4])
def test_a_batch_of_documents_gives_the_steps_gradients(family, kl_weight):
    """float64: 1e-10, another order of summation. Every chunk but the first is scored here."""
    model = make_model(family)
    ids, copied = random_ids(3, 4 * L + 1), [0, 4, 8]
    asked = torch.zeros(1, L)
    asked[0, 2:5] = 1
    found = packed.document_losses(model, ids, asked, 2, copied, kl_weight)
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
    uiollms.gradient_step(model, uiollms.Sample.beacon(ids[2], labels, L), scale=3)
    for place in copied:
        chunk = ids[:, : 3 * L].reshape(-1, L)[place]
        uiollms.gradient_step(model, uiollms.Sample.copy(chunk, L), scale=5 / 3)
    assert worst_error(batched, gradients(model)) < 1e-10


def test_copied_chunks_alone(family):
    model, chunks = make_model(family), random_ids(3, L)
    packed.losses(model, packed.copy_chunks(model, chunks), chunks)[0].mean().backward()
    batched = gradients(model)
    for chunk in chunks:
        uiollms.gradient_step(model, uiollms.Sample.copy(chunk, L), scale=1 / 3)
    assert worst_error(batched, gradients(model)) < 1e-10
