"""Tests of rows read and written by number, and of the copies of their indices to a device."""

from __future__ import annotations

import pytest
import torch

from uiollms.kernels import devices, indexing
from uiollms.kernels.indexing import as_slice, take_rows, write_rows

ROWS = [[], [0], [2, 3, 4], [4, 3], [0, 2], [3, 3], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_those_of_plain_indexing(rows):
    tensors = [torch.randn(5, 3), torch.randn(5, 2, 4)]
    for tensor, found in zip(tensors, take_rows(tensors, rows), strict=True):
        assert torch.equal(found, torch.stack([tensor[r] for r in rows]) if rows else tensor[:0])


@pytest.mark.parametrize("rows", [rows for rows in ROWS if rows != [3, 3]])
def test_rows_are_written_where_plain_indexing_writes_them(rows):
    found, expected = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)
    parts = torch.randn(2, len(rows), 3)
    write_rows(found.unbind(), rows, parts.unbind())
    for i, r in enumerate(rows):
        expected[:, r] = parts[:, i]
    assert torch.equal(found, expected)


def test_only_consecutive_ascending_rows_are_a_slice():
    assert [as_slice(rows) for rows in ROWS] == [
        slice(0, 0), slice(0, 1), slice(2, 5), None, None, None, slice(0, 5)
    ]  # fmt: skip
    assert as_slice(range(2, 6)) == slice(2, 6)


def test_an_index_is_copied_once_for_all_tensors_of_a_device(monkeypatch):
    copies = []

    def counted(tensor, device):
        copies.append(device)
        return devices.to_device(tensor, device)

    monkeypatch.setattr(indexing, "to_device", counted)
    tensors = [torch.randn(5, 2) for _ in range(30)]
    write_rows(tensors, [1, 3], take_rows(tensors, [3, 1]))
    assert len(copies) == 2  # one to read and one to write
    take_rows(tensors, [1, 2])
    assert len(copies) == 2  # consecutive rows need none
