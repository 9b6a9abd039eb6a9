"""Compares scores and copies with the streaming model, the base model and a uniform model."""

import math

import pytest
import torch
from conftest import make_model, random_ids, relative_error
from torch.nn import functional as F

import uiollms
from uiollms.data.sample import Sample
from uiollms.evaluation.copying import greedy_copy, greedy_reconstruction
from uiollms.evaluation.scoring import exact_match, score, token_losses, with_raw_texts


def nll_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


@pytest.mark.parametrize("protocol", ["paper", "document"])
@pytest.mark.parametrize("length", [2, 8, 9, 30])
def test_scores_equal_those_of_the_streaming_model(family, protocol, length):
    model, ids = make_model(family), random_ids(1, length)
    model.chunk_batch = 2
    with torch.no_grad():
        expected = nll_of(model(ids).logits, ids)
    found = uiollms.score(model, ids, protocol)
    assert relative_error(found.nll, expected[found.positions - 1]) < 1e-12
    firsts = set(range(0, length, 8)) if protocol == "paper" else {0}
    assert found.positions.tolist() == [p for p in range(length) if p not in firsts]
    assert found.perplexity == pytest.approx(math.exp(found.nll.mean()))


def test_modes_window_and_raw_equal_the_base_model():
    model, ids = make_model(), random_ids(1, 30)
    with torch.no_grad():
        raw = nll_of(model.base(ids).logits, ids)
        alone = [nll_of(model.base(part).logits, part) for part in ids.split(8, 1)]
    found = score(model, ids, "paper", "raw")
    assert relative_error(found.nll, raw[found.positions - 1]) < 1e-12
    window = score(model, ids, "paper", "window")
    assert relative_error(window.nll, torch.cat(alone)) < 1e-12
    assert torch.equal(window.positions, found.positions)


def test_the_perplexity_of_a_uniform_model_is_the_vocabulary_size():
    model = make_model()
    torch.nn.init.zeros_(model.base.lm_head.weight)
    assert score(model, random_ids(1, 30)).perplexity == pytest.approx(61)


def test_evaluation_does_not_change_training():
    model = make_model()
    sample = uiollms.Sample.language_modeling(random_ids(30), 8)
    uiollms.gradient_step(model, sample)
    parameters = model.trainable_parameters()
    before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    score(model, random_ids(30, seed=5))
    for parameter in parameters.values():
        parameter.grad = None
    uiollms.gradient_step(model, sample)
    assert all(torch.equal(parameters[name].grad, before[name]) for name in before)


def test_too_long_documents_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="240 tokens, the capacity is 238"):
        score(model, random_ids(240))
    message = "reads its context raw: 65 tokens, the base has 64 positions"
    with pytest.raises(ValueError, match=message):
        score(model, random_ids(65), mode="raw")


def stream_nll(model, before: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """Returns the NLL of all tokens of a chunk but its first, which a stream reads after the chunks
    `before`."""
    state = model(before.flatten()[None]).past_key_values
    return nll_of(model(chunk[None], state).logits, chunk[None])


@torch.no_grad()
def test_shuffled_rows_read_the_other_documents_memories():
    """In the slow twin, a stream reads the other document's chunks and then this document's
    chunk."""
    model, ids, other = make_model(), random_ids(27, seed=1), random_ids(4, 8, seed=2)
    sample = Sample.language_modeling(ids, 8)
    found = token_losses(model, sample, "shuffled", other)[1]
    rows = ids.split(8)
    expected = [nll_of(model(rows[0][None]).logits, rows[0][None])]
    expected += [stream_nll(model, other[:t], rows[t]) for t in (1, 2, 3)]
    assert relative_error(found, torch.cat(expected)) < 1e-12
    unshuffled = token_losses(model, sample, "memory")[1]
    # Chunk 0 reads no memory.
    assert torch.equal(unshuffled[:7], found[:7])
    assert relative_error(unshuffled[7:], found[7:]) > 1e-3
    with pytest.raises(ValueError, match="3 memories are read, the other document has 2"):
        token_losses(model, sample, "shuffled", other[:2])


@torch.no_grad()
def test_modes_window_and_raw_of_questions():
    """Mode "window" reads a question alone, and mode "raw" reads it after the raw context."""
    model, context = make_model(), random_ids(16, seed=1)
    questions = [
        (random_ids(3, seed=2), random_ids(2, seed=3)),
        (random_ids(2, seed=4), random_ids(4, seed=5)),
    ]
    sample = Sample.questions(context, questions, 8)
    texts = [torch.cat(pair)[None] for pair in questions]
    alone = [
        nll_of(model.base(text).logits, text)[len(q) - 1 :]
        for text, (q, _) in zip(texts, questions, strict=True)
    ]
    whole = [torch.cat([context[None], text], 1) for text in texts]
    raw = [
        nll_of(model.base(text).logits, text)[16 + len(q) - 1 :]
        for text, (q, _) in zip(whole, questions, strict=True)
    ]
    assert relative_error(token_losses(model, sample, "window")[1], torch.cat(alone)) < 1e-12
    assert relative_error(token_losses(model, sample, "raw")[1], torch.cat(raw)) < 1e-12


@torch.no_grad()
def test_distilled_losses_are_the_divergence_from_the_base():
    model, ids = make_model(), random_ids(24)
    sample = Sample.document(ids, 8).distilled(0.9)
    loss, nll = token_losses(model, sample)
    teacher = model.base(ids[None]).logits[0].log_softmax(-1)
    student = model(ids[None]).logits[0].log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1)[:-1]
    assert relative_error(nll, score(model, ids, "document").nll) < 1e-12
    assert relative_error(loss, 0.1 * nll + 0.9 * kl) < 1e-12
    # Mode "raw" computes the teacher, which has no divergence from itself.
    loss, nll = token_losses(model, sample, "raw")
    assert relative_error(loss, 0.1 * nll) < 1e-12


def test_worked_example_of_raw_texts():
    sample = with_raw_texts(Sample.document(torch.arange(5), 2))
    assert [text.tolist() for text in sample.teachers] == [[0, 1, 2, 3, 4]]
    assert [row.teacher for row in sample.rows] == [(0, 0), (0, 2), (0, 4)]
    questions = [(torch.tensor([9]), torch.tensor([8])), (torch.tensor([7]), torch.tensor([6]))]
    sample = with_raw_texts(Sample.questions(torch.arange(4), questions, 2))
    texts = [sample.teachers[row.teacher[0]].tolist() for row in sample.rows]
    assert texts == [[0, 1, 2, 3, 9, 8], [0, 1, 2, 3, 7, 6]]
    assert [row.teacher[1] for row in sample.rows] == [4, 4]


@torch.no_grad()
def model_with_varied_text(family: str = "llama"):
    """Returns a model whose greedy text varies. With the small weights of a new model one token
    soon repeats for ever."""
    model = make_model(family)
    for parameter in model.base.model.layers.parameters():
        parameter *= 8 if parameter.dim() == 2 else 1
    return model


@torch.no_grad()
def test_greedy_reconstruction_equals_reconstruct_step_by_step(family):
    """In the slow twin, `reconstruct` reads the whole chunk again for every token. It shifts the
    chunk by one token, after the repeat token."""
    model, chunks = model_with_varied_text(family), random_ids(3, 8)
    model.chunk_batch = 2
    memory = model.encode_layers(chunks)
    copies = torch.zeros_like(chunks)
    # `reconstruct` compresses its argument, which is the growing copies here. Their memory is
    # replaced by that of the originals.
    original = model.encode_layers
    model.encode_layers = lambda ids, seeds=None: memory
    for i in range(8):
        copies[:, i] = model.reconstruct(copies)[:, i].argmax(-1)
    model.encode_layers = original
    assert torch.equal(greedy_reconstruction(model, chunks), copies)
    # The text does not repeat one token.
    assert len(copies.unique()) > 3


@torch.no_grad()
def test_greedy_copy_continues_its_last_token():
    """In the slow twin, a stream that has read the document reads a chunk again for every token.
    The first chunk starts with the repeat token, as the training sample's row does."""
    model, chunks = model_with_varied_text(), random_ids(3, 8, seed=8)
    found = greedy_copy(model, chunks, 3)
    state = model(chunks.flatten()[None]).past_key_values
    row = torch.zeros(8, dtype=torch.int64)
    for i in range(8):
        prefix = state.prefix(state.num_slots, with_local=False)
        shifted = torch.cat([row[:1], row[:-1]])[None]
        hidden = model.decode(shifted, prefix, [state.num_slots], repeat=torch.tensor([True]))
        row[i] = model.logits(hidden)[0, i].argmax()
    assert torch.equal(found[0], row)
    for t in (1, 2):
        tokens = [found[t - 1][-1]]
        for _ in range(8):
            logits = model(torch.stack(tokens)[None], state).logits[0, len(tokens) - 1]
            tokens.append(logits.argmax())
        assert found[t].tolist() == [int(token) for token in tokens[1:]]
    alone = greedy_copy(model, chunks[:0], 2)
    assert alone.shape == (2, 8) and not torch.equal(alone, found[:2])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["memory", "raw"])
def test_only_the_greedy_answer_is_an_exact_match(mode):
    model, prompt = model_with_varied_text(), random_ids(1, 21, seed=9)
    # With the answer in two chunks, it is in two batches.
    model.chunk_batch = 1
    answering = model if mode == "memory" else model.base
    answer = answering.generate(prompt, do_sample=False, max_new_tokens=5)[0, 21:]
    assert len(answer) == 5
    # `wrong` is the index of a token of the answer that is replaced.
    for wrong in (None, 0, 4):
        ids = torch.cat([prompt[0], answer])
        if wrong is not None:
            ids[21 + wrong] = (ids[21 + wrong] + 1) % 61
        labels = ids.clone()
        labels[:21] = -100
        assert exact_match(model, Sample.beacon(ids, labels, 8), mode) == (wrong is None)
