"""Tests which tokens of a prompt the base reads in modes without memory."""

import pytest

from uiollms.config.sections import MemoryConfig
from uiollms.evaluation.base_prompts import BASE_MODES, base_prompt


def memory_config(**fields) -> MemoryConfig:
    return MemoryConfig(**dict(chunk_size=4, num_memory=2, lora_rank=2, lora_alpha=4) | fields)


def test_the_example_of_the_docstring():
    modes = [mode for mode in BASE_MODES if mode != "bm25"]
    found = {mode: base_prompt([*range(10)], memory_config(), mode) for mode in modes}
    assert found == dict(
        window=[8, 9],
        recent=[4, 5, 6, 7, 8, 9],
        streaming=[0, 1, 2, 3, 8, 9],
        raw=[*range(10)],
    )


@pytest.mark.parametrize("recent", [0, 2, 4])
@pytest.mark.parametrize("length", range(1, 40))
def test_slots_of_the_prompt_bound_what_is_read(length, recent):
    """The open chunk and its recent tokens are read in every mode. Of the tokens before them, as
    many are read as the chunks before have slots, or all if they are fewer."""
    ids, config = [*range(length)], memory_config(recent_tokens=recent)
    closed = (length - 1) // 4  # chunks whose memories the prompt's last token reads
    open_tokens = ids[max(0, 4 * closed - recent) :]
    assert base_prompt(ids, config, "window") == open_tokens
    before = ids[: length - len(open_tokens)]
    slots = min(2 * closed, len(before))
    assert base_prompt(ids, config, "recent") == ids[length - len(open_tokens) - slots :]
    streamed = base_prompt(ids, config, "streaming")
    assert len(streamed) == slots + len(open_tokens) == len({*streamed})
    assert streamed == sorted(streamed)
    assert streamed[: min(4, slots)] == ids[: min(4, slots)]
    if slots > 4:
        assert streamed[4:] == ids[length - len(streamed) + 4 :]
    assert base_prompt(ids, config, "raw") == ids


def test_bm25_reads_the_passage_with_the_words_of_the_question():
    """Passages have 64 tokens. The question has two tokens of the third one, and few others."""
    question = [140, 150] * 31
    config = memory_config(chunk_size=64, num_memory=16)
    found = base_prompt([*range(256), *question], config, "bm25")
    assert found == [*range(128, 192), *question]
