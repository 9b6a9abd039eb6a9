"""Who is scored when: the worked examples of the docstrings, and the corners."""

import pytest
import torch

from uiollms import Sample

IDS = torch.arange(10)


def scored(sample: Sample) -> list[list[tuple[int, float]]]:
    """Per row the (token, weight) pairs that are scored."""
    return [
        [(int(row.targets[i]), round(float(row.token_weights[i]), 6)) for i in row.scored]
        for row in sample.rows
    ]


def test_language_modeling_example():
    sample = Sample.language_modeling(IDS, 4)
    third = round(1 / 3, 6)
    assert scored(sample) == [
        [(1, third), (2, third), (3, third)],
        [(5, third), (6, third), (7, third)],
        [(9, 1.0)],
    ]
    assert [row.input_ids.tolist() for row in sample.rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [row.num_memories for row in sample.rows] == [0, 1, 2]
    assert sample.chunks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_document_example_scores_every_token_but_the_first_once():
    sample = Sample.document(IDS, 4)
    ninth = round(1 / 9, 6)
    assert [[token for token, _ in row] for row in scored(sample)] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9],
    ]
    assert {weight for row in scored(sample) for _, weight in row} == {ninth}


def test_beacon_example():
    labels = torch.tensor([-100, -100, -100, -100, 4, 5])
    assert scored(Sample.beacon(IDS[:6], labels, 4)) == [[(4, 0.5)], [(5, 0.5)]]


@pytest.mark.parametrize("length", range(1, 14))
def test_positions_point_at_the_scored_tokens(length):
    ids = torch.randperm(50)[:length]
    for make in (Sample.language_modeling, Sample.document):
        sample = make(ids, 4)
        positions = torch.cat([row.start + row.scored + 1 for row in sample.rows])
        targets = torch.cat([row.targets[row.scored] for row in sample.rows])
        assert torch.equal(ids[positions], targets)
        unscored = {0} if make == Sample.document else set(range(0, length, 4))
        assert set(range(length)) - set(positions.tolist()) == unscored


def test_one_token_scores_nothing_and_a_last_chunk_of_one_token_neither():
    assert Sample.document(IDS[:1], 4).num_scored == 0
    last = Sample.language_modeling(IDS[:9], 4).rows[2]
    assert len(last.scored) == 0 and torch.isfinite(last.token_weights).all()


def test_a_sample_without_labels_has_no_loss_and_no_nan():
    sample = Sample.beacon(IDS, torch.full((10,), -100), 4)
    assert sample.num_scored == 0 and all(
        torch.isfinite(row.token_weights).all() for row in sample.rows
    )


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="10 tokens and 9 labels"):
        Sample.beacon(IDS, IDS[:9], 4)
    with pytest.raises(ValueError, match=r"found shape \[2, 5\]"):
        Sample.document(IDS.view(2, 5), 4)
    with pytest.raises(ValueError, match=r"found shape \[0\]"):
        Sample.document(IDS[:0], 4)


def test_question_answering_example():
    sample = Sample.question_answering(IDS[:5], IDS[5:7], 4)
    assert scored(sample) == [[], [(5, 0.5), (6, 0.5)]]
    cut = Sample.question_answering(IDS[:5], IDS[5:7], 4, truncation=5)
    assert torch.cat([row.input_ids for row in cut.rows]).tolist() == [0, 3, 4, 5, 6]
    everything = Sample.question_answering(IDS[:6], IDS[6:8], 4, train_prompt=True)
    assert [token for row in scored(everything) for token, _ in row] == [
        5,
        6,
        7,
    ]  # 4 is predicted in chunk 0
    with pytest.raises(ValueError, match="the response has 7 tokens, truncation 5"):
        Sample.question_answering(IDS[:2], IDS[:7], 4, truncation=5)


def test_a_response_inside_chunk_0_scores_nothing():
    assert Sample.question_answering(IDS[:2], IDS[2:4], 4).num_scored == 0


def test_memory_utilization_example():
    sample = Sample.memory_utilization(IDS, torch.tensor([60, 61, 62]), 4)
    assert sample.chunks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert scored(sample) == [[(61, 0.5), (62, 0.5)]] and sample.rows[0].num_memories == 2
    assert sample.teachers[0].tolist() == [*range(8), 60, 61, 62] and sample.rows[0].teacher == (
        0,
        8,
    )
    with pytest.raises(ValueError, match="found 3 and 3"):
        Sample.memory_utilization(IDS[:3], IDS[:3], 4)


def test_questions_example():
    asked = [
        (torch.tensor([20, 21]), torch.tensor([22, 23])),
        (torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6])),
    ]
    sample = Sample.questions(IDS, asked, 4)
    assert scored(sample) == [[(22, 0.5), (23, 0.5)], [(6, 1.0)]]
    assert [row.input_ids.tolist() for row in sample.rows] == [[20, 21, 22, 23], [3, 4, 5, 6]]
    assert [row.num_memories for row in sample.rows] == [2, 2] and sample.teachers == ()
    with pytest.raises(
        ValueError, match="an answer must have 1 to 3 tokens, to fit a chunk; found 4"
    ):
        Sample.questions(IDS, [(IDS[:1], IDS[:4])], 4)


def test_distilled_example():
    sample = Sample.document(IDS, 4).distilled(0.9)
    assert sample.kl_weight == 0.9 and torch.equal(sample.teachers[0], IDS)
    assert [row.teacher for row in sample.rows] == [(0, 0), (0, 4), (0, 8)]


def test_copy_example():
    sample = Sample.copy(IDS, 4)
    assert sample.chunks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert scored(sample) == [[(t, 0.25) for t in range(4)], [(t, 0.25) for t in range(4, 8)]]
    assert [row.repeat for row in sample.rows] == [True, False]
    assert sample.rows[0].input_ids[1:].tolist() == [0, 1, 2] and sample.rows[
        1
    ].input_ids.tolist() == [3, 4, 5, 6]
    assert [row.num_memories for row in sample.rows] == [2, 2]
    with pytest.raises(ValueError, match="complete chunk of 4 tokens, found 3"):
        Sample.copy(IDS[:3], 4)
