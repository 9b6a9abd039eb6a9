"""Make the model of an environment config, and check the config before any weights are loaded.

A function named `examine_...` adds the faults that it finds to a `Faults` object, so that a command
can report all of them at once; one named `check_...` raises ConfigError.

In these functions `shape` is the base model's transformers config, which has its sizes; `memory` is
the compressor config. Each is None if it could not be read, which is a fault of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import COPY_TASKS, CorpusEntry, Size, TaskEntry
from uiollms.config.load import load_memory_config
from uiollms.config.sections import BuiltInEstimator, EnvConfig, MemoryConfig
from uiollms.data import find_corpus
from uiollms.data.builder import entry_plugin
from uiollms.distributed.device_map import first_device, place_modules
from uiollms.files.atomic import read_whole, whole_folder
from uiollms.files.errors import ConfigError, Faults
from uiollms.kernels.flash_attention import check_request
from uiollms.kernels.quantized import count_weights
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.rope import find_rope_fault, num_positions
from uiollms.plugins import EstimatorPlugin, is_plugin, make_plugin
from uiollms.weights.adapters import load_weights, other_values
from uiollms.weights.base_files import FAMILIES
from uiollms.weights.base_models import (
    base_config,
    load_causal_lm,
    load_tokenizer_for,
    resolve_dtype,
)
from uiollms.weights.fitness import eos_fault, rank_fault, window_fault

# ---- the model -----------------------------------------------------------------------------------


def load_memory_lm(config: EnvConfig, path: str | Path) -> tuple[MemoryLM, PreTrainedTokenizerBase]:
    """Loads the base model of an environment config, which was read from `path`, and its tokenizer,
    and adds the compressor's trained tensors, initialised from `train.seed`. Everything that can be
    checked without the weights is checked first. Raises ConfigError."""
    memory = check_model(config, path)
    name, attention = config.model.model_name, config.model.attn_implementation
    tokenizer = load_tokenizer_for(base_config(name), name)
    dtype = resolve_dtype(config.model.model_dtype, first_device(config.model.device_map))
    attention = "sdpa" if attention == "auto" else attention
    check_request(
        attention,
        f"{path}: model.attn_implementation",
        dtype,
        config.model.device_map,
        base_config(name),
    )
    base = load_causal_lm(
        name, config.model.quantization, dtype=dtype, attn_implementation=attention
    )
    place_modules(base, config.model.device_map, path, config.model.offload_dir)
    torch.manual_seed(config.train.seed)
    model = MemoryLM(base, memory, config.train.master_dtype)
    # train.py and test.py replace "auto" by a number (planning/planner.py); the other commands use
    # the model's default.
    if config.train.chunk_batch != "auto":
        model.chunk_batch = config.train.chunk_batch
    model.checkpointing = config.train.checkpointing
    model.pipeline = config.train.pipeline
    return model, tokenizer


def load_trained(
    config: EnvConfig, path: str | Path, weights: str | None = None
) -> tuple[MemoryLM, PreTrainedTokenizerBase, str]:
    """Loads the model of an environment config with the trained `weights`, by default those of
    `find_weights`. Returns model, tokenizer and the path of the weights. Raises ConfigError if
    there are none."""
    weights = weights or find_weights(config)
    if weights is None:
        raise ConfigError(
            f"{path}: there are no trained weights yet: neither {config.model.save_ckp}, load_ckp "
            "nor released_ckp; run train.py"
        )
    model, tokenizer = load_memory_lm(config, path)
    load_found_weights(model, config, weights)
    return model, tokenizer, weights


def load_found_weights(model: MemoryLM, config: EnvConfig, weights: str) -> None:
    """Loads the weights that `find_weights` returned. Those of load_ckp may have been trained with
    other sizes than the config's."""
    load_weights(model, weights, any_sizes=weights == config.model.load_ckp)


def find_weights(config: EnvConfig) -> str | None:
    """The path of the weights with which a config is evaluated and used: save_ckp, the result of
    its training, if it exists; else load_ckp, from which training starts; else released_ckp."""
    saved = config.model.save_ckp
    if saved and whole_folder(Path(saved)).exists():
        return saved
    return config.model.load_ckp or config.model.released_ckp


def describe_weights(weights: str | Path | None, model: MemoryLM) -> str:
    """The line in which a command reports its weights, with the sizes that they were saved with if
    the model has others."""
    return f"weights: {weights or 'untrained'}{saved_sizes(weights, model)}, base in {model.dtype}"


def saved_sizes(weights: str | Path | None, model: MemoryLM) -> str:
    """ " (saved with num_memory 16)", or nothing if the model has the same sizes or the weights are
    in no folder here."""

    def read(folder: Path) -> dict[str, Any]:
        known = (folder / "memory_config.json").is_file()
        return other_values(folder, model.memory_config) if known else {}

    others = read_whole(Path(weights), read) if weights else {}
    text = " and ".join(f"{field} {value}" for field, value in others.items())
    return f" (saved with {text})" if text else ""


def count_parameters(model: MemoryLM) -> tuple[int, int]:
    """The numbers of trained and of frozen parameters."""
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    return trained, count_weights(model.base)


# ---- checks of base model and compressor ---------------------------------------------------------


def check_env(config: EnvConfig, path: str | Path) -> MemoryConfig:
    """Checks everything in an environment config that needs neither weights nor data, and returns
    its compressor config. Raises ConfigError with a line for every fault."""
    faults = Faults()
    memory, shape = examine_model(config, path, faults)
    examine_training_dtype(config, path, faults)
    if config.train.compile_encoder and memory and memory.lora_dropout:
        faults.add(
            f"{path}: train.compile_encoder true does not work with lora_dropout "
            f"{memory.lora_dropout} of {config.model.config}: set one of them to false or 0"
        )
    examine_estimator(config, path, faults)
    examine_entries(data_entries(config), memory, shape, path, faults)
    examine_stages(config, memory, shape, path, faults)
    faults.report()
    assert memory is not None
    return memory


def check_model(config: EnvConfig, path: str | Path) -> MemoryConfig:
    """Checks only the base model and the compressor, as `check_env` does."""
    faults = Faults()
    memory, _ = examine_model(config, path, faults)
    faults.report()
    assert memory is not None
    return memory


def examine_training_dtype(config: EnvConfig, path: str | Path, faults: Faults) -> None:
    """Refuses float16 for training. The weights of tokens are near 1e-5, and float16 has no number
    between 0 and 6e-8, so that gradients would vanish; there is no loss scaling against that."""
    if config.model.model_dtype == "fp16":
        faults.add(
            f'{path}: model.model_dtype: found "fp16", in which gradients vanish; training takes '
            '"bf16", "fp32", "fp64" or "auto" (only evaluation takes "fp16")'
        )


def examine_model(
    config: EnvConfig, path: str | Path, faults: Faults
) -> tuple[MemoryConfig | None, Any]:
    """Checks that base model and compressor fit each other. Returns `memory` and `shape`; either is
    None if it is faulty, so that later checks skip what depends on it."""
    memory = shape = None
    with faults.collect():
        memory = load_memory_config(config.model.config)
    with faults.collect():
        shape = base_config(config.model.model_name)
    if shape is not None and shape.model_type != config.model.model_structure:
        faults.add(
            f"{path}: model.model_structure: {config.model.model_structure!r}, but "
            f"{config.model.model_name} is a {shape.model_type!r}"
        )
    if config.model.quantization:
        places = config.model.device_map
        if config.model.model_dtype == "fp64":
            faults.add(
                f'{path}: model.quantization: "{config.model.quantization}" computes in at most 32 '
                'bits, model_dtype is "fp64"; use "fp32" or "bf16", or set null'
            )
        if isinstance(places, dict) and "disk" in places.values():
            faults.add(
                f'{path}: model.device_map: puts modules on "disk", where weights of 4 bits '
                "cannot be; use a GPU or the CPU, or set model.quantization to null"
            )
    if shape is not None and (fault := eos_fault(shape)):
        faults.add(f"{path}: model.model_name: {config.model.model_name}: {fault}")
    if memory and shape is not None and (fault := rank_fault(shape, memory.lora_rank)):
        faults.add(f"{config.model.config}: lora_rank: {fault}")
        return None, shape
    if memory and shape is not None and shape.model_type in FAMILIES:
        if fault := window_fault(shape, memory.chunk_size):
            faults.add(f"{path}: model.model_name: {config.model.model_name}: {fault}")
        if fault := find_rope_fault(shape, memory.chunk_size, memory.recent_tokens):
            faults.add(f"{path}: model.model_name: {config.model.model_name}: {fault}")
            return memory, None  # its number of positions is unknown
    if memory and shape is not None and memory.chunk_size > (positions := num_positions(shape)):
        faults.add(
            f"{config.model.config}: chunk_size: {memory.chunk_size} is past the {positions} "
            f"positions of {config.model.model_name}"
        )
        return None, shape
    return memory, shape


def resized(memory: MemoryConfig, size: Size, shape: Any) -> MemoryConfig:
    """The compressor config with another (chunk_size, num_memory), for which the same trained
    weights serve. Raises ConfigError if the base cannot read such chunks after the compressor's
    recent tokens."""
    chunk_size, num_memory = size
    recent = memory.recent_tokens
    if recent > chunk_size:
        raise ConfigError(
            f"chunk_size {chunk_size} is less than the compressor's recent_tokens {recent}; use at "
            "least that"
        )
    if shape is not None:
        fault = window_fault(shape, chunk_size) or find_rope_fault(shape, chunk_size, recent)
        if not fault and chunk_size > (positions := num_positions(shape)):
            fault = f"chunk_size {chunk_size} is past the base's {positions} positions"
        if fault:
            raise ConfigError(fault)
    return memory.model_copy(update=dict(chunk_size=chunk_size, num_memory=num_memory))


def resized_for_task(
    memory: MemoryConfig, entry: CorpusEntry | TaskEntry, shape: Any
) -> MemoryConfig:
    """The compressor config at the size that a task sets, if it sets one. Raises ConfigError if
    chunk_size is no multiple of num_memory, and as `resized`."""
    if not isinstance(entry, TaskEntry) or (entry.chunk_size, entry.num_memory) == (None, None):
        return memory
    chunk_size = entry.chunk_size or memory.chunk_size
    num_memory = entry.num_memory or memory.num_memory
    if chunk_size % num_memory:
        sets_both = entry.chunk_size and entry.num_memory
        hint = "" if sets_both else "; the other of the two is the compressor config's"
        raise ConfigError(
            f"chunk_size {chunk_size} must be a multiple of num_memory {num_memory}{hint}"
        )
    return resized(memory, (chunk_size, num_memory), shape)


# ---- checks of corpora and tasks -----------------------------------------------------------------

Entries = Mapping[str, CorpusEntry | TaskEntry]  # JSON path of an entry in its file -> the entry


def data_entries(config: EnvConfig) -> Entries:
    """The entries of `train.corpus` and `train.tasks`."""
    entries: dict[str, CorpusEntry | TaskEntry] = {
        f"train.corpus[{i}]": entry for i, entry in enumerate(config.train.corpus)
    }
    return entries | {f"train.tasks[{i}]": entry for i, entry in enumerate(config.train.tasks)}


def stage_entries(config: EnvConfig, number: int) -> Entries:
    """The entries of a stage's corpus. There are none if the stage uses `train.corpus`."""
    corpus = config.train.stages[number].corpus or ()
    return {f"train.stages[{number}].corpus[{i}]": entry for i, entry in enumerate(corpus)}


def corpus_field(entry: CorpusEntry | TaskEntry) -> tuple[str, str]:
    """The field of an entry that names its corpus, and the corpus's name."""
    if isinstance(entry, CorpusEntry):
        return "name", entry.name
    return "task_name", entry.task_name


def task_field(entry: CorpusEntry | TaskEntry) -> str:
    """The field of an entry that names its task."""
    return "task" if isinstance(entry, CorpusEntry) else "task_type"


def examine_estimator(config: EnvConfig, path: str | Path, faults: Faults) -> None:
    """Finds a plugin for `train.estimator` that does not exist or refuses its options."""
    name, options = config.train.estimator, config.train.estimator_options
    with faults.collect(f"{path}: train.estimator: "):
        if is_plugin(name):
            make_plugin(EstimatorPlugin, name, options, get_args(BuiltInEstimator))


def examine_stages(
    config: EnvConfig, memory: MemoryConfig | None, shape: Any, path: str | Path, faults: Faults
) -> None:
    """Checks the corpus of every stage at each of the stage's sizes."""
    for number, stage in enumerate(config.train.stages):
        entries = stage_entries(config, number)
        if stage.sizes is None or memory is None:
            examine_entries(entries, memory, shape, path, faults)
            continue
        if stage.corpus is None:
            entries = {
                where: entry
                for where, entry in data_entries(config).items()
                if isinstance(entry, CorpusEntry)
            }
        for i, size in enumerate(dict.fromkeys(stage.sizes)):
            where = f"train.stages[{number}].sizes[{i}]"
            try:
                sized = resized(memory, size, shape)
            except ConfigError as error:
                faults.add(f"{path}: {where}: {error}")
                continue
            found = Faults()
            examine_entries(entries, sized, shape, path, found)
            for line in found.lines:
                faults.add(line if line in faults.lines else f"{line} (under {where})")


def examine_entries(
    entries: Entries, memory: MemoryConfig | None, shape: Any, path: str | Path, faults: Faults
) -> None:
    """Finds corpora and plugins that do not exist, truncations past the capacity or so short
    that no token is predicted from memory, and texts that are too long for a teacher. Without
    `memory` and `shape` only the names are checked."""
    for where, entry in entries.items():
        field, name = corpus_field(entry)
        try:
            corpus, arguments = find_corpus(name, entry.corpus_options)
        except ConfigError as error:
            faults.add(f"{path}: {where}.{field}: {error}")
            continue
        with faults.collect(f"{path}: {where}.{task_field(entry)}: "):
            entry_plugin(entry)
        sized = None  # the compressor config at the entry's size
        with faults.collect(f"{path}: {where}: "):
            sized = memory and resized_for_task(memory, entry, shape)
        if sized and entry.truncation is not None:
            least = shortest_length(entry, corpus.task, sized.chunk_size)
            least = max(least, corpus.chunk_range(*arguments)[0] * sized.chunk_size)
            if entry.truncation < least:
                faults.add(
                    f"{path}: {where}.truncation: of {entry.truncation} tokens nothing would read "
                    f"memory, chunk_size is {sized.chunk_size}; use at least {least}"
                )
        if isinstance(entry, CorpusEntry) and (fault := raw_text_fault(entry, corpus.task, shape)):
            faults.add(f"{path}: {where}.truncation: {fault}")
            continue
        if sized and shape is not None:
            with faults.collect():
                truncations = [(f"{where}.truncation", entry.truncation)]
                check_truncations(truncations, sized, num_positions(shape), path)
        longest = corpus.teacher_tokens(*arguments) if shape is not None else 0
        longest = min(longest, entry.truncation or longest)
        if longest and longest > (positions := num_positions(shape)):
            faults.add(
                f"{path}: {where}: the teacher reads samples of up to {longest} tokens raw, the "
                f"base has {positions} positions; set truncation to {positions} or less"
            )


def check_truncations(
    truncations: list[tuple[str, int | None]],
    memory: MemoryConfig,
    positions: int,
    path: str | Path,
) -> None:
    """Raises ConfigError for every truncation of the file `path`, given with its JSON path, that is
    past the capacity of `memory` on a base with so many positions."""
    capacity = memory.capacity(positions)
    recent = f", recent_tokens {memory.recent_tokens}" if memory.recent_tokens else ""
    faults = [
        f"{path}: {where}: {length} tokens is past the capacity {capacity} (chunk_size "
        f"{memory.chunk_size}, num_memory {memory.num_memory}{recent}, {positions} positions); "
        f"use at most {capacity}"
        for where, length in truncations
        if length is not None and length > capacity
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def raw_text_fault(entry: CorpusEntry, task: str, shape: Any) -> str | None:
    """Why the base cannot read documents as raw text of this length, where a teacher or the
    weights of tokens need that. `task` is the corpus's task."""
    if shape is None or task == "news qa summation":  # it cuts its context to what fits
        return None
    weighted = entry.token_weighting == "context"
    if not (entry.kl_weight or weighted):
        return None
    positions = num_positions(shape)
    if entry.truncation is not None and entry.truncation <= positions:
        return None
    reason = "token_weighting context" if weighted else f"kl_weight {entry.kl_weight or 0:g}"
    found = "none" if entry.truncation is None else f"{entry.truncation} tokens"
    return (
        f"found {found}; with {reason} the base reads documents raw and has {positions} "
        f"positions; set truncation to {positions} or less"
    )


def shortest_length(entry: CorpusEntry | TaskEntry, corpus_task: str, chunk_size: int) -> int:
    """The number of tokens of the shortest document from which a sample can be made."""
    task = entry.task_type if isinstance(entry, TaskEntry) else entry.task or corpus_task
    if is_plugin(task):
        return chunk_size  # the plugin's own documentation describes what it needs
    if task in (*COPY_TASKS, "memory utilization", "news qa summation", "news qa summation v2"):
        return chunk_size  # one chunk is compressed, and then asked about
    # In training a loss must read memory. The first token after the first chunk is not scored, or
    # is predicted from within the first chunk, so the second one is the first that does.
    return chunk_size + (1 if isinstance(entry, TaskEntry) else 2)
