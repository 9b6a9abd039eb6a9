"""What is tokenised is one text: no space between its pieces that it does not have, BOS at its
start alone, EOS nowhere, whatever the tokenizer does at the ends of a text."""

import io
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import SHAPE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from uiollms import MemoryConfig, MemoryLM
from uiollms.cli.chat import first_turn, later_turn, main
from uiollms.config.corpora import TaskEntry
from uiollms.data import Document, NewsDocument
from uiollms.data.builder import SampleBuilder
from uiollms.data.documents import LazyCorpus
from uiollms.data.readers.beacons import tokenize_documents
from uiollms.data.retrieval import make_trials
from uiollms.data.tokens import (
    continuation_ids,
    continuation_pair,
    document_ids,
    plain_ids,
    prefix_ids,
    tokenize_pair,
)
from uiollms.evaluation.evaluator import Evaluation
from uiollms.evaluation.instances import make_instance
from uiollms.weights.adapters import save_weights

BOS, EOS = 1, 2
WORDS = ("\u2581kettle", "\u2581hides", "\u2581the")


def subword_tokenizer(space: str | None, bos: bool = True, eos: bool = False):
    """Letters, and three words with the space in front of them. space: how one comes in front of
    a text: "prepend", as Llama 2's tokenizer does it, "always" or "first", as newer ones; None:
    not."""
    characters = ["\u2581", "\n", *map(chr, range(33, 127))]
    pieces = sorted({word[:n] for word in WORDS for n in range(2, len(word) + 1)}, key=len)
    names = ["<pad>", "<s>", "</s>", "<unk>", *characters, *pieces]
    vocab = {token: i for i, token in enumerate(names)}
    merges = [(piece[:-1], piece[-1]) for piece in pieces]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if space in ("always", "first"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            "\u2581", prepend_scheme=space, split=False
        )
        tokenizer.decoder = decoders.Metaspace("\u2581", prepend_scheme=space, split=False)
    else:
        marks = [normalizers.Replace(" ", "\u2581")]
        front = [normalizers.Prepend("\u2581")] if space else []
        tokenizer.normalizer = normalizers.Sequence([*front, *marks])
        parts = [decoders.Replace("\u2581", " "), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(
            [*parts, *([decoders.Strip(" ", 1, 0)] if space else [])]
        )
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' * bos}$A{' </s>' * eos}", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


KINDS = {
    "llama 2": dict(space="prepend"),
    "always": dict(space="always"),
    "first": dict(space="first"),
    "ends with EOS": dict(space="prepend", eos=True),
    "EOS alone": dict(space=None, bos=False, eos=True),
    "no space": dict(space=None),
    "nothing": dict(space=None, bos=False),
}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return subword_tokenizer(**KINDS[request.param])


@pytest.fixture
def maker(tokenizer) -> SampleBuilder:
    """Chunks of 64 into 2 slots, 1,024 positions."""
    torch.manual_seed(0)
    changes = dict(vocab_size=len(tokenizer), max_position_embeddings=1024)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | changes))
    memory = MemoryConfig(num_memory=2, chunk_size=64, lora_rank=2, lora_alpha=4)
    return SampleBuilder(MemoryLM(base, memory), tokenizer)


def read_as(tokenizer, ids) -> str:
    """The text that tokens stand for, special ones by their names, the space in front of a document
    aside."""
    text = "".join(tokenizer.convert_ids_to_tokens([int(i) for i in ids])).replace("\u2581", " ")
    if tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, "k")[0])[0] == "\u2581":
        text = text.replace("<s> ", "<s>", 1) if text.startswith("<s>") else text.removeprefix(" ")
    return text


def written(tokenizer, text: str) -> str:
    """The same of a document, from its text."""
    return ("<s>" if prefix_ids(tokenizer) else "") + text


def rows_of(sample) -> torch.Tensor:
    return torch.cat([row.input_ids for row in sample.rows])


def scored_of(sample) -> list[int]:
    return [int(t) for row in sample.rows for t in row.targets[row.scored]]


def ids_of(tokenizer, *tokens: str) -> list[int]:
    return list(tokenizer.convert_tokens_to_ids(list(tokens)))


# ---- The functions ------------------------------------------------------------------------------


def test_first_tokens_are_those_in_front_alone():
    found = {kind: prefix_ids(subword_tokenizer(**options)) for kind, options in KINDS.items()}
    without = ("EOS alone", "nothing")
    assert found == {kind: [] if kind in without else [BOS] for kind in KINDS}


def test_hand_computed_ids():
    """Llama 2's way: one space in front of a document, none in front of what goes on."""
    tokenizer = subword_tokenizer("prepend", eos=True)
    word = ids_of(tokenizer, "\u2581kettle")
    k, e = ids_of(tokenizer, "k", "e")
    assert document_ids(tokenizer, "kettle") == [BOS, *word]  # its own call: BOS word EOS
    assert tokenizer("kettle").input_ids == [BOS, *word, EOS]
    assert continuation_ids(tokenizer, "kettle") == [k, e, *ids_of(tokenizer, "t", "t", "l", "e")]
    assert continuation_ids(tokenizer, " kettle") == word
    assert continuation_ids(tokenizer, "\nkettle")[:2] == ids_of(tokenizer, "\n", "k")
    pair = [part.tolist() for part in tokenize_pair(tokenizer, ": ket", "tle")]
    assert pair == [[BOS, *ids_of(tokenizer, "\u2581", ":")], word]  # the word holds both
    pair = [part.tolist() for part in continuation_pair(tokenizer, ":", " kettle")]
    assert pair == [ids_of(tokenizer, ":"), word]


def test_a_pair_is_one_text_and_the_prompt_has_the_first_token(tokenizer):
    for prompt, response in (
        (":", " kettle"),
        (": ket", "tle"),
        ("a", ""),
        ("a b ", "c"),
        ("\n", "\n"),
    ):
        parts = tokenize_pair(tokenizer, prompt, response)
        assert torch.cat(parts).tolist() == document_ids(tokenizer, prompt + response)
        assert len(parts[0]) >= 1
    bare = subword_tokenizer("prepend", bos=False)
    assert [len(part) for part in tokenize_pair(bare, "k", "ettle")] == [1, 0]


def test_what_goes_on_reads_as_it_does_in_the_whole(tokenizer):
    """Beside a text that has it in its middle, up to a token that would hold characters of both."""
    for text in ("kettle", " kettle", "\nThe kettle", "\n\nQuestion: who?\nAnswer:", "(a)", "12"):
        whole = plain_ids(tokenizer, "a;" + text)
        assert whole[-len(continuation_ids(tokenizer, text)) :] == continuation_ids(tokenizer, text)


def test_line_breaks_that_are_one_token_do_not_swallow_the_anchor():
    vocab = {"<unk>": 0, "\n": 1, "\n\n": 2, "a": 3, "b": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", "\n")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert continuation_ids(tokenizer, "\nb") == [1, 4] and continuation_ids(
        tokenizer, "\n\nb"
    ) == [2, 4]
    assert continuation_ids(tokenizer, "ab") == [3, 4]


# ---- Samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, response", [("\nAnswer:", " kettle"), ("\nAnswer: ket", "tle")])
def test_a_question_and_its_answer_are_one_text(maker, prompt, response):
    tokenizer = maker.tokenizer
    document = Document("y" * 70 + prompt, "d", response, task="question answering")
    sample = maker.make(document, None, random.Random(0))
    assert rows_of(sample).tolist() == document_ids(tokenizer, document.text + response)
    assert scored_of(sample) == ids_of(tokenizer, "\u2581kettle")
    assert read_as(tokenizer, rows_of(sample)) == written(tokenizer, document.text + response)


def test_a_generated_answer_starts_where_the_scored_one_does(maker):
    document = Document("y" * 70 + "\nAnswer: ket", "d", "tle", task="question answering")
    fields = dict(
        task_type="question answering", task_name="files:x", num_instance=1, generate=True
    )
    instance = make_instance(maker, document, TaskEntry(**fields), random.Random(0))
    assert instance.response.tolist() == ids_of(maker.tokenizer, "\u2581kettle")
    whole = document_ids(maker.tokenizer, document.text + "tle")
    assert instance.prompt.tolist() == whole[:-1]


def test_plain_text_ends_without_eos_whole_or_cut(maker):
    text = "it hides the kettle " * 20
    whole = maker.make(Document(text, "d"), None, random.Random(0))
    cut = maker.make(Document(text, "d"), 100, random.Random(0))
    assert rows_of(whole).tolist() == document_ids(maker.tokenizer, text)
    assert rows_of(cut).tolist() == document_ids(maker.tokenizer, text)[:100]
    assert EOS not in rows_of(whole)


def test_a_story_is_hidden_in_one_text(maker):
    """Wherever it lies, the context is a part of distractor, story, distractor, cut to whole
    chunks, with BOS at its start; the story is whole."""
    tokenizer, story = maker.tokenizer, "It hides the kettle.\nWhere?"
    parts = "abcdefghij klmnop " * 20
    news = NewsDocument(
        story,
        "d",
        task="news qa summation",
        questions=(("What?", "kettle"),),
        summary="the kettle",
        distractor=parts,
    )
    places = set()
    for seed in range(40):
        sample = maker.make(news, 192, random.Random(seed))
        assert sample.chunks.shape == (3, 64)
        text = read_as(tokenizer, sample.chunks.flatten())
        assert text.startswith(written(tokenizer, "")) and "<s>" not in text[1:]
        text = text.removeprefix("<s>").removeprefix(" ")
        assert text.count(story) == 1 and "</s>" not in text
        before, after = text.split(story)
        assert before in ("", parts) or (before[-1] == "\n" and before[:-1] in parts), before
        assert after == "" or (after[0] == "\n" and after[1:] in parts), after
        places.add(len(before))
        asked = [
            read_as(tokenizer, torch.cat([torch.tensor([3]), row.input_ids])) for row in sample.rows
        ]
        assert [text.removeprefix("<unk>") for text in asked] == [
            "Question: What?\nAnswer: kettle",
            "Summary of the story: the kettle",
        ]
        assert [scored_of(sample)[0], scored_of(sample)[-1]] == ids_of(
            tokenizer, *["\u2581kettle"] * 2
        )
    assert len(places) > 20 and min(places) < 20 and max(places) > 100


def test_a_long_story_loses_its_end_and_a_short_context_is_refused(maker):
    asked = dict(task="news qa summation", questions=(("What?", "kettle"),))
    news = NewsDocument("s" * 500, "d", **asked, distractor="w" * 50)
    sample = maker.make(news, 128, random.Random(0))
    assert read_as(maker.tokenizer, sample.chunks.flatten()).count("s") >= 128 - 2 + ("s" in "<s>")
    alone = NewsDocument("z" * 130, "d", **asked)
    text = read_as(maker.tokenizer, maker.make(alone, None, random.Random(0)).chunks.flatten())
    assert text == written(maker.tokenizer, "z" * 130)[: len(text)] and len(text) > 120
    with pytest.raises(ValueError, match="needs a complete chunk of 64 tokens, found 1"):
        maker.make(NewsDocument("z" * 10, "d", **asked), None, random.Random(0))


def test_what_is_asked_stands_behind_all_memories(maker):
    """1,024 positions, chunks of 64 into 2 slots: a chunk fits behind (1,024 - 64) / 2 = 480."""
    news = NewsDocument(
        "s" * 99, "d", task="news qa summation", summary="s", distractor="w" * 40_000
    )
    sample = maker.make(news, None, random.Random(0))
    assert sample.chunks.shape == (480, 64)
    copied = maker.make(Document("w" * 40_000, "d", task="longdata copy"), None, random.Random(0))
    assert copied.chunks.shape == (480, 64) and len(copied.rows) == 480


@pytest.mark.parametrize("task_type", ["passkey", "needle"])
def test_a_trial_reads_as_one_text(maker, task_type):
    tokenizer = maker.tokenizer
    texts = ["it hides the kettle " * 3, "abc the " * 90]  # the first is short: the next goes on
    filler = LazyCorpus(2, lambda i: Document(texts[i], str(i)))
    found = make_trials(task_type, filler, tokenizer, 400, 64, 2, (0.0, 0.3, 1.0))
    assert len(found) == 6
    for n, trial in enumerate(found):
        ids = rows_of(trial.sample)
        assert len(ids) == 400
        text = read_as(tokenizer, ids).removeprefix("<s>")
        told, asked = (
            ("\nTake note: ", "\nQuestion: ")
            if task_type == "passkey"
            else ("\nThe gar", "\nQuestion: ")
        )
        start, end = text.index(told), text.index(asked)
        sentence = text[start : text.index(".\n", start) + 2]
        around = text[:start] + text[start + len(sentence) : end]
        joined = "\n".join(texts[(n + k) % 2].strip() for k in range(3))
        assert joined.startswith(around) and len(around) > 150
        answer = read_as(tokenizer, [3, *scored_of(trial.sample)]).removeprefix("<unk>")
        assert answer[0] == " " and answer[1:] and answer[1:] in sentence and text.endswith(answer)
        assert "  " not in text and "</s>" not in text and "<s>" not in text
        depth = len(text[:start]) / len(around)
        assert abs(depth - trial.depth) < 0.2  # tokens are up to seven characters


def test_beacons_question_and_answer_are_one_text():
    """With BOS once, EOS once, and the answer's word whole."""
    tokenizer = subword_tokenizer("prepend", eos=True)
    pairs = [("y" * 1300 + " ", " hides the kettle\n")] * 20
    rows = LazyCorpus(
        20, lambda i: Document(pairs[i][0], str(i), pairs[i][1], task="question answering")
    )
    for _, (ids, labels) in tokenize_documents(rows, range(20), tokenizer, 8192):
        assert ids[0] == BOS and ids[-1] == EOS and {BOS, EOS}.isdisjoint(ids[1:-1])
        text = read_as(tokenizer, ids)
        assert (
            text.startswith("<s>" + "y" * 1300)
            and text.split("y")[-1].strip(" \n") == "hides the kettle</s>"
        )
        words = ids_of(tokenizer, "\u2581the", "\u2581kettle")
        assert list(ids[-3:-1]) == words and list(labels[-3:]) == [*words, EOS]
    ((_, (ids, labels)),) = tokenize_documents(
        LazyCorpus(1, lambda i: Document("z" * 9000, "d")), [0], tokenizer, 1200
    )
    assert ids == labels == (BOS, *document_ids(tokenizer, "z" * 9000)[1:1200])


# ---- Commands -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tokenizer, tmp_path, monkeypatch) -> Path:
    """env.json for a model with that tokenizer and its weights, and a book."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    changes = dict(vocab_size=len(tokenizer), max_position_embeddings=256)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | changes))
    base.save_pretrained("base")
    tokenizer.save_pretrained("base")
    memory = dict(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4)
    Path("memory.json").write_text(json.dumps(memory))
    save_weights(MemoryLM(base, MemoryConfig(**memory)), "weights")
    model = dict(model_name="base", model_dtype="fp32", model_structure="llama", device_map="cpu")
    corpus = [dict(name="files:book.txt", partition=1)]
    train = dict(tbptt=2, train_iters=1, max_lr=1e-2, save=1, eval=1, corpus=corpus)
    env = dict(model=model | dict(config="memory.json", load_ckp="weights"), train=train)
    Path("env.json").write_text(json.dumps(env))
    Path("book.txt").write_text("it hides the kettle " * 4 + "it")
    return tmp_path


def test_compress_reads_a_document_from_bos_to_its_last_token(folder, tokenizer):
    from uiollms.model.memory import Memory

    main(["compress", "book.txt", "-o", "book.mem", "--env_conf", "env.json", "--quiet"])
    memory, ids = Memory.load("book.mem"), document_ids(tokenizer, Path("book.txt").read_text())
    assert memory.num_tokens == len(ids)
    assert memory.open_ids.tolist() == ids[len(ids) // 16 * 16 :] and EOS not in ids


@pytest.mark.parametrize("template", [None, "{{ bos_token }}[U]{{ messages[-1]['content'] }}[M]"])
def test_turns_go_on_from_what_was_read(folder, template):
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.chat_template = template
    text = "[U]Who?[M]" if template else "\n\nQuestion: Who?\nAnswer:"

    class State:
        num_tokens = 40

    behind = first_turn(tokenizer, "Who?", State)[0].tolist()
    State.num_tokens = 0
    opening = first_turn(tokenizer, "Who?", State)[0].tolist()
    assert (
        read_as(tokenizer, [3, *behind])
        == "<unk>" + ("<s>" * (bool(template) and not prefix_ids(tokenizer))) + text
    )
    assert (
        opening.count(BOS) == bool(prefix_ids(tokenizer) or template)
        and EOS not in opening + behind
    )
    if template is None:
        assert opening == document_ids(tokenizer, text) and behind == continuation_ids(
            tokenizer, text
        )
        later = later_turn(tokenizer, "Who?", torch.tensor([[9]]))[0].tolist()
        assert later == [9, *behind]


def test_ask_and_evaluate_run_with_any_tokenizer(folder, tokenizer, capsys):
    main(["compress", "book.txt", "-o", "book.mem", "--env_conf", "env.json", "--quiet"])
    settings = ["--env_conf", "env.json", "--max_new_tokens=3", "--json"]
    main(["ask", "book.mem", "Who?", *settings])
    main(["chat", "--memory", "book.mem", *settings], io.StringIO("Who?\nAnd?\n"))
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question"] for line in answers] == ["Who?", "Who?", "And?"]
    held = len(document_ids(tokenizer, Path("book.txt").read_text()))
    asked = len(continuation_ids(tokenizer, "\n\nQuestion: Who?\nAnswer:"))
    for line in answers[:2]:
        total = line["held"]["tokens"] + line["held"]["open_tokens"]
        assert total == held + asked + line["new_tokens"] - 1


def test_the_harness_cuts_one_text(folder, tokenizer):
    """lm-eval asks for contexts and continuations; a word over the seam is the continuation's."""
    from uiollms.evaluation.lm_eval_model import HarnessLM

    lm = HarnessLM("env.json")
    first, word = prefix_ids(tokenizer), ids_of(tokenizer, "\u2581kettle")
    context = document_ids(tokenizer, "it:")
    assert (
        lm.tok_encode("it:") == context
        and lm.tok_encode("it:", add_special_tokens=False) == context[len(first) :]
    )
    for text in ("it:", "it: ", "it: ket"):
        found = lm._encode_pair(text, "it: kettle"[len(text) :])
        assert found == (context, word)
    asked = lm._encode_pair("k", "ettle")
    assert asked[0] + asked[1] == (
        document_ids(tokenizer, "kettle") if first else [*asked[0], *asked[1]]
    )
    assert len(asked[0]) >= 1 and len(asked[1]) >= 1


def test_perplexity_of_a_whole_document_scores_no_eos(folder, tokenizer):
    from uiollms.build import load_memory_lm
    from uiollms.config.load import load_env_config

    model, loaded = load_memory_lm(load_env_config("env.json"), "env.json")
    fields = dict(
        task_type="perplexity", task_name="files:book.txt", num_instance=1, protocols=("document",)
    )
    scores = Evaluation(model, loaded, [TaskEntry(**fields)]).run()[0].scores["memory"]
    assert len(scores[0].nll) == len(document_ids(tokenizer, Path("book.txt").read_text())) - 1
