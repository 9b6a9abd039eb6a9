"""Questions of LongBench, LongBench-v2, BABILong and HELMET, read from a local copy of the dataset
in $UIOLLMS_HUB_DIR/<org>/<name>, as raw_data/README.md describes it.

The prompts of LongBench and LongBench-v2 are those that the benchmarks publish, and so are HELMET's
of the RAG sets, without its examples. The others are plain, as the comments beside them state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from uiollms.data.corpora.labelled import text_list_field
from uiollms.data.documents import Corpus, LazyCorpus, QuestionDocument
from uiollms.data.readers.benchmark_files import BenchmarkFile, table
from uiollms.data.readers.fields import Fields, text_field
from uiollms.data.readers.json_lines import json_lines
from uiollms.data.registry import register_corpus
from uiollms.files.errors import ConfigError


@dataclass(frozen=True)
class QuestionSet:
    """How the rows of a set become questions.

    template: the prompt, with the names of columns in braces
    metric, max_new_tokens, first_line: as in QuestionDocument
    delimiter: stands between the prompt and the answer
    """

    template: str
    metric: str
    max_new_tokens: int
    delimiter: str = " "
    first_line: bool = False

    def document(
        self,
        columns: Mapping[str, str],
        references: list[str],
        source: str,
        labels: tuple[str, ...] = (),
    ) -> QuestionDocument:
        if not references:
            raise ConfigError(f"{source}: has no reference answer")
        return QuestionDocument(
            self.template.format(**columns),
            source,
            self.delimiter + references[0],
            "question answering",
            references=tuple(references),
            metric=self.metric,
            labels=labels,
            max_new_tokens=self.max_new_tokens,
            first_line=self.first_line,
        )


# ---- LongBench (Bai et al. 2023): its English sets, prompts, answer lengths and metrics ----------

CONCISE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question "
    'cannot be answered based on the information in the article, write "unanswerable". If the '
    'question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
    "explanation."
)
# "asconcisely" is in the published prompt.
STORY = "asconcisely as you can, using a single phrase if possible. Do not provide any explanation."
PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words."
)
MULTI_HOP = QuestionSet(
    f"{PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{PASSAGES}\n\n"
    "Question: {input}\nAnswer:",
    "token_f1",
    32,
)
LONGBENCH_SETS = {
    "narrativeqa": QuestionSet(
        "You are given a story, which can be either a novel or a movie script, and a question. "
        f"Answer the question {STORY}\n\nStory: {{context}}\n\nNow, answer the question based on "
        f"the story {STORY}\n\nQuestion: {{input}}\n\nAnswer:",
        "token_f1",
        128,
    ),
    "qasper": QuestionSet(
        f"You are given a scientific article and a question. Answer the question {CONCISE}\n\n"
        "Article: {context}\n\n Answer the question based on the above article "
        f"{CONCISE}\n\nQuestion: {{input}}\n\nAnswer:",
        "token_f1",
        128,
    ),
    "multifieldqa_en": QuestionSet(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: {input}\nAnswer:",
        "token_f1",
        64,
    ),
    "hotpotqa": MULTI_HOP,
    "2wikimqa": MULTI_HOP,
    "musique": MULTI_HOP,
    "gov_report": QuestionSet(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
        "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        "rouge_l",
        512,
    ),
    "qmsum": QuestionSet(
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the "
        "query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\n"
        "Answer:",
        "rouge_l",
        512,
    ),
    "multi_news": QuestionSet(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
        "{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        "rouge_l",
        512,
    ),
    "trec": QuestionSet(
        "Please determine the type of the question below. Here are some examples of questions.\n\n"
        "{context}\n{input}",
        "class_match",
        64,
        delimiter="",
        first_line=True,
    ),
    "triviaqa": QuestionSet(
        "Answer the question based on the given passage. Only give me the answer and do not output "
        "any other words. The following are some examples.\n\n{context}\n{input}",
        "token_f1",
        32,
        delimiter="",
        first_line=True,
    ),
    "samsum": QuestionSet(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
        "{context}\n{input}",
        "rouge_l",
        128,
        delimiter="",
        first_line=True,
    ),
    "passage_count": QuestionSet(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
        "Please carefully read these paragraphs and determine how many unique paragraphs there are "
        "after removing duplicates. In other words, how many non-repeating paragraphs are there in "
        "total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing "
        "duplicates. The output format should only contain the number, such as 1, 2, 3, and so "
        "on.\n\nThe final answer is:",
        "number_match",
        32,
    ),
    "passage_retrieval_en": QuestionSet(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
        "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}"
        "\n\nPlease enter the number of the paragraph that the abstract is from. The answer format "
        'must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is:',
        "number_match",
        32,
    ),
    "lcc": QuestionSet(
        "Please complete the code given below. \n{context}Next line of code:\n",
        "code_similarity",
        64,
        delimiter="",
    ),
    "repobench-p": QuestionSet(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        "code_similarity",
        64,
        delimiter="",
    ),
}


def longbench_file(name: str) -> BenchmarkFile:
    member = f"data/{name}.jsonl"
    return BenchmarkFile(
        ("THUDM/LongBench", "zai-org/LongBench"),
        (member,),
        ("data.zip", member),
        "hf download THUDM/LongBench data.zip --repo-type dataset --local-dir {folder}",
    )


@register_corpus(
    "longbench.SET",
    rf"longbench\.({'|'.join(LONGBENCH_SETS)})",
    task="question answering",
    sources=[longbench_file("*")],
    sources_read=lambda name: [longbench_file(name)],
)
def longbench(name: str) -> Corpus:
    def make(fields: Fields, source: str) -> QuestionDocument:
        columns = {key: text_field(fields, key, source) for key in ("context", "input")}
        references = text_list_field(fields, "answers", source)
        classes = fields.get("all_classes") is not None
        labels = text_list_field(fields, "all_classes", source) if classes else ()
        return LONGBENCH_SETS[name].document(columns, references, source, tuple(labels))

    return json_lines(longbench_file(name).path(), make)


# ---- LongBench-v2 (Bai et al. 2024): the published prompt without reasoning ----------------------

LONGBENCH_2 = BenchmarkFile(
    ("THUDM/LongBench-v2", "zai-org/LongBench-v2"),
    ("data.json",),
    download="hf download THUDM/LongBench-v2 --repo-type dataset --local-dir {folder}",
)
CHOICE = QuestionSet(
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>"
    "\n\nWhat is the correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n"
    "(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\nFormat your response as follows: "
    '"The correct answer is (insert answer here)".',
    "choice_match",
    128,
)
CHOICE_COLUMNS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")


@register_corpus(
    "longbench-v2[.{short,medium,long}]",
    r"longbench-v2(?:\.(short|medium|long))?",
    task="question answering",
    sources=[LONGBENCH_2],
)
def longbench_2(length: str | None) -> Corpus:
    """The answer is compared with the letter. Its NLL is that of the sentence that names it."""
    path = LONGBENCH_2.path()
    rows = table(path, (*CHOICE_COLUMNS, "answer", "length"))
    numbers = [i for i, found in enumerate(rows["length"]) if length in (None, found)]

    def read(i: int) -> QuestionDocument:
        fields, source = rows[numbers[i]], f"{path}: row {numbers[i] + 1}"
        columns = {key: text_field(fields, key, source) for key in CHOICE_COLUMNS}
        letter = text_field(fields, "answer", source)
        document = CHOICE.document(columns, [letter], source)
        return replace(document, response=f"\n\nThe correct answer is ({letter}).")

    return LazyCorpus(len(numbers), read)


# ---- BABILong (Kuratov et al. 2024) --------------------------------------------------------------

# The published prompts contain examples and a form of answer for each task. This one has neither,
# and the same metric: the first sentence must name the answer and no other possible one.
FACTS = QuestionSet(
    "{input}\n\nAnswer the question with the facts in the text above.\nQuestion: {question}\n"
    "Answer:",
    "only_label_match",
    16,
)
BABILONG_LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "256k", "512k", "1m")


def babilong_file(task: str, length: str) -> BenchmarkFile:
    config = length.replace("m", "M")
    return BenchmarkFile(
        ("RMT-team/babilong",),
        (
            f"data/{task}/{config}.json",
            f"{config}/{task}-*.parquet",
            f"data/{config}/{task}-*.parquet",
        ),
        download="hf download RMT-team/babilong --repo-type dataset --local-dir {folder}",
    )


@register_corpus(
    "babilong.TASK.LENGTH",
    rf"babilong\.(qa(?:1\d|20|[1-9]))\.({'|'.join(BABILONG_LENGTHS)})",
    task="question answering",
    sources=[babilong_file("*", "*")],
    sources_read=lambda *arguments: [babilong_file(*arguments)],
)
def babilong(task: str, length: str) -> Corpus:
    """The possible answers are all answers in the file, without those that a question names."""
    path = babilong_file(task, length).path()
    rows = table(path, ("input", "question", "target"))
    labels = sorted({part for target in rows["target"] for part in target.split(",")})

    def read(i: int) -> QuestionDocument:
        source = f"{path}: row {i + 1}"
        fields = {key: text_field(rows[i], key, source) for key in ("input", "question", "target")}
        asked = fields["question"].lower()
        possible = tuple(label for label in labels if label.lower() not in asked)
        return FACTS.document(fields, [fields["target"]], source, possible)

    return LazyCorpus(len(rows), read)


# ---- HELMET (Yen et al. 2024): recall and RAG ----------------------------------------------------

HELMET_LENGTHS = ("4k", "8k", "16k", "32k", "64k", "128k")
PASSAGES_OF_LENGTH = dict(zip(HELMET_LENGTHS, (20, 50, 105, 220, 440, 1000), strict=True))
KEYS_OF_LENGTH = dict(zip(HELMET_LENGTHS, (50, 105, 220, 440, 900, 1800), strict=True))
# The published prompt, of which the two examples before the documents are left out.
RAG = QuestionSet(
    "Use the given documents to write a concise and short answer to the question. Write your "
    "answer in the following format:\nAnswer: [answer]\n\n{context}\n\nQuestion: {question}\n"
    "Answer:",
    "contains",
    20,
)
# Plain prompts in RULER's words; HELMET adds examples to those of JSON objects.
KEYS = QuestionSet(
    "{context}\n\nExtract the value corresponding to the specified key in the JSON object above."
    "\n\nKey: {question}\nCorresponding value:",
    "contained_fraction",
    100,
)
NEEDLE = QuestionSet(
    "A special magic {type_needle_v} is hidden within the following text. Make sure to memorize "
    "it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat is the special "
    "magic {type_needle_v} for {query} mentioned in the provided text? The special magic "
    "{type_needle_v} for {query} mentioned in the provided text is",
    "contained_fraction",
    50,
)
NEEDLES = QuestionSet(
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all "
    "the special magic {type_needle_v} for {query} mentioned in the provided text? The special "
    "magic {type_needle_v} for {query} mentioned in the provided text are",
    "contained_fraction",
    100,
)
NEEDLE_COLUMNS = ("context", "query", "type_needle_v")
# name -> (file, in which N is replaced by a number of passages, keys or tokens; questions; columns)
HELMET_SETS: dict[str, tuple[str, QuestionSet, tuple[str, ...]]] = {
    "nq": ("data/kilt/nq-dev-multikilt_1000_kN_dep*.jsonl", RAG, ("question",)),
    "triviaqa": ("data/kilt/triviaqa-dev-multikilt_1000_kN_dep*.jsonl", RAG, ("question",)),
    "hotpotqa": ("data/kilt/hotpotqa-dev-multikilt_1000_kN_dep*.jsonl", RAG, ("question",)),
    "popqa": ("data/kilt/popqa_test_1000_kN_dep*.jsonl", RAG, ("question",)),
    "json_kv": ("data/json_kv/test_kN_dep*.jsonl", KEYS, ("context", "question")),
    "niah_mk_2": ("data/ruler/niah_m*k*_2/validation_N.jsonl", NEEDLE, NEEDLE_COLUMNS),
    "niah_mk_3": ("data/ruler/niah_m*k*_3/validation_N.jsonl", NEEDLE, NEEDLE_COLUMNS),
    "niah_mv": ("data/ruler/niah_m*v*/validation_N.jsonl", NEEDLES, NEEDLE_COLUMNS),
}


def helmet_file(name: str, length: str) -> BenchmarkFile:
    pattern, questions, _ = HELMET_SETS.get(name, ("data/*/*.jsonl", RAG, ()))
    number = 1024 * int(length[:-1]) if length != "*" else 0
    if questions in (RAG, KEYS) and length != "*":
        number = (PASSAGES_OF_LENGTH if questions is RAG else KEYS_OF_LENGTH)[length]
    return BenchmarkFile(
        ("princeton-nlp/HELMET",),
        (pattern.replace("N", str(number)),),
        download="hf download princeton-nlp/HELMET data.tar.gz --repo-type dataset --local-dir "
        "{folder}, then tar -xzf data.tar.gz in this folder",
    )


@register_corpus(
    "helmet.SET.LENGTH",
    rf"helmet\.({'|'.join(HELMET_SETS)})\.({'|'.join(HELMET_LENGTHS)})",
    task="question answering",
    sources=[helmet_file("*", "*")],
    sources_read=lambda *arguments: [helmet_file(*arguments)],
)
def helmet(name: str, length: str) -> Corpus:
    _, questions, names = HELMET_SETS[name]
    make = partial(helmet_document, questions=questions, names=names)
    return json_lines(helmet_file(name, length).path(), make)


def helmet_document(
    fields: Fields, source: str, questions: QuestionSet, names: tuple[str, ...]
) -> QuestionDocument:
    """A row of HELMET. Its answers are a text or a list, in the column `answer` or `answers`."""
    columns = {key: text_field(fields, key, source) for key in names}
    if questions is RAG:
        columns["context"] = "\n\n".join(
            passage(item, f"{source}: passage {i + 1}")
            for i, item in enumerate(passages(fields, source))
        )
    key = "answers" if "answers" in fields else "answer"
    single = isinstance(fields.get(key), str)
    references = [fields[key]] if single else text_list_field(fields, key, source)
    return questions.document(columns, references, source)


def passages(fields: Fields, source: str) -> list[Any]:
    found = fields.get("ctxs")
    if not isinstance(found, list):
        raise ConfigError(f"{source}: field 'ctxs' is {type(found).__name__}, expected a list")
    return found


def passage(item: Any, source: str) -> str:
    """The published form of a passage."""
    if not isinstance(item, dict):
        raise ConfigError(f"{source}: is {type(item).__name__}, expected an object")
    title, text = text_field(item, "title", source), text_field(item, "text", source)
    return f"Document (Title: {title}): {text}"
