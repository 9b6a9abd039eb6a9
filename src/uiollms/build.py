"""The model that an environment config describes, and what can be checked of it before its
weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from uiollms.config.corpora import COPY_TASKS, CorpusEntry, Size, TaskEntry
from uiollms.config.load import load_memory_config
from uiollms.config.sections import EnvConfig, MemoryConfig
from uiollms.data import find_corpus
from uiollms.distributed.device_map import place
from uiollms.files.atomic import whole_folder
from uiollms.files.errors import ConfigError, Faults
from uiollms.kernels.flash_attention import check_request
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.positions import find_rope_fault, num_positions
from uiollms.weights.adapters import load_weights
from uiollms.weights.base_files import FAMILIES
from uiollms.weights.base_models import (
    base_config,
    load_causal_lm,
    load_tokenizer_for,
    resolve_dtype,
)
from uiollms.weights.fitness import eos_fault, narrow_window, wide_rank


def load_memory_lm(config: EnvConfig, path: str | Path) -> tuple[MemoryLM, PreTrainedTokenizerBase]:
    """The model an environment config (read from `path`) describes, its trained tensors fresh
    from `train.seed`, and its tokenizer. Everything that can be checked without the weights is
    checked before they are loaded."""
    memory = check_model(config, path)
    name = config.model.model_name
    first_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer_for(base_config(name), name)
    dtype, kernel = (
        resolve_dtype(config.model.model_dtype, first_device),
        config.model.attn_implementation,
    )
    kernel = "sdpa" if kernel == "auto" else kernel
    check_request(
        kernel,
        f"{path}: model.attn_implementation",
        dtype,
        config.model.device_map,
        base_config(name),
    )
    base = load_causal_lm(name, dtype=dtype, attn_implementation=kernel)
    place(base, config.model.device_map, path, config.model.offload_dir)
    torch.manual_seed(config.train.seed)
    model = MemoryLM(base, memory, config.train.master_dtype)
    if (
        config.train.chunk_batch != "auto"
    ):  # train.py and test.py have chosen (planning/planner.py); other tools take the default
        model.chunk_batch = config.train.chunk_batch
    model.checkpointing = config.train.checkpointing
    return model, tokenizer


def check_env(config: EnvConfig, path: str | Path) -> MemoryConfig:
    """All checks of an environment config that need neither weights nor data; the compressor
    config it names. Raises ConfigError with a line for every fault."""
    faults = Faults()
    memory, shape = examine_model(config, path, faults)
    examine_sources(sources_of(config), memory, shape, path, faults)
    examine_stages(config, memory, shape, path, faults)
    faults.report()
    assert memory is not None
    return memory


def check_model(config: EnvConfig, path: str | Path) -> MemoryConfig:
    """As `check_env`, of the base and the compressor alone."""
    faults = Faults()
    memory, _ = examine_model(config, path, faults)
    faults.report()
    assert memory is not None
    return memory


def examine_model(
    config: EnvConfig, path: str | Path, faults: Faults
) -> tuple[MemoryConfig | None, Any]:
    """The compressor config and the base's transformers config, each None where it cannot be
    had."""
    memory = shape = None
    with faults.collect():
        memory = load_memory_config(config.model.config)
    with faults.collect():
        shape = base_config(config.model.model_name)
    if shape is not None and shape.model_type != config.model.model_structure:
        faults.add(
            f"{path}: model.model_structure: {config.model.model_structure!r}, but "
            f"{config.model.model_name} is a "
            f"{shape.model_type!r}"
        )
    if shape is not None and (fault := eos_fault(shape)):
        faults.add(f"{path}: model.model_name: {config.model.model_name}: {fault}")
    if memory and shape is not None and (fault := wide_rank(shape, memory.lora_rank)):
        faults.add(f"{config.model.config}: lora_rank: {fault}")
        return None, shape
    if memory and shape is not None and shape.model_type in FAMILIES:
        if fault := narrow_window(shape, memory.chunk_size):
            faults.add(f"{path}: model.model_name: {config.model.model_name}: {fault}")
        if fault := find_rope_fault(shape, memory.chunk_size, memory.recent_tokens):
            faults.add(f"{path}: model.model_name: {config.model.model_name}: {fault}")
            return memory, None  # nothing can be said of its positions
    if memory and shape is not None and memory.chunk_size > (positions := num_positions(shape)):
        faults.add(
            f"{config.model.config}: chunk_size: {memory.chunk_size} is past the {positions} "
            f"positions of {config.model.model_name}"
        )
        return None, shape
    return memory, shape


Sources = Mapping[str, CorpusEntry | TaskEntry]  # JSON path in a file -> entry


def sources_of(config: EnvConfig) -> Sources:
    """What an environment config trains on and evaluates."""
    sources: dict[str, CorpusEntry | TaskEntry] = {
        f"train.corpus[{i}]": c for i, c in enumerate(config.train.corpus)
    }
    return sources | {f"train.tasks[{i}]": t for i, t in enumerate(config.train.tasks)}


def stage_sources(config: EnvConfig, number: int) -> Sources:
    """What a stage of a training names itself."""
    own = config.train.stages[number].corpus or ()
    return {f"train.stages[{number}].corpus[{i}]": entry for i, entry in enumerate(own)}


def examine_stages(
    config: EnvConfig, memory: MemoryConfig | None, shape: Any, path: str | Path, faults: Faults
) -> None:
    """What the stages train on, at each of their sizes."""
    for number, stage in enumerate(config.train.stages):
        own = stage_sources(config, number)
        if stage.sizes is None or memory is None:
            examine_sources(own, memory, shape, path, faults)
            continue
        inherited = sources_of(config) if stage.corpus is None else {}
        trained = own or {
            where: entry for where, entry in inherited.items() if isinstance(entry, CorpusEntry)
        }
        for i, size in enumerate(dict.fromkeys(stage.sizes)):
            where = f"train.stages[{number}].sizes[{i}]"
            try:
                sized = resized(memory, size, shape)
            except ConfigError as error:
                faults.add(f"{path}: {where}: {error}")
                continue
            found = Faults()
            examine_sources(trained, sized, shape, path, found)
            for line in found.lines:
                faults.add(line if line in faults.lines else f"{line} (under {where})")


def resized(memory: MemoryConfig, size: Size, shape: Any) -> MemoryConfig:
    """The compressor with chunks of another size: LoRA and tokens do not depend on it. shape: the
    base's transformers config, None where it could not be had. Raises ConfigError where the base
    cannot read such chunks, with the recent tokens in front of them."""
    chunk_size, num_memory = size
    recent = memory.recent_tokens
    if recent > chunk_size:
        raise ConfigError(
            f"chunk_size {chunk_size} is less than the compressor's recent_tokens {recent}; use at "
            "least that"
        )
    if shape is not None:
        fault = narrow_window(shape, chunk_size) or find_rope_fault(shape, chunk_size, recent)
        if not fault and chunk_size > (positions := num_positions(shape)):
            fault = f"chunk_size {chunk_size} is past the base's {positions} positions"
        if fault:
            raise ConfigError(fault)
    return memory.model_copy(update=dict(chunk_size=chunk_size, num_memory=num_memory))


def check_truncations(
    wanted: list[tuple[str, int | None]], memory: MemoryConfig, positions: int, path: str | Path
) -> None:
    """wanted: (JSON path, truncation) pairs of the file `path`."""
    capacity = memory.capacity(positions)
    recent = f", recent_tokens {memory.recent_tokens}" if memory.recent_tokens else ""
    faults = [
        f"{path}: {where}: {length} tokens is past the capacity {capacity} (chunk_size "
        f"{memory.chunk_size}, num_memory "
        f"{memory.num_memory}{recent}, {positions} positions); use at most {capacity}"
        for where, length in wanted
        if length is not None and length > capacity
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def corpus_of(entry: CorpusEntry | TaskEntry) -> tuple[str, str]:
    """(field that names the corpus, its name)"""
    return (
        ("name", entry.name) if isinstance(entry, CorpusEntry) else ("task_name", entry.task_name)
    )


def examine_sources(
    sources: Sources, memory: MemoryConfig | None, shape: Any, path: str | Path, faults: Faults
) -> None:
    """Corpora that do not exist; truncations past the capacity, or so short that nothing reads
    memory; texts too long for a teacher. Without `memory` or `shape` names alone."""
    for where, entry in sources.items():
        field, name = corpus_of(entry)
        try:
            corpus, arguments = find_corpus(name)
        except ConfigError as error:
            faults.add(f"{path}: {where}.{field}: {error}")
            continue
        own = None  # the entry's compressor
        with faults.collect(f"{path}: {where}: "):
            own = memory and at_size(memory, entry, shape)
        if own and entry.truncation is not None:
            least = shortest(entry, corpus.task, own.chunk_size)
            least = max(least, corpus.chunk_range(*arguments)[0] * own.chunk_size)
            if entry.truncation < least:
                faults.add(
                    f"{path}: {where}.truncation: of {entry.truncation} tokens nothing would read "
                    "memory, "
                    f"chunk_size is {own.chunk_size}; use at least {least}"
                )
        if isinstance(entry, CorpusEntry) and (fault := raw_fault(entry, corpus.task, shape)):
            faults.add(f"{path}: {where}.truncation: {fault}")
            continue
        if own and shape is not None:
            with faults.collect():
                wanted = [(f"{where}.truncation", entry.truncation)]
                check_truncations(wanted, own, num_positions(shape), path)
        taught = corpus.teacher_tokens(*arguments) if shape is not None else 0
        if taught and min(taught, entry.truncation or taught) > (positions := num_positions(shape)):
            faults.add(
                f"{path}: {where}: the teacher reads samples of up to {taught} tokens raw, the "
                "base has "
                f"{positions} positions; set truncation to {positions} or less"
            )


def at_size(memory: MemoryConfig, entry: CorpusEntry | TaskEntry, shape: Any) -> MemoryConfig:
    """The compressor at the size that a task asks for. Raises ConfigError as `resized`, and
    where the size is none."""
    if not isinstance(entry, TaskEntry) or (entry.chunk_size, entry.num_memory) == (None, None):
        return memory
    chunk_size = entry.chunk_size or memory.chunk_size
    num_memory = entry.num_memory or memory.num_memory
    if chunk_size % num_memory:
        both = entry.chunk_size and entry.num_memory
        where = "" if both else "; the other of the two is the compressor config's"
        raise ConfigError(
            f"chunk_size {chunk_size} must be a multiple of num_memory {num_memory}{where}"
        )
    return resized(memory, (chunk_size, num_memory), shape)


def raw_fault(entry: CorpusEntry, kind: str, shape: Any) -> str | None:
    """Why the base cannot read raw what a teacher, or the weights of tokens, ask of it. kind: what
    the corpus is for."""
    if shape is None or kind == "news qa summation":  # which cuts its context to what fits
        return None
    weighs = entry.token_weighting == "context"
    wanted = "token_weighting context" if weighs else f"kl_weight {entry.kl_weight or 0:g}"
    positions = num_positions(shape)
    if not (entry.kl_weight or weighs) or (entry.truncation or positions + 1) <= positions:
        return None
    found = "none" if entry.truncation is None else f"{entry.truncation} tokens"
    return (
        f"found {found}; with {wanted} the base reads documents raw and has {positions} "
        f"positions; set truncation to {positions} or less"
    )


def shortest(entry: CorpusEntry | TaskEntry, task: str, chunk_size: int) -> int:
    """Tokens of the shortest document that makes a sample. task: what the corpus is for."""
    kind = entry.task_type if isinstance(entry, TaskEntry) else entry.task or task
    whole = ("memory utilization", "news qa summation", "news qa summation v2")
    if kind in (*COPY_TASKS, *whole):
        return chunk_size  # one chunk is compressed, then asked for
    # Training needs a loss that reads memory: the second token behind the first chunk is the first
    # to have one, the one before it is not scored, or is predicted from the first chunk.
    return chunk_size + (1 if isinstance(entry, TaskEntry) else 2)


def count_parameters(model: MemoryLM) -> tuple[int, int]:
    """Trained and frozen parameters."""
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    return trained, sum(p.numel() for p in model.base.parameters())


def weights_of(config: EnvConfig) -> str | None:
    """The weights that a config is evaluated and used with: what it has trained (save_ckp, if it
    is there), else what it starts from (load_ckp), else released_ckp."""
    saved = config.model.save_ckp
    if saved and whole_folder(Path(saved)).exists():
        return saved
    return config.model.load_ckp or config.model.released_ckp


def weights_words(weights: str | Path | None, model: MemoryLM) -> str:
    """The first line of the commands that use a model: which weights."""
    return f"weights: {weights or 'untrained'}, base in {model.dtype}"


def load_trained(
    config: EnvConfig, path: str | Path, weights: str | None = None
) -> tuple[MemoryLM, PreTrainedTokenizerBase, str]:
    """What an environment config describes with the weights that test.py would take, or with
    `weights`, its tokenizer, and where the weights are from. Raises ConfigError if there are
    none."""
    weights = weights or weights_of(config)
    if weights is None:
        raise ConfigError(
            f"{path}: there are no trained weights yet: neither {config.model.save_ckp}, load_ckp "
            "nor released_ckp; run train.py"
        )
    model, tokenizer = load_memory_lm(config, path)
    load_weights(model, weights)
    return model, tokenizer, weights
