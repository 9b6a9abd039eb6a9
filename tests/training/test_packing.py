"""Tests of how train.py packs documents of a step that go through encoder and decoder together."""

from __future__ import annotations

import json
import random

import pytest
from conftest import random_ids
from processes import run_forked, train
from test_resume import metrics_of, run_folder  # noqa: F401

from uiollms import Sample
from uiollms.data.stream import TrainingSample, pack_documents


def make_document(num_chunks: int) -> TrainingSample:
    """Returns a document with this number of compressed chunks."""
    sample = Sample.document(random_ids(8 * num_chunks + 3), 8)
    return TrainingSample(f"{num_chunks}", sample, random.Random(0))


@pytest.mark.parametrize(
    "chunks, chunk_batch, packs",
    [
        ([1, 1, 1, 1], 4, [[1, 1, 1, 1]]),
        ([1, 1, 1], 2, [[1, 1], [1]]),
        ([3, 1, 2], 4, [[3, 1], [2]]),
        ([5, 1, 1], 4, [[5], [1, 1]]),  # a document that does not fit is in a pack by itself
        ([1, 9, 1], 4, [[1], [9], [1]]),
        ([2, 2], 1, [[2], [2]]),
        ([], 4, []),
    ],
)
def test_documents_share_a_pass_while_their_chunks_fit(chunks, chunk_batch, packs):
    documents = [make_document(count) for count in chunks]
    found = list(pack_documents(documents, chunk_batch))
    assert [[len(document.sample.chunks) for document in pack] for pack in found] == packs
    assert [document for pack in found for document in pack] == documents


def test_packing_changes_no_result_of_a_run(run_folder):  # noqa: F811
    """chunk_batch decides which documents share a pass. Only the order of float32 sums differs. Its
    error of 1e-7 a step grows through AdamW's division by small second moments, so 1e-5 is
    allowed. A document that is lost or weighted twice changes the results by 0.1."""
    found = []
    for batch in (1, 64):
        assert run_forked(train(f"--set=train.chunk_batch={batch}", "--restart")) == 0
        found.append([line for line in metrics_of(run_folder) if "nll" in line])
    assert len(found[0]) == len(found[1]) == 5
    for one, other in zip(*found, strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-5), json.dumps([one, other])
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
