"""What a training takes documents from, in which stages, and what is evaluated: the entries of
`train.corpus`, `train.stages`, `train.tasks` and test.json; and what all parts of a config share.

Units: lengths in tokens; shares of documents.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from uiollms.files.errors import all_right

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SchemaLink: Any = Field(
    None,
    alias="$schema",
    exclude=True,
    description="path of the JSON Schema, for completion in editors",
)
# Shares may be rounded to three digits (the rest: of adding floats); Mixture normalises.
SHARES_OFF = 1e-3 + 1e-9


class Checked(BaseModel):
    """Unknown keys are errors, types are strict (no "10" for 10, no true for 1), objects do not
    change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


COPY_TASKS = ("auto encoding", "longdata copy")
# What a sample of plain text, or of a prompt with its response, can be made for.
TrainingTask = Literal[
    "language modeling",
    "auto encoding",
    "longdata copy",
    "question answering",
    "memory utilization",
    "synthetic recall",
]
Size = tuple[Positive, Positive]  # chunk_size, num_memory


def spelled(value: Any) -> Any:
    """Case, spaces and underscores as people write them: "Language_Modeling" is "language
    modeling"."""
    return " ".join(value.replace("_", " ").lower().split()) if isinstance(value, str) else value


class CorpusEntry(Checked):
    """One source of training documents."""

    name: str = Field(description="corpus name, or files:my/books/*.txt: docs/evaluation.md")
    partition: Fraction = Field(
        description="share of the documents; all shares sum to 1 (within 0.001)"
    )
    truncation: Positive | None = Field(None, description="tokens kept of a document, null = all")
    crop: Literal["start", "random"] = Field(
        "start", description="which tokens are kept when a document is longer"
    )
    task: TrainingTask | None = Field(
        None,
        description="what plain text is trained for: each token predicted (language modeling); one "
        "chunk, or all, written down from memory (auto encoding, longdata copy); the raw context's "
        "effect on random tokens (memory utilization); facts hidden in it and asked for later "
        "(synthetic recall). null = what the corpus is for",
    )
    kl_weight: Fraction | None = Field(
        None,
        description="share of KL(teacher || student) in the loss, the teacher being the base that "
        "reads the context raw; null = the corpus's own (mostly 0)",
    )
    token_weighting: Literal["uniform", "context"] = Field(
        "uniform",
        description="context: a token's loss has the weight max(0, nll_window - nll_raw) of the "
        "frozen base, mean 1 a document: what raw context helps with counts, the rest does not; "
        "needs a truncation that the base can read raw",
    )

    @model_validator(mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        if isinstance(value, dict) and "task" in value:
            return value | {"task": spelled(value["task"])}
        return value

    @model_validator(mode="after")
    def _fields_fit_the_task(self) -> CorpusEntry:
        faults = []
        if self.kl_weight and self.task in COPY_TASKS:
            faults.append(
                f"kl_weight {self.kl_weight:g} with {self.task}: a copy is told by memory alone "
                "and has no teacher; remove it"
            )
        if self.kl_weight is not None and self.task == "memory utilization":
            faults.append(
                f"kl_weight {self.kl_weight:g} with memory utilization: its loss is the KL alone; "
                "remove it"
            )
        weighs = ("language modeling", "question answering", None)
        if self.token_weighting == "context" and self.task not in weighs:
            faults.append(
                f"token_weighting context with {self.task}: it weighs the tokens of a document "
                "that "
                f"is read from its start; allowed are language modeling and question answering"
            )
        if self.token_weighting == "context" and self.truncation is None:
            faults.append(
                "token_weighting context reads documents raw, too: set truncation to what the base "
                "has positions for"
            )
        return all_right(self, faults)


def share_fault(corpus: tuple[CorpusEntry, ...]) -> str | None:
    total = sum(entry.partition for entry in corpus)
    if abs(total - 1) <= SHARES_OFF:
        return None
    return f"the corpus partitions sum to {total:g}, they must sum to 1"


class Stage(Checked):
    """A part of a training run, with a learning rate that rises and falls by itself. What is left
    out is the run's."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(
        description="of train_iters, its ends rounded to whole optimizer steps; all shares sum to "
        "1 (within 0.001). A run that is made longer lengthens its last stage alone"
    )
    corpus: Annotated[tuple[CorpusEntry, ...], Field(min_length=1)] | None = Field(
        None, description="what is trained on; null = train.corpus"
    )
    max_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak learning rate; null = train.max_lr"
    )
    warmup: Fraction | None = Field(
        None, description="share of the stage in which the rate grows; null = train.warmup"
    )
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)] | None = Field(
        None,
        description="pairs [chunk_size, num_memory], one of them drawn for every optimizer step "
        "(one named twice twice as often); null = the compressor config's. The weights do not "
        "depend on them: those saved name the compressor config's size as their default",
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
        return all_right(self, faults)


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
TEXT_TASKS = (
    "perplexity",
    "language modeling",
)  # every token of plain text is scored, by a protocol
RETRIEVAL_TASKS = ("passkey", "needle")
MOST_TRIALS = 10_000  # at a depth; all are made before the first is scored


class TaskEntry(Checked):
    """One evaluation."""

    task_type: TaskType = Field(description="what is measured: docs/evaluation.md")
    task_name: str = Field(
        description="corpus name; for passkey and needle the corpus that the filler text comes from"
    )
    num_instance: Positive = Field(
        description="documents; for passkey and needle trials at each depth"
    )
    documents: Literal["first", "full"] = Field(
        default="first",
        description="perplexity and language modeling only: which documents of the corpus. "
        "first: the first num_instance, shorter ones as they are, as in the release; full: the "
        "first that fill truncation, and where they are too few the first shorter ones of more "
        "than a chunk",
    )
    truncation: Positive | None = Field(
        default=None,
        description="tokens kept of a document, null = all; passkey, needle: of a trial",
    )
    compare: tuple[Literal["window", "raw", "shuffled", "recent"], ...] = Field(
        default=(),
        description=(
            "also score the same tokens without memory (window), with the raw context "
            "where positions allow (raw), with the memories of another document (shuffled), and "
            "with as "
            "many raw tokens right in front as memory has slots (recent)"
        ),
    )
    chunk_size: Positive | None = Field(
        None,
        description="tokens of a chunk in this task; null = the compressor config's",
    )
    num_memory: Positive | None = Field(
        None,
        description="memory slots of a chunk in this task; null = the compressor config's",
    )
    protocols: tuple[Literal["paper", "document", "later"], ...] = Field(
        default=("paper",),
        min_length=1,
        description=(
            "perplexity and language modeling only: which tokens are scored, one result each. "
            "paper: all but the first "
            "of every chunk; document: all but the document's first; later: as document, but those "
            "that read no memory"
        ),
    )
    depths: tuple[Fraction, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "passkey and needle only: where in the context the sentence is hidden, 0 its start, 1 "
            "its end; null = 0, "
            "0.25, 0.5, 0.75 and 1"
        ),
    )
    generate: bool = Field(
        default=False,
        description=(
            "question answering only: also answer greedily, up to the reference's length, scored "
            "by ROUGE-L"
        ),
    )

    @field_validator("task_type", mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        """Case, spaces and underscores as people write them: "Language_Modeling" is "language
        modeling"."""
        name = spelled(value)
        if name == "random memory utilization":
            raise ValueError(
                "the release names this task but has no code for it; use 'memory utilization'"
            )
        return name

    @model_validator(mode="after")
    def _fields_fit_the_task(self) -> TaskEntry:
        faults = []
        if self.protocols != ("paper",) and self.task_type not in TEXT_TASKS:
            faults.append(
                f"protocols is for {' and '.join(TEXT_TASKS)}; {self.task_type} has one way to "
                "score: remove it"
            )
        if self.documents != "first" and self.task_type not in TEXT_TASKS:
            faults.append(
                f"documents is for {' and '.join(TEXT_TASKS)}; {self.task_type} takes the first "
                f"whose loss can read memory: remove it"
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
        if self.task_type in RETRIEVAL_TASKS and self.num_instance > MOST_TRIALS:
            faults.append(
                f"num_instance: at most {MOST_TRIALS} trials at each depth, found "
                f"{self.num_instance}"
            )
        if self.task_type in COPY_TASKS and {"raw", "recent"} & set(self.compare):
            compared = " and ".join(mode for mode in self.compare if mode in ("raw", "recent"))
            what = f"{self.task_type} is from memory alone; allowed are window and shuffled"
            faults.append(f"compare: {compared}: {what}")
        if "shuffled" in self.compare and self.num_instance < 2:
            faults.append(
                "compare: shuffled reads another document's memories, num_instance must be at "
                "least 2, found 1"
            )
        return all_right(self, faults)
