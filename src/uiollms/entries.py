"""What a training takes documents from, and in which stages: the entries of `train.corpus` and
`train.stages`; and what all parts of a config have in common.

Units: lengths in tokens; shares of documents.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from uiollms.refusals import all_right

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
    """Unknown keys are errors, types are strict (no "10" for 10, no true for 1), objects do not change."""

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
    """Case, spaces and underscores as people write them: "Language_Modeling" is "language modeling"."""
    return " ".join(value.replace("_", " ").lower().split()) if isinstance(value, str) else value


class CorpusEntry(Checked):
    """One source of training documents."""

    name: str = Field(description="corpus name, or files:my/books/*.txt: docs/evaluation.md")
    partition: Fraction = Field(description="share of the documents; all shares sum to 1 (within 0.001)")
    truncation: Positive | None = Field(None, description="tokens kept of a document, null = all")
    crop: Literal["start", "random"] = Field("start", description="which tokens are kept when a document is longer")
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
                f"kl_weight {self.kl_weight:g} with {self.task}: a copy is told by memory alone and has no teacher; remove it"
            )
        if self.kl_weight is not None and self.task == "memory utilization":
            faults.append(f"kl_weight {self.kl_weight:g} with memory utilization: its loss is the KL alone; remove it")
        weighs = ("language modeling", "question answering", None)
        if self.token_weighting == "context" and self.task not in weighs:
            faults.append(
                f"token_weighting context with {self.task}: it weighs the tokens of a document that "
                f"is read from its start; allowed are language modeling and question answering"
            )
        if self.token_weighting == "context" and self.truncation is None:
            faults.append("token_weighting context reads documents raw, too: set truncation to what the base has positions for")
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
    max_lr: Annotated[float, Field(gt=0)] | None = Field(None, description="peak learning rate; null = train.max_lr")
    warmup: Fraction | None = Field(None, description="share of the stage in which the rate grows; null = train.warmup")
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
                faults.append(f"sizes: chunk_size {chunk_size} must be a multiple of num_memory {num_memory}")
        return all_right(self, faults)


def stages_fault(stages: tuple[Stage, ...]) -> str | None:
    total = sum(stage.share for stage in stages)
    if not stages or abs(total - 1) <= SHARES_OFF:
        return None
    return f"the shares of the stages sum to {total:g}, they must sum to 1"
