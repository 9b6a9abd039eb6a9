"""Checks the worked examples of the protocols with a length, and who is scored in general."""

import pytest
import torch

from uiollms.data.protocols import (
    fewest_tokens,
    last_sample,
    protocol_samples,
    segment_sample,
    sliding_samples,
)

IDS = torch.arange(10)


def scored(sample) -> list[list[int]]:
    """Returns the tokens of every row that are scored."""
    return [row.targets[row.scored].tolist() for row in sample.rows]


def test_sliding_example():
    samples = sliding_samples(IDS, 2, 6, stride=3)
    assert [sample.start for sample in samples] == [0, 3, 6]
    assert [scored(sample) for sample in samples] == [
        [[1, 2], [3, 4], [5]],
        [[], [6, 7], [8]],
        [[], [9]],
    ]
    assert samples[1].chunks.tolist() == [[3, 4], [5, 6]]


@pytest.mark.parametrize("length, stride", [(9, 8), (13, 5), (30, 4), (9, 1)])
def test_every_token_is_scored_once_and_in_the_first_window_that_has_it(length, stride):
    samples = sliding_samples(torch.arange(26), 4, length, stride)
    found = {}
    for sample in samples:
        for tokens in scored(sample):
            for token in tokens:
                assert token not in found
                found[token] = sample.start
    assert sorted(found) == list(range(1, 26))
    for token, start in found.items():
        starts = [s for s in range(0, 26, stride) if s <= token < s + length]
        assert start == starts[0]


def test_last_example():
    sample = last_sample(IDS, 4, 3)
    assert scored(sample) == [[], [7, 8], [9]]
    assert [row.token_weights[row.scored].tolist() for row in sample.rows[1:]] == [
        pytest.approx([1 / 3] * 2),
        pytest.approx([1 / 3]),
    ]
    assert scored(last_sample(IDS, 4, 30)) == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_segment_example():
    sample = segment_sample(IDS, 4, 4)
    (row,) = sample.rows
    assert sample.chunks.tolist() == [[0, 1, 2, 3]] and row.num_memories == 1 and row.start == 4
    assert row.input_ids.tolist() == [4, 5, 6, 7, 8, 9] and scored(sample) == [[7, 8, 9]]
    assert row.token_weights[row.scored].tolist() == pytest.approx([1 / 3] * 3)
    (row,) = segment_sample(torch.arange(12), 4, 4).rows  # the segment begins with a chunk
    assert row.num_memories == 2 and row.input_ids.tolist() == [8, 9, 10, 11]
    message = "of a complete chunk of 4; the document has 10 tokens"
    with pytest.raises(ValueError, match=message):
        segment_sample(IDS, 4, 7)


@pytest.mark.parametrize(
    "protocol",
    ["paper", "document", "later", "beacon", "sliding.300", "last.5", "segment.5", "segment.1"],
)
def test_the_fewest_tokens_have_a_scored_token_and_fewer_have_none(protocol):
    count = fewest_tokens(protocol, 4)
    if protocol == "segment.1":
        with pytest.raises(ValueError, match=r"last 1 tokens \(at least 2\)"):
            protocol_samples(protocol, torch.arange(count), 4)
        return
    assert sum(s.num_scored for s in protocol_samples(protocol, torch.arange(count), 4))
    try:
        samples = protocol_samples(protocol, torch.arange(count - 1), 4)
    except ValueError:
        return
    assert not sum(sample.num_scored for sample in samples)


def test_an_unknown_protocol_is_refused_by_name():
    with pytest.raises(ValueError, match="protocol 'sliding' is unknown; allowed are paper, "):
        protocol_samples("sliding", IDS, 4)
