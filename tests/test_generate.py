"""generate(): the options of transformers' own that make sense, on streams that go on, stand still, or differ in length."""

import pytest
import torch
from conftest import make_model, random_ids
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from uiollms import MemoryConfig, MemoryLM

GREEDY = dict(do_sample=False, max_new_tokens=11, eos_token_id=None)  # 11: every row crosses a chunk boundary (8)


@pytest.fixture(scope="module")
def model():
    return make_model()


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T_i] -> left-padded ids and mask [B, T]."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return ids, torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()


ROWS = [random_ids(5, seed=1), random_ids(21, seed=2), random_ids(8, seed=3), random_ids(21, seed=4)]


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_left_padded_row_is_generated_as_if_alone(model, with_mask):
    ids, mask = padded(ROWS)
    found = model.generate(ids, attention_mask=mask if with_mask else None, **GREEDY)
    for row, tokens in zip(ROWS, found, strict=True):
        alone = model.generate(row[None], **GREEDY)[0]
        assert torch.equal(tokens[21 - len(row) :], alone)


def test_beams_and_return_sequences_of_padded_rows(model):
    ids, mask = padded(ROWS)
    beams = dict(num_beams=3, num_return_sequences=2, **GREEDY)
    found = model.generate(ids, attention_mask=mask, **beams).view(4, 2, -1)
    for row, sequences in zip(ROWS, found, strict=True):
        assert torch.equal(sequences[:, 21 - len(row) :], model.generate(row[None], **beams))


def test_a_beams_score_is_that_of_its_own_tokens(model):
    """Beams change rows at every step; were a state left behind, its row would be scored as another's continuation."""
    prompts = random_ids(2, 6)
    options = dict(do_sample=False, num_beams=4, num_return_sequences=4, max_new_tokens=11, eos_token_id=None, length_penalty=0.0)
    found = model.generate(prompts, **options, return_dict_in_generate=True, output_scores=True)
    with torch.no_grad():
        logits = model(found.sequences[:, :-1]).logits[:, 5:].log_softmax(-1)
    scores = logits.gather(2, found.sequences[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores.double(), scores, rtol=1e-5, atol=0)  # transformers scores in float32


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[1, 0, 1]], [[0, 0, 0]], [[1, 1]]])
def test_padding_elsewhere_is_refused(model, mask):
    with pytest.raises(ValueError, match="zeros only in front"):
        model.generate(
            random_ids(1, 3), attention_mask=torch.tensor(mask)[:, :3] * 1 if mask[0] != [1, 1] else torch.tensor([[0, 1]])
        )


def test_sampling_with_its_options_repeats_under_a_seed(model):
    options = dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, num_return_sequences=3, max_new_tokens=6)
    torch.manual_seed(0)
    found = model.generate(random_ids(1, 13), **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(random_ids(1, 13), **options), found) and len(found) == 3
    cold = model.generate(random_ids(1, 13), do_sample=True, top_k=1, max_new_tokens=6)
    assert torch.equal(cold, model.generate(random_ids(1, 13), do_sample=False, max_new_tokens=6))


def test_one_state_is_asked_again_and_again(model):
    text, first, second = random_ids(1, 19, seed=1), random_ids(1, 4, seed=2), random_ids(1, 6, seed=3)
    with torch.no_grad():
        state = model(text).past_key_values
    before = [t.clone() for t in (*state.memory_keys, *state.local_values, state.open_ids)]
    for question in (first, second, first):
        expected = model.generate(torch.cat([text, question], 1), **GREEDY)[:, 19:]
        assert torch.equal(model.generate(question, state=state, **GREEDY), expected)
        assert torch.equal(model.generate(question, state=state, num_beams=2, **GREEDY)[:, :4], question[:, :4])
    assert all(torch.equal(a, b) for a, b in zip(before, (*state.memory_keys, *state.local_values, state.open_ids), strict=True))
    # a batch of questions of one memory, of different lengths
    ids, mask = padded([first[0], second[0]])
    found = model.generate(ids, attention_mask=mask, state=state, **GREEDY)
    assert torch.equal(found[0, 2:], model.generate(first, state=state, **GREEDY)[0])
    assert torch.equal(found[1], model.generate(second, state=state, **GREEDY)[0])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_padded_batch_goes_on_each_row_from_its_own_state(model, beams):
    """The twin: every row alone, all the way. The rows of the second call are padded differently from the first's."""
    ids, mask = padded(ROWS)
    start = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    questions = [random_ids(n, seed=n) for n in (7, 4, 4, 12)]
    again, again_mask = padded([torch.cat([s[-1:], q]) for s, q in zip(start.sequences, questions, strict=True)])
    for _ in range(2):  # the state is left as it was
        found = model.generate(again, attention_mask=again_mask, state=start.past_key_values, num_beams=beams, **GREEDY)
        for row, first, question, tokens in zip(ROWS, start.sequences, questions, found, strict=True):
            whole = torch.cat([first[21 - len(row) :], question])
            assert torch.equal(tokens[-11:], model.generate(whole[None], num_beams=beams, **GREEDY)[0, len(whole) :])
    # without a mask, a token each
    found = model.generate(start.sequences[:, -1:], state=start.past_key_values, num_beams=beams, **GREEDY)
    for row, first, tokens in zip(ROWS, start.sequences, found, strict=True):
        whole = first[21 - len(row) :]
        assert torch.equal(tokens[1:], model.generate(whole[None], num_beams=beams, **GREEDY)[0, len(whole) :])


def test_what_a_padded_batchs_state_cannot_do_is_said(model):
    ids, mask = padded(ROWS)
    start = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match="state of a padded batch, whose rows .* different numbers .*give it as state="):
        model.generate(start.sequences, past_key_values=start.past_key_values)
    with pytest.raises(ValueError, match="state has 4 rows, the prompts 3"):
        model.generate(random_ids(3, 2), state=start.past_key_values)
    longest = dict(state=start.past_key_values, do_sample=False, eos_token_id=None)  # 31 tokens seen by the longest row
    room = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 1]])  # which reads one more
    assert model.generate(random_ids(4, 2), attention_mask=room, **longest, max_new_tokens=207).shape == (4, 209)
    with pytest.raises(ValueError, match=r"come to 239 tokens \(31 of them in the state\), the capacity is 238"):
        model.generate(random_ids(4, 2), attention_mask=room, **longest, max_new_tokens=208)


def test_past_key_values_as_transformers_means_them(model):
    """The state of one generate() call and all tokens so far go into the next."""
    start = model.generate(random_ids(2, 9), return_dict_in_generate=True, **GREEDY)
    assert start.past_key_values.num_tokens == start.sequences.shape[1] - 1
    longer = torch.cat([start.sequences, random_ids(2, 5, seed=7)], 1)
    found = model.generate(longer, past_key_values=start.past_key_values, attention_mask=torch.ones_like(longer), **GREEDY)
    assert torch.equal(found, model.generate(longer, **GREEDY))
    with pytest.raises(ValueError, match="has seen 19 tokens.*use state="):
        model.generate(random_ids(2, 5), past_key_values=start.past_key_values)
    with pytest.raises(ValueError, match="not both"):
        model.generate(longer, state=start.past_key_values, past_key_values=start.past_key_values)
    with pytest.raises(ValueError, match="state has 2 rows, the prompts 3"):
        model.generate(random_ids(3, 5), state=start.past_key_values)


def test_a_prompt_past_the_bases_positions_just_works(model):
    ids = random_ids(1, 120)  # 64 positions
    assert model.generate(ids, do_sample=False, eos_token_id=None).shape == (1, 140)  # transformers' default: 20 more
    assert model.generate(ids, do_sample=False, eos_token_id=None, max_length=123).shape == (1, 123)
    config = GenerationConfig(max_new_tokens=2, do_sample=False)
    assert model.generate(ids, config).shape == (1, 122)


def test_past_the_capacity_is_refused_before_a_token_is_made(model):
    ids = random_ids(1, 220)
    assert model.generate(ids, do_sample=False, max_new_tokens=19, eos_token_id=None).shape == (1, 239)  # the last is not fed
    with pytest.raises(ValueError, match=r"come to 239 tokens \(0 of them in the state\), the capacity is 238"):
        model.generate(ids, max_new_tokens=20)


@pytest.mark.parametrize(
    "option",
    [
        dict(assistant_model=make_model().base),
        dict(prompt_lookup_num_tokens=3),
        dict(penalty_alpha=0.6, top_k=4),
        dict(dola_layers="low"),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=4),
        dict(guidance_scale=1.5),
        dict(negative_prompt_ids=random_ids(1, 3)),
        dict(output_attentions=True),
        dict(output_hidden_states=True),
        dict(inputs_embeds=torch.zeros(1, 3, 32)),
        dict(num_beam_groups=2),
        dict(generation_config=GenerationConfig(cache_implementation="static")),
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_without_meaning_are_refused_by_name(model, option):
    name = next(iter(option))
    name = "cache_implementation" if name == "generation_config" else name
    with pytest.raises(ValueError, match=f"generate: {name} is not supported with memory"):
        model.generate(random_ids(1, 3), max_new_tokens=2, **option)
    with pytest.raises(ValueError, match="max_new_tokenz"):
        model.generate(random_ids(1, 3), max_new_tokenz=2)


def test_continuous_batching_is_refused_by_name(model):
    with pytest.raises(NotImplementedError, match="generate_batch .* is not supported with memory: .* left-padded"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="generate_batch"), model.continuous_batching_context_manager():
        pass


def no_token_twice(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.scatter(1, ids, -torch.inf)


PROMPT = random_ids(1, 13, seed=5)
# option -> its value, and the processor that does it; both from the tokens that come without it
PROCESSED = {
    "repetition_penalty": lambda plain: (1.8, RepetitionPenaltyLogitsProcessor(1.8)),
    "no_repeat_ngram_size": lambda plain: (2, NoRepeatNGramLogitsProcessor(2)),
    "min_new_tokens": lambda plain: (11, MinNewTokensLengthLogitsProcessor(13, 11, torch.tensor([plain[2]]))),
    "bad_words_ids": lambda plain: ([[plain[1]]], NoBadWordsLogitsProcessor([[plain[1]]])),
    "logits_processor": lambda plain: (LogitsProcessorList([no_token_twice]), no_token_twice),
}


@pytest.mark.parametrize("name", PROCESSED)
def test_what_changes_the_scores_does_so(model, name):
    """Two twins: every token by hand, from the whole text read anew; and the base's own generate, where no chunk fills up."""
    plain = model.generate(PROMPT, **GREEDY)[0, 13:].tolist()
    value, processor = PROCESSED[name](plain)
    options = GREEDY | {name: value} | (dict(eos_token_id=plain[2]) if name == "min_new_tokens" else {})
    expected = PROMPT
    for _ in range(11):
        with torch.no_grad():
            scores = processor(expected, model(expected).logits[:, -1].float())
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], 1)
    assert expected[0, 13:].tolist() != plain
    assert torch.equal(model.generate(PROMPT, **options), expected)
    roomy = MemoryLM(model.base, MemoryConfig(num_memory=2, chunk_size=32, lora_rank=3, lora_alpha=6))
    assert torch.equal(roomy.generate(PROMPT, **options), model.base.generate(PROMPT, **options))


def test_with_a_state_processors_see_the_new_tokens_only(model):
    with torch.no_grad():
        state = model(PROMPT[:, :9]).past_key_values
    seen = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return scores

    whole = model.generate(PROMPT[:, 9:], state=state, logits_processor=[look], **GREEDY)
    assert len(seen) == 11 and all(torch.equal(ids, whole[:, : 4 + i]) for i, ids in enumerate(seen))


@pytest.mark.parametrize("beams", [1, 2])
def test_use_cache_changes_nothing(model, beams):
    """Models switch it off for training with checkpointing; a stream has no other way to go on."""
    options = GREEDY | dict(num_beams=beams)
    assert torch.equal(model.generate(PROMPT, use_cache=False, **options), model.generate(PROMPT, **options))


def test_transformers_is_told_that_tokens_cannot_be_taken_back(model):
    """It would try on a Mac; none is needed to see what it asks."""
    assert not model.new_state().is_croppable
