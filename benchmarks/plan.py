"""What `--dry_run` predicts for a training step of a benchmark's model, and the settings of that
step. Measured memory is compared with it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from uiollms import MemoryConfig
from uiollms.config.load import parse
from uiollms.config.sections import EnvConfig
from uiollms.files.json_files import as_json
from uiollms.planning.planner import chunks_in_memory
from uiollms.planning.step_simulation import StepSimulation

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def planned_bytes(
    shape: Any,
    memory: MemoryConfig,
    dtype: torch.dtype,
    on_gpu: bool,
    length: int,
    train: dict[str, Any],
) -> int:
    """Returns the bytes that the plan predicts for a step with AdamW on one device.

    shape:  the base's transformers config
    length: tokens of the document
    train:  fields of the config's section `train`, such as estimator, tbptt and chunk_batch
    """
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shape.save_pretrained(work)
        (work / "memory.json").write_text(as_json(memory.model_dump()))
        config = env_config(train, dtype, work, 0 if on_gpu else "cpu", shape.model_type)
        # The plan needs no such device here.
        simulation = StepSimulation(config, "env.json", {device: 2**50, torch.device("cpu"): 2**50})
        chunks = chunks_in_memory(length, memory.chunk_size)
        (need,) = simulation.need(chunks, config.train.chunk_batch).values()
    return int(need.total)


def env_config(
    train: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    folder: Path = Path(),
    device_map: int | str = "cpu",
    structure: str = "llama",
) -> EnvConfig:
    """Returns the config of a run with these fields of `train`. The fields that a step does not
    read have values of no meaning."""
    model = {
        "model_name": str(folder),
        "model_dtype": DTYPES[dtype],
        "model_method": "uiollms",
        "model_structure": structure,
        "config": str(folder / "memory.json"),
        "device_map": device_map,
    }
    run = dict(train_iters=1, max_lr=1e-4, save=1, eval=1)
    corpus = {"name": "none", "partition": 1.0}
    return parse(EnvConfig, {"model": model, "train": run | {"corpus": [corpus]} | train}, "env")
