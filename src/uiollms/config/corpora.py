"""The entries of `train.corpus`, `train.stages`, `train.tasks` and test.json, and the base class
of all sections.

Units: lengths are in tokens, `partition` and `share` are fractions of documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from uiollms.config.modes import Mode
from uiollms.config.protocols import ProtocolName, parse_protocol
from uiollms.files.errors import validated

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SchemaLink: Any = Field(
    None,
    alias="$schema",
    exclude=True,
    description="path of the JSON Schema, with which editors complete and check the file",
)
# Fractions may be rounded to three digits, and their float sum has an error; Mixture normalises.
SHARES_OFF = 1e-3 + 1e-9


class Checked(BaseModel):
    """The base class of all sections. Unknown keys are errors, types are strict ("10" is no
    number, true is not 1), and objects are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


PLUGIN = "plugin:"  # names of plugins begin with it; see uiollms/plugins.py
PluginName = Annotated[str, Field(pattern=r"^plugin:[A-Za-z0-9][A-Za-z0-9_.-]*$"), Tag("(plugin)")]
BUILT_IN = Tag("(built-in)")
Options = dict[str, Any]


def name_tag(value: Any) -> str:
    """Which of the two kinds of names a value is to be: only faults of that kind are reported."""
    is_plugin = isinstance(value, str) and value.startswith(PLUGIN)
    return "(plugin)" if is_plugin else "(built-in)"


NAME = Discriminator(name_tag)


def options_fault(field: str, options: Mapping[str, Any], named: str, name: str) -> str | None:
    """Describes options that no plugin takes. named: the field that names the plugin."""
    if not options or name_tag(name) == "(plugin)":
        return None
    return f"{field} are for a plugin, found with {named} {name!r}: remove them"


COPY_TASKS = ("auto encoding", "longdata copy")
TrainingTask = Literal[
    "language modeling",
    "auto encoding",
    "longdata copy",
    "question answering",
    "memory utilization",
    "synthetic recall",
]
TrainingTaskName = Annotated[Annotated[TrainingTask, BUILT_IN] | PluginName, NAME]
Size = tuple[Positive, Positive]  # chunk_size, num_memory
CORPUS_OPTIONS: Any = Field(
    default={}, description="options of the corpus plugin:NAME, which the plugin describes"
)
TASK_OPTIONS: Any = Field(
    default={}, description="options of the task plugin:NAME, which the plugin describes"
)


def normalised_words(value: Any) -> Any:
    """Normalises case, spaces and underscores: "Language_Modeling" -> "language modeling". The
    names of plugins do not change."""
    if name_tag(value) == "(plugin)":
        return value
    return " ".join(value.replace("_", " ").lower().split()) if isinstance(value, str) else value


class CorpusEntry(Checked):
    """One source of training documents."""

    name: str = Field(
        description="name of a corpus, or files:my/books/*.txt, or hub:org/name, or plugin:NAME of "
        "an installed package; see docs/evaluation.md and docs/extending.md"
    )
    corpus_options: Options = CORPUS_OPTIONS
    partition: Fraction = Field(
        description="fraction of the documents that come from this corpus; the fractions sum to 1 "
        "(within 0.001)"
    )
    truncation: Positive | None = Field(
        None, description="largest number of tokens that are read of a document. null: all"
    )
    crop: Literal["start", "random"] = Field(
        "start", description="which tokens of a longer document are read"
    )
    task: TrainingTaskName | None = Field(
        None,
        description="training task of plain text. language modeling: predict each token. auto "
        "encoding: copy one chunk from its memory. longdata copy: copy all chunks from memory. "
        "memory utilization: reproduce the effect of the raw context on random tokens. synthetic "
        "recall: answer questions about facts hidden in earlier chunks. plugin:NAME: the task of "
        "an installed package. null: the corpus's task",
    )
    task_options: Options = TASK_OPTIONS
    kl_weight: Fraction | None = Field(
        None,
        description="weight of KL(teacher || student) in the loss; the rest is cross entropy. The "
        "teacher is the base, which reads the context raw. null: the corpus's default (mostly 0)",
    )
    token_weighting: Literal["uniform", "context"] = Field(
        "uniform",
        description="uniform: all scored tokens have the same weight. context: a token's weight is "
        "max(0, nll_window - nll_raw) of the frozen base, divided by the mean over the document, "
        "so that only tokens count that the raw context helps to predict. It needs a truncation "
        "that the base can read raw",
    )

    @model_validator(mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        if isinstance(value, dict) and "task" in value:
            return value | {"task": normalised_words(value["task"])}
        return value

    @model_validator(mode="after")
    def _fields_fit_the_task(self) -> CorpusEntry:
        found = [
            options_fault("corpus_options", self.corpus_options, "name", self.name),
            options_fault("task_options", self.task_options, "task", self.task or "null"),
        ]
        faults = [fault for fault in found if fault]
        if self.kl_weight is not None and name_tag(self.task) == "(plugin)":
            faults.append(
                f"kl_weight {self.kl_weight:g} with {self.task}: the plugin determines its loss; "
                "remove it"
            )
        if self.kl_weight and self.task in COPY_TASKS:
            faults.append(
                f"kl_weight {self.kl_weight:g} with {self.task}: a copy is decoded from memory "
                "alone and has no teacher; remove it"
            )
        if self.kl_weight is not None and self.task == "memory utilization":
            faults.append(
                f"kl_weight {self.kl_weight:g} with memory utilization: its loss is only the KL; "
                "remove it"
            )
        weighs = ("language modeling", "question answering", None)
        if self.token_weighting == "context" and self.task not in weighs:
            faults.append(
                f"token_weighting context with {self.task}: it weights the tokens of a document "
                "that is read from its start; allowed are language modeling and question answering"
            )
        if self.token_weighting == "context" and self.truncation is None:
            faults.append(
                "token_weighting context also reads documents raw: set truncation to at most the "
                "base's number of positions"
            )
        return validated(self, faults)


def share_fault(corpus: tuple[CorpusEntry, ...]) -> str | None:
    total = sum(entry.partition for entry in corpus)
    if abs(total - 1) <= SHARES_OFF:
        return None
    return f"the corpus partitions sum to {total:g}, they must sum to 1"


class Stage(Checked):
    """A part of a training run with a learning rate schedule of its own. Fields that are left out
    have the values of `train`."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(
        description="fraction of train_iters, rounded to whole optimizer steps; the fractions sum "
        "to 1 (within 0.001). A resumed run with a larger train_iters lengthens only its last stage"
    )
    corpus: Annotated[tuple[CorpusEntry, ...], Field(min_length=1)] | None = Field(
        None, description="sources of documents. null: train.corpus"
    )
    max_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak learning rate. null: train.max_lr"
    )
    warmup: Fraction | None = Field(
        None,
        description="fraction of the stage in which the learning rate rises. null: train.warmup",
    )
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)] | None = Field(
        None,
        description="pairs [chunk_size, num_memory], one of which is drawn for every optimizer "
        "step; a pair that is listed twice is drawn twice as often. null: the compressor config's "
        "sizes. The shapes of the weights do not depend on them; saved weights name the compressor "
        "config's sizes as their default",
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Stage:
        faults = []
        if self.corpus and (fault := share_fault(self.corpus)):
            faults.append(fault)
        for chunk_size, num_memory in self.sizes or ():
            if chunk_size % num_memory:
                faults.append(
                    f"sizes: chunk_size {chunk_size} must be a multiple of num_memory {num_memory}"
                )
        return validated(self, faults)


def stages_fault(stages: tuple[Stage, ...]) -> str | None:
    total = sum(stage.share for stage in stages)
    if not stages or abs(total - 1) <= SHARES_OFF:
        return None
    return f"the shares of the stages sum to {total:g}, they must sum to 1"


TaskType = Literal[
    "perplexity",
    "language modeling",
    "question answering",
    "auto encoding",
    "longdata copy",
    "activation beacons",
    "news qa summation",
    "news qa summation v2",
    "memory utilization",
    "passkey",
    "needle",
]
TaskTypeName = Annotated[Annotated[TaskType, BUILT_IN] | PluginName, NAME]
TEXT_TASKS = (
    "perplexity",
    "language modeling",
)  # every token of plain text is scored, by a protocol
RETRIEVAL_TASKS = ("passkey", "needle")
# Tasks with a question, by which passages can be chosen.
QUESTION_TASKS = (
    "question answering",
    "activation beacons",
    "news qa summation",
    "news qa summation v2",
    *RETRIEVAL_TASKS,
)
# A copy is generated from memory alone, so it has only these two.
COPY_MODES = ("window", "shuffled")
MOST_TRIALS = 10_000  # at a depth; all of them are built before the first one is scored


class TaskEntry(Checked):
    """One evaluation."""

    task_type: TaskTypeName = Field(
        description="kind of evaluation, see docs/evaluation.md, or plugin:NAME of an installed "
        "package, see docs/extending.md"
    )
    task_options: Options = TASK_OPTIONS
    task_name: str = Field(
        description="name of a corpus; passkey and needle take their filler text from it"
    )
    corpus_options: Options = CORPUS_OPTIONS
    num_instance: Positive = Field(
        description="number of documents; for passkey and needle, number of trials at each depth"
    )
    documents: Literal["first", "full"] = Field(
        default="first",
        description="which documents of the corpus are scored; perplexity and language modeling "
        "only. first: the first num_instance documents, whatever their lengths, as in the "
        "released program. full: the first documents of at least truncation tokens; if there are "
        "too few, then the first shorter ones of more than a chunk",
    )
    truncation: Positive | None = Field(
        default=None,
        description="largest number of tokens that are read of a document. null: all. For passkey "
        "and needle, the length of a trial",
    )
    compare: tuple[Mode, ...] = Field(
        default=(),
        description=(
            "modes that score the same tokens for comparison. window: without memory. raw: with "
            "the raw context, if it fits the base's positions. shuffled: with the memories of "
            "another document. The others read as many slots as memory has. recent: the preceding "
            "raw tokens. streaming: the document's first four tokens and the preceding ones. bm25: "
            "passages that resemble the question. pooled: averaged keys and values of the raw "
            "context. snapkv, knorm, expected_attention, kvzip and press:NAME: presses of kvpress, "
            "which compress the raw context; see docs/alternatives.md"
        ),
    )
    costs: bool = Field(
        default=False,
        description=(
            "whether the cost of every mode is measured too, for the longest context of the first "
            "document: slots, peak memory, seconds to compress and seconds a token"
        ),
    )
    chunk_size: Positive | None = Field(
        None,
        description="number of tokens in a chunk in this task. null: the compressor config's",
    )
    num_memory: Positive | None = Field(
        None,
        description="number of memory slots of a chunk in this task. null: the compressor config's",
    )
    protocols: tuple[ProtocolName, ...] = Field(
        default=("paper",),
        min_length=1,
        description=(
            "which tokens are scored, with one result for each protocol; perplexity and language "
            "modeling only. paper: all except the first of every chunk. document: all except the "
            "document's first. later: those of document that read a memory. beacon: as document, "
            "with equal weights for all documents. sliding.L: windows of L tokens, each of which "
            "is a document of its own, at every 256 tokens; only a window's new tokens count. "
            "last.N: the last N tokens. segment.N: the last N tokens, which are read raw after "
            "the memories of the rest; see docs/protocols.md"
        ),
    )
    depths: tuple[Fraction, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "positions in the context at which the sentence is hidden, from 0 (start) to 1 (end); "
            "passkey and needle only. null: 0, 0.25, 0.5, 0.75 and 1"
        ),
    )
    generate: bool = Field(
        default=False,
        description=(
            "whether the model also generates answers greedily, up to the reference's length, "
            "which are scored by ROUGE-L, exact match and token F1; question answering only"
        ),
    )
    max_new_tokens: Positive | None = Field(
        default=None,
        description=(
            "largest number of tokens of an answer with generate. null: those of its reference"
        ),
    )

    @field_validator("task_type", mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        name = normalised_words(value)
        if name == "random memory utilization":
            raise ValueError(
                "the release names this task but has no code for it; use 'memory utilization'"
            )
        return name

    @model_validator(mode="after")
    def _fields_fit_the_task(self) -> TaskEntry:
        found = [
            options_fault("task_options", self.task_options, "task_type", self.task_type),
            options_fault("corpus_options", self.corpus_options, "task_name", self.task_name),
        ]
        faults = [fault for fault in found if fault]
        if self.protocols != ("paper",) and self.task_type not in TEXT_TASKS:
            faults.append(
                f"protocols is for {' and '.join(TEXT_TASKS)}; {self.task_type} has one protocol: "
                "remove it"
            )
        for protocol in self.protocols:
            kind, tokens = parse_protocol(protocol)
            if kind == "segment" and self.truncation is not None and self.truncation <= tokens:
                faults.append(
                    f"protocols: {protocol} scores the last {tokens} tokens after the memories of "
                    f"those before, but truncation is {self.truncation}: it must be larger by at "
                    "least a chunk"
                )
        if self.documents != "first" and self.task_type not in TEXT_TASKS:
            faults.append(
                f"documents is for {' and '.join(TEXT_TASKS)}; {self.task_type} takes the first "
                "documents whose loss depends on memory: remove it"
            )
        if self.depths is not None and self.task_type not in RETRIEVAL_TASKS:
            faults.append(
                f"depths is for {' and '.join(RETRIEVAL_TASKS)}; {self.task_type} hides nothing: "
                "remove it"
            )
        if self.generate and self.task_type != "question answering":
            faults.append(
                f"generate is for question answering, found with {self.task_type}: remove it"
            )
        if self.max_new_tokens is not None and not self.generate:
            faults.append('max_new_tokens is for tasks with "generate": true: add it')
        if self.task_type in RETRIEVAL_TASKS and self.num_instance > MOST_TRIALS:
            faults.append(
                f"num_instance: at most {MOST_TRIALS} trials at each depth, found "
                f"{self.num_instance}"
            )
        if self.task_type in COPY_TASKS and set(self.compare) - set(COPY_MODES):
            compared = " and ".join(mode for mode in self.compare if mode not in COPY_MODES)
            what = f"{self.task_type} decodes from memory alone; allowed are window and shuffled"
            faults.append(f"compare: {compared}: {what}")
        if "bm25" in self.compare and self.task_type not in QUESTION_TASKS:
            faults.append(
                f"compare: bm25 chooses passages by a question, {self.task_type} has none; allowed "
                f"with {', '.join(QUESTION_TASKS)}"
            )
        if "shuffled" in self.compare and self.num_instance < 2:
            faults.append(
                "compare: shuffled reads another document's memories, num_instance must be at "
                "least 2, found 1"
            )
        return validated(self, faults)
