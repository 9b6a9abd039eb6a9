"""Calls of the model with the tensors that a tokenizer returns: masks, token types, and rows padded
on the right."""

import pytest
import torch
from conftest import make_model, random_ids, relative_error
from transformers import AutoTokenizer

ROUNDING = 1e-12  # float64; sums of a batch have another order than those of one row
ROWS = [random_ids(5, seed=1), random_ids(21, seed=2), random_ids(16, seed=3)]  # chunks of 8


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


def padded(rows: list[torch.Tensor], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask [B, width] of rows [T_i], padded on the right with an ordinary token."""
    ids = torch.full((len(rows), width), 7)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


TEXTS = ["a text of three chunks and more", "short", "of two"]


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
def test_forward_takes_all_that_a_tokenizer_returns(tiny_folder, texts):
    from transformers import AutoModelForCausalLM

    from uiollms import MemoryConfig, MemoryLM
    from uiollms.weights.base_models import load_pretrained

    base = load_pretrained(AutoModelForCausalLM, str(tiny_folder))
    config = MemoryConfig(num_memory=2, chunk_size=8, lora_rank=2, lora_alpha=4)
    model, tokenizer = MemoryLM(base, config).eval(), AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.padding_side = "right"
    encoded = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=True)
    assert encoded.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    with torch.no_grad():
        found = model(**encoded, labels=encoded["input_ids"])
        nll = []
        for i, text in enumerate(texts):
            alone = tokenizer(text, return_tensors="pt").input_ids
            output = model(alone, labels=alone)
            nll += [output.loss] * (alone.shape[1] - 1)
            # float32; sums of a batch have another order than those of one row
            logits = found.logits[i : i + 1, : alone.shape[1]]
            torch.testing.assert_close(logits, output.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss, torch.stack(nll).mean())
        prompt = tokenizer(texts[0], return_tensors="pt", return_token_type_ids=True)
        new = model.generate(**prompt, max_new_tokens=2, min_new_tokens=2)
    assert new.shape[1] == prompt.input_ids.shape[1] + 2


@pytest.mark.parametrize("width", [21, 30])
def test_rows_padded_on_the_right_give_the_results_of_each_row_alone(model, width):
    ids, mask = padded(ROWS, width)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=ids)
        assert output.logits.shape == (3, width, 61)
        losses = []
        for row, logits in zip(ROWS, output.logits, strict=True):
            alone = model(row[None], labels=row[None])
            assert relative_error(logits[: len(row)], alone.logits[0]) < ROUNDING
            losses += [alone.loss] * (len(row) - 1)
        assert relative_error(output.loss, torch.stack(losses).mean()) < ROUNDING
        assert output.past_key_values is None  # chunks of the rows end at different positions
        tuples = model(ids, attention_mask=mask, return_dict=False)
        assert torch.equal(tuples[0], output.logits) and len(tuples) == 1


def test_padding_does_not_change_gradients(model):
    ids, mask = padded(ROWS, 24)
    parameter = model.trainable_parameters()["encoder.retrieval_token"]
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    found, parameter.grad = parameter.grad.clone(), None
    count = sum(len(row) - 1 for row in ROWS)
    for row in ROWS[1:]:  # the first fits one chunk and reads no memory
        (model(row[None], labels=row[None]).loss * (len(row) - 1) / count).backward()
    assert relative_error(found, parameter.grad) < ROUNDING
    parameter.grad = None


def test_the_state_of_padded_rows_of_equal_length_contains_no_padding(model):
    rows, more = [random_ids(13, seed=s) for s in (1, 2)], random_ids(2, 9, seed=5)
    ids, mask = padded(rows, 20)
    with torch.no_grad():
        expected = model(torch.cat([torch.stack(rows), more], dim=1)).logits[:, 13:]
        state = model(ids, attention_mask=mask).past_key_values
        assert state.num_tokens == 13
        for ones in (torch.ones(2, 9), torch.ones(2, 22), torch.ones(2, 9, dtype=torch.bool)):
            found = model(more, state, attention_mask=ones).logits
            assert relative_error(found, expected) < ROUNDING


def test_a_mask_of_ones_changes_nothing(model):
    ids = random_ids(2, 19)
    with torch.no_grad():
        extra = dict(attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
        output = model(ids, **extra, logits_to_keep=3)
        assert torch.equal(output.logits, model(ids, logits_to_keep=3).logits)
        assert output.past_key_values.num_tokens == 19


INVALID_MASKS = {
    "left": ([[0, 1, 1]], "zeros before tokens; .* generate takes them padded on the left"),
    "hole": ([[1, 0, 1]], "zeros before tokens"),
    "empty": ([[0, 0, 0]], "row 0 has no token; leave the row out"),
    "shape": ([[1, 1]], r"found \[1, 2\], expected \[1, 3\], as input_ids$"),
    "additive": ([[0.0, 0.0, -1e9]], "other values than 1 for a token and 0 for padding"),
    "four axes": ([[[[1, 1, 1]]]], r"found \[1, 1, 1, 3\]"),
}


@pytest.mark.parametrize("kind", INVALID_MASKS)
def test_other_masks_raise_an_error(model, kind):
    mask, message = INVALID_MASKS[kind]
    with pytest.raises(ValueError, match=f"attention_mask: .*{message}"):
        model(random_ids(1, 3), attention_mask=torch.tensor(mask))


def test_arguments_that_cannot_be_combined_with_padding_raise_an_error(model):
    ids, mask = padded(ROWS, 24)
    with torch.no_grad():
        with pytest.raises(ValueError, match="logits_to_keep 1 counts from the end of rows"):
            model(ids, attention_mask=mask, logits_to_keep=1)
        with pytest.raises(ValueError, match="token_type_ids: found other values than 0"):
            model(ids, token_type_ids=mask)
        with pytest.raises(ValueError, match="token_type_ids: found other values than 0"):
            model.generate(ids, token_type_ids=mask, max_new_tokens=1)
        state = model(random_ids(3, 5)).past_key_values
        with pytest.raises(ValueError, match=r"expected \[3, 24\], as input_ids, or \[3, 29\]"):
            model(ids, state, attention_mask=mask[:, :9])
        ragged = model.generate(
            ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=1, return_dict_in_generate=True
        ).past_key_values
        for extra in ({"labels": ids}, {"attention_mask": mask}):
            message = f"rows of different lengths cannot be combined with {[*extra][0]}"
            with pytest.raises(ValueError, match=message):
                model(ids, ragged, **extra)
