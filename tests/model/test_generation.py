"""generate(): the options of transformers that are supported, continued states, and prompts of
different lengths."""

import dataclasses
import threading

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
from transformers.generation.streamers import BaseStreamer

from uiollms import MemoryConfig, MemoryLM
from uiollms.model.memory import join
from uiollms.model.sampling import IsolatedSampling

# With 11 new tokens every row crosses a chunk boundary (chunks have 8 tokens).
GREEDY = dict(do_sample=False, max_new_tokens=11, eos_token_id=None)


@pytest.fixture(scope="module")
def model():
    return make_model()


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask [B, T] of rows [T_i], padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return ids, torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()


ROWS = [
    random_ids(5, seed=1),
    random_ids(21, seed=2),
    random_ids(8, seed=3),
    random_ids(21, seed=4),
]


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_left_padded_row_is_generated_as_if_alone(model, with_mask):
    ids, mask = padded(ROWS)
    found = model.generate(ids, attention_mask=mask if with_mask else None, **GREEDY)
    for row, tokens in zip(ROWS, found, strict=True):
        alone = model.generate(row[None], **GREEDY)[0]
        assert torch.equal(tokens[21 - len(row) :], alone)


def test_beams_of_a_left_padded_row_are_those_of_the_row_alone(model):
    ids, mask = padded(ROWS)
    beams = dict(num_beams=3, num_return_sequences=2, **GREEDY)
    found = model.generate(ids, attention_mask=mask, **beams).view(4, 2, -1)
    for row, sequences in zip(ROWS, found, strict=True):
        assert torch.equal(sequences[:, 21 - len(row) :], model.generate(row[None], **beams))


def test_the_score_of_a_beam_is_the_sum_of_its_log_probabilities(model):
    """Beams change rows at every step. If a state did not follow its row, the row would be scored as
    the continuation of another."""
    prompts = random_ids(2, 6)
    options = dict(
        do_sample=False,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=11,
        eos_token_id=None,
        length_penalty=0.0,
    )
    found = model.generate(prompts, **options, return_dict_in_generate=True, output_scores=True)
    with torch.no_grad():
        logits = model(found.sequences[:, :-1]).logits[:, 5:].log_softmax(-1)
    scores = logits.gather(2, found.sequences[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(
        found.sequences_scores.double(), scores, rtol=1e-5, atol=0
    )  # transformers scores in float32


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[1, 0, 1]], [[0, 0, 0]], [[1, 1]]])
def test_padding_that_is_not_on_the_left_raises_an_error(model, mask):
    with pytest.raises(ValueError, match="zeros only before"):
        model.generate(
            random_ids(1, 3),
            attention_mask=torch.tensor(mask)[:, :3] * 1
            if mask[0] != [1, 1]
            else torch.tensor([[0, 1]]),
        )


def test_sampling_repeats_with_the_same_seed(model):
    options = dict(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        num_return_sequences=3,
        max_new_tokens=6,
    )
    torch.manual_seed(0)
    found = model.generate(random_ids(1, 13), **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(random_ids(1, 13), **options), found) and len(found) == 3
    cold = model.generate(random_ids(1, 13), do_sample=True, top_k=1, max_new_tokens=6)
    assert torch.equal(cold, model.generate(random_ids(1, 13), do_sample=False, max_new_tokens=6))


def test_several_calls_can_continue_one_state(model):
    text, first, second = (
        random_ids(1, 19, seed=1),
        random_ids(1, 4, seed=2),
        random_ids(1, 6, seed=3),
    )
    with torch.no_grad():
        state = model(text).past_key_values
    before = [t.clone() for t in (*state.memory_keys, *state.local_values, state.open_ids)]
    for question in (first, second, first):
        expected = model.generate(torch.cat([text, question], 1), **GREEDY)[:, 19:]
        assert torch.equal(model.generate(question, state=state, **GREEDY), expected)
        assert torch.equal(
            model.generate(question, state=state, num_beams=2, **GREEDY)[:, :4], question[:, :4]
        )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            before, (*state.memory_keys, *state.local_values, state.open_ids), strict=True
        )
    )
    # a batch of prompts of different lengths that continue one state
    ids, mask = padded([first[0], second[0]])
    found = model.generate(ids, attention_mask=mask, state=state, **GREEDY)
    assert torch.equal(found[0, 2:], model.generate(first, state=state, **GREEDY)[0])
    assert torch.equal(found[1], model.generate(second, state=state, **GREEDY)[0])


@pytest.mark.parametrize("beams", [1, 2])
def test_each_row_continues_its_row_of_a_padded_batchs_state(model, beams):
    """Every row is compared with the row generated alone. In the second call the rows are padded
    differently from the first."""
    ids, mask = padded(ROWS)
    start = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    questions = [random_ids(n, seed=n) for n in (7, 4, 4, 12)]
    again, again_mask = padded(
        [torch.cat([s[-1:], q]) for s, q in zip(start.sequences, questions, strict=True)]
    )
    for _ in range(2):  # a call does not change the state
        found = model.generate(
            again, attention_mask=again_mask, state=start.past_key_values, num_beams=beams, **GREEDY
        )
        for row, first, question, tokens in zip(
            ROWS, start.sequences, questions, found, strict=True
        ):
            whole = torch.cat([first[21 - len(row) :], question])
            assert torch.equal(
                tokens[-11:],
                model.generate(whole[None], num_beams=beams, **GREEDY)[0, len(whole) :],
            )
    # without a mask, one token for each row
    found = model.generate(
        start.sequences[:, -1:], state=start.past_key_values, num_beams=beams, **GREEDY
    )
    for row, first, tokens in zip(ROWS, start.sequences, found, strict=True):
        whole = first[21 - len(row) :]
        assert torch.equal(
            tokens[1:], model.generate(whole[None], num_beams=beams, **GREEDY)[0, len(whole) :]
        )


def test_unsupported_uses_of_a_padded_batchs_state_raise_an_error(model):
    ids, mask = padded(ROWS)
    start = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(
        ValueError,
        match="state of a padded batch, whose rows .* different numbers .*pass it as state=",
    ):
        model.generate(start.sequences, past_key_values=start.past_key_values)
    with pytest.raises(ValueError, match="state has 4 rows, the prompts 3"):
        model.generate(random_ids(3, 2), state=start.past_key_values)
    # The longest row has read 31 tokens and reads one more.
    options = dict(state=start.past_key_values, do_sample=False, eos_token_id=None)
    prompt_mask = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 1]])
    assert model.generate(
        random_ids(4, 2), attention_mask=prompt_mask, **options, max_new_tokens=207
    ).shape == (4, 209)
    with pytest.raises(
        ValueError, match=r"come to 239 tokens \(31 of them in the state\), the capacity is 238"
    ):
        model.generate(random_ids(4, 2), attention_mask=prompt_mask, **options, max_new_tokens=208)


def test_past_key_values_continue_a_call_with_all_tokens_given(model):
    """As in transformers, the next call gets the state of one call and all tokens so far."""
    start = model.generate(random_ids(2, 9), return_dict_in_generate=True, **GREEDY)
    assert start.past_key_values.num_tokens == start.sequences.shape[1] - 1
    longer = torch.cat([start.sequences, random_ids(2, 5, seed=7)], 1)
    found = model.generate(
        longer,
        past_key_values=start.past_key_values,
        attention_mask=torch.ones_like(longer),
        **GREEDY,
    )
    assert torch.equal(found, model.generate(longer, **GREEDY))
    with pytest.raises(ValueError, match="contains 19 tokens.*use state="):
        model.generate(random_ids(2, 5), past_key_values=start.past_key_values)
    with pytest.raises(ValueError, match="not both"):
        model.generate(longer, state=start.past_key_values, past_key_values=start.past_key_values)
    with pytest.raises(ValueError, match="state has 2 rows, the prompts 3"):
        model.generate(random_ids(3, 5), state=start.past_key_values)


def test_a_prompt_may_be_longer_than_the_bases_positions(model):
    ids = random_ids(1, 120)  # 64 positions
    # The default of transformers is 20 new tokens.
    assert model.generate(ids, do_sample=False, eos_token_id=None).shape == (1, 140)
    assert model.generate(ids, do_sample=False, eos_token_id=None, max_length=123).shape == (1, 123)
    config = GenerationConfig(max_new_tokens=2, do_sample=False)
    assert model.generate(ids, config).shape == (1, 122)


def test_more_tokens_than_the_capacity_raise_an_error_before_generation(model):
    ids = random_ids(1, 220)
    # The last token is not fed, so it needs no position.
    greedy = dict(do_sample=False, eos_token_id=None)
    assert model.generate(ids, max_new_tokens=19, **greedy).shape == (1, 239)
    with pytest.raises(
        ValueError, match=r"come to 239 tokens \(0 of them in the state\), the capacity is 238"
    ):
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
def test_unsupported_options_raise_an_error_with_their_name(model, option):
    name = next(iter(option))
    name = "cache_implementation" if name == "generation_config" else name
    with pytest.raises(ValueError, match=f"generate: {name} is not supported with memory"):
        model.generate(random_ids(1, 3), max_new_tokens=2, **option)
    with pytest.raises(ValueError, match="max_new_tokenz"):
        model.generate(random_ids(1, 3), max_new_tokenz=2)


def test_continuous_batching_raises_an_error(model):
    with pytest.raises(
        NotImplementedError, match="generate_batch .* is not supported with memory: .* left-padded"
    ):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)
    with (
        pytest.raises(NotImplementedError, match="generate_batch"),
        model.continuous_batching_context_manager(),
    ):
        pass


def no_token_twice(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.scatter(1, ids, -torch.inf)


PROMPT = random_ids(1, 13, seed=5)
# Option -> its value and the processor that it sets, given the tokens that come without it.
PROCESSED = {
    "repetition_penalty": lambda plain: (1.8, RepetitionPenaltyLogitsProcessor(1.8)),
    "no_repeat_ngram_size": lambda plain: (2, NoRepeatNGramLogitsProcessor(2)),
    "min_new_tokens": lambda plain: (
        11,
        MinNewTokensLengthLogitsProcessor(13, 11, torch.tensor([plain[2]])),
    ),
    "bad_words_ids": lambda plain: ([[plain[1]]], NoBadWordsLogitsProcessor([[plain[1]]])),
    "logits_processor": lambda plain: (LogitsProcessorList([no_token_twice]), no_token_twice),
}


@pytest.mark.parametrize("name", PROCESSED)
def test_options_that_change_the_scores_give_the_expected_tokens(model, name):
    """The tokens are compared with those chosen one by one from the logits of the whole text. In a
    model whose chunk does not fill up, they are compared with those that the base generates."""
    plain = model.generate(PROMPT, **GREEDY)[0, 13:].tolist()
    value, processor = PROCESSED[name](plain)
    options = (
        GREEDY | {name: value} | (dict(eos_token_id=plain[2]) if name == "min_new_tokens" else {})
    )
    expected = PROMPT
    for _ in range(11):
        with torch.no_grad():
            scores = processor(expected, model(expected).logits[:, -1].float())
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], 1)
    assert expected[0, 13:].tolist() != plain
    assert torch.equal(model.generate(PROMPT, **options), expected)
    one_chunk = MemoryLM(
        model.base, MemoryConfig(num_memory=2, chunk_size=32, lora_rank=3, lora_alpha=6)
    )
    assert torch.equal(
        one_chunk.generate(PROMPT, **options), model.base.generate(PROMPT, **options)
    )


@pytest.fixture(scope="module")
def states(model) -> dict[str, object]:
    """States that have read the same 9 tokens, made in every way that there is."""
    text = PROMPT[:, :9]
    with torch.no_grad():
        read = model(text).past_key_values
        in_steps = model(text[:, 2:], model(text[:, :2]).past_key_values).past_key_values
    memory = model.compress(text).state(model)
    joined = join([model.compress(text[:, :8]), model.compress(text[:, 8:])]).state(model)
    return dict(
        read=read,
        in_steps=in_steps,
        memory=memory,
        joined=joined,
        selected=read.select(torch.tensor([0])),
    )


ORIGINS = ["read", "in_steps", "memory", "joined", "selected"]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("name", PROCESSED)
@pytest.mark.parametrize("beams", [1, 2])
def test_processors_get_the_whole_text_of_every_state(model, states, name, origin, beams):
    plain = model.generate(PROMPT, **GREEDY)[0, 13:].tolist()
    value, _ = PROCESSED[name](plain)
    options = GREEDY | {name: value, "num_beams": beams}
    options |= dict(eos_token_id=plain[2]) if name == "min_new_tokens" else {}
    expected = model.generate(PROMPT, **options)[:, 9:]
    found = model.generate(PROMPT[:, 9:], state=states[origin], **options)
    assert torch.equal(found, expected)
    again = model.generate(
        PROMPT[:, 9:], state=states[origin], return_dict_in_generate=True, **options
    )
    assert (
        torch.equal(again.sequences, expected)
        and again.past_key_values.get_seq_length() == 9 + expected.shape[1] - 1
    )


def test_functions_that_process_the_text_get_all_of_it(model, states):
    received = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        received.append(ids)
        return scores

    def stop(ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        received.append(ids)
        return torch.zeros(len(ids), dtype=torch.bool)

    def allow(row: int, ids: torch.Tensor) -> list[int]:
        received.append(ids[None])
        return list(range(61))

    functions = dict(
        logits_processor=[look], stopping_criteria=[stop], prefix_allowed_tokens_fn=allow
    )
    found = model.generate(PROMPT[:, 9:], state=states["memory"], **functions, **GREEDY)
    whole = torch.cat([PROMPT[:, :9], found], 1)
    assert len(received) == 33 and {ids.shape[1] for ids in received} == set(range(13, 25))
    assert all(torch.equal(ids, whole[:, : ids.shape[1]]) for ids in received)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("penalty", [dict(repetition_penalty=3.0), dict(no_repeat_ngram_size=1)])
def test_penalties_of_a_row_do_not_depend_on_other_rows(model, beams, penalty):
    """Each row with its state gives the tokens that it gives alone. Padding does not count as text."""
    ids, mask = padded(ROWS)
    options = GREEDY | dict(num_beams=beams) | penalty
    for row, tokens in zip(ROWS, model.generate(ids, attention_mask=mask, **options), strict=True):
        assert torch.equal(tokens[21 - len(row) :], model.generate(row[None], **options)[0])
    start = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY | penalty
    )
    questions = [random_ids(n, seed=n) for n in (7, 4, 4, 12)]
    again, again_mask = padded(
        [torch.cat([s[-1:], q]) for s, q in zip(start.sequences, questions, strict=True)]
    )
    found = model.generate(again, attention_mask=again_mask, state=start.past_key_values, **options)
    assert torch.equal(found[:, : again.shape[1]], again)
    for row, first, question, tokens in zip(ROWS, start.sequences, questions, found, strict=True):
        whole = torch.cat([first[21 - len(row) :], question])
        assert torch.equal(tokens[-11:], model.generate(whole[None], **options)[0, len(whole) :])


def test_one_state_serves_several_prompts_with_several_results(model, states):
    ids, mask = padded([PROMPT[0, 9:], random_ids(7, seed=3)])
    options = GREEDY | dict(repetition_penalty=3.0, num_beams=3, num_return_sequences=2)
    found = model.generate(ids, attention_mask=mask, state=states["memory"], **options)
    assert found.shape == (4, 7 + 11) and torch.equal(found[:, :7], ids.repeat_interleave(2, 0))
    for i, row in enumerate((PROMPT[:, 9:], random_ids(1, 7, seed=3))):
        whole = torch.cat([PROMPT[:, :9], row], 1)
        assert torch.equal(
            found[2 * i : 2 * i + 2, 7:], model.generate(whole, **options)[:, whole.shape[1] :]
        )


def test_length_limits_do_not_count_tokens_of_the_state(model, states):
    new = PROMPT[:, 9:]
    greedy = dict(state=states["memory"], do_sample=False)
    assert model.generate(new, max_length=7, eos_token_id=None, **greedy).shape == (1, 7)
    config = GenerationConfig(max_length=7, eos_token_id=None, do_sample=False)
    assert model.generate(new, config, state=states["read"]).shape == (1, 7)
    first = model.generate(new, max_new_tokens=1, **greedy)[0, -1].item()
    assert model.generate(new, max_length=9, eos_token_id=first, **greedy).shape == (1, 5)
    assert (
        model.generate(new, max_length=9, min_length=8, eos_token_id=first, **greedy).shape[1] >= 8
    )
    assert model.generate(new, eos_token_id=None, **greedy).shape == (1, 24)
    with pytest.raises(ValueError, match="max_length"):
        model.generate(new, max_length=4, **greedy)


class RecordingStreamer(BaseStreamer):
    """Records what is streamed, and calls `callback` for each value."""

    def __init__(self, callback=lambda: None):
        self.values, self.callback = [], callback

    def put(self, value):
        self.values.append(value)
        self.callback()

    def end(self):
        self.values.append(None)


def test_a_streamer_gets_the_tokens_of_the_result(model, states):
    streamer = RecordingStreamer()
    found = model.generate(PROMPT[:, 9:], state=states["memory"], streamer=streamer, **GREEDY)
    assert streamer.values[-1] is None and torch.equal(streamer.values[0], PROMPT[:, 9:])
    assert torch.equal(torch.cat([value.flatten() for value in streamer.values[:-1]]), found[0])


TEXT_OPTIONS = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]],
    "sequence_bias": [[[3], -2.0]],
    "logits_processor": LogitsProcessorList([no_token_twice]),
    "prefix_allowed_tokens_fn": lambda row, ids: [3],
    "stopping_criteria": [lambda ids, scores, **_: torch.ones(len(ids), dtype=torch.bool)],
}


@pytest.mark.parametrize("name", TEXT_OPTIONS)
def test_options_that_need_the_text_raise_an_error_for_a_state_without_it(model, name):
    """A state of a `.mem` of version 0.1 does not contain its text."""
    memory = dataclasses.replace(model.compress(PROMPT[:, :9]), chunk_ids=None)
    state = memory.state(model)
    assert state.text is None
    with pytest.raises(
        ValueError, match=f"generate: {name} needs the whole text, .* compress the text again"
    ):
        model.generate(PROMPT[:, 9:], state=state, **{name: TEXT_OPTIONS[name]}, **GREEDY)
    neutral = dict(
        repetition_penalty=1.0, no_repeat_ngram_size=0, logits_processor=LogitsProcessorList()
    )
    found = model.generate(PROMPT[:, 9:], state=state, **neutral, **GREEDY)
    assert torch.equal(found, model.generate(PROMPT, **GREEDY)[:, 9:])
    # With past_key_values all tokens are given, so nothing is missing.
    if name != "stopping_criteria":
        whole = model.generate(
            PROMPT, past_key_values=state, **{name: TEXT_OPTIONS[name]}, **GREEDY
        )
        assert torch.equal(whole, model.generate(PROMPT, **{name: TEXT_OPTIONS[name]}, **GREEDY))


def test_input_ids_must_begin_with_the_tokens_of_past_key_values(model, states):
    other = PROMPT.clone()
    other[0, 2] += 1  # in a chunk that is compressed already
    with pytest.raises(
        ValueError, match="contains 9 tokens, and input_ids .* do not begin with them"
    ):
        model.generate(other, past_key_values=states["read"], **GREEDY)


# ---- random numbers ------------------------------------------------------------------------------


SAMPLED = dict(do_sample=True, temperature=3.0, max_new_tokens=12, eos_token_id=None)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_call_draws_from_a_separate_generator(model, beams):
    options = SAMPLED | dict(num_beams=beams)

    def sample(seed: int, **more) -> torch.Tensor:
        return model.generate(
            PROMPT, generator=torch.Generator().manual_seed(seed), **options, **more
        )

    first = sample(1)
    before = torch.get_rng_state()
    assert torch.equal(sample(1), first) and not torch.equal(sample(2), first)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    if beams == 1:  # another call and other draws between the tokens
        disturbing = RecordingStreamer(lambda: (torch.manual_seed(3), sample(5), torch.rand(2)))
        assert torch.equal(sample(1, streamer=disturbing), first)
    # Without a generator, one draw from the global generator seeds the call.
    torch.manual_seed(0)
    found, after = model.generate(PROMPT, **options), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(model.generate(PROMPT, **options), found) and torch.equal(
        torch.get_rng_state(), after
    )
    assert not torch.equal(model.generate(PROMPT, **options), found)
    model.generate(PROMPT, **GREEDY)
    # Several calls with one generator differ.
    shared = torch.Generator().manual_seed(1)
    several = [model.generate(PROMPT, generator=shared, **options) for _ in range(2)]
    assert torch.equal(several[0], first) and not torch.equal(several[1], first)


def test_greedy_calls_draw_no_random_numbers(model):
    before = torch.get_rng_state()
    model.generate(PROMPT, **GREEDY)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_threads_do_not_draw_from_the_generator_of_a_call(model):
    """A thread that draws during a call uses the global generator."""
    weights, drawn = torch.ones(1000), []

    def draw() -> None:
        drawn.append(
            torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(1)).item()
        )
        drawn.append(torch.multinomial(weights, 1).item())

    torch.manual_seed(7)
    draw()
    torch.manual_seed(7)
    with IsolatedSampling(torch.device("cpu"), torch.Generator().manual_seed(0)):
        other = threading.Thread(target=draw)
        other.start()
        other.join()
    assert drawn[:2] == drawn[2:]


@pytest.mark.parametrize("beams", [1, 2])
def test_use_cache_changes_nothing(model, beams):
    """Models switch it off for training with checkpointing. A stream always uses its state."""
    options = GREEDY | dict(num_beams=beams)
    assert torch.equal(
        model.generate(PROMPT, use_cache=False, **options), model.generate(PROMPT, **options)
    )


def test_a_state_is_not_croppable(model):
    """On a Mac, transformers crops a cache that is croppable. This attribute is what it checks."""
    assert not model.new_state().is_croppable
