"""Compares the gradient estimators on real documents.

Measure bias and variance with the config's sizes, with small ones in a minute, and with those of
the paper's Table 4:
    uiollms study gradients --env_conf smollm2-8x.json
    uiollms study gradients --env_conf smollm2-8x.json --preset quick
    uiollms study gradients --env_conf smollm2-8x.json --preset table4
Measure time and memory with the sizes of the paper's Figure 7; print the results as JSON only:
    uiollms study cost      --env_conf smollm2-8x.json --preset figure7
    uiollms study cost      --env_conf smollm2-8x.json --quiet --json
Compare what is learned on real text, and of long dependences:
    uiollms study learning  --env_conf config/experiments/learning.json --preset quick
    uiollms study recall    --distances 1 4
Compare memory with its alternatives at equal slots, by number of slots and by length:
    uiollms study budget    --env_conf smollm2-8x.json --ratios 4 8 --lengths 2048 16384
Measure what memory saves in bytes and seconds:
    uiollms study savings   --env_conf smollm2-8x.json --lengths 4096 16384

Make a table of the paper, with its numbers beside ours, on two cores; print what the paper's own
scale takes:
    uiollms study paper-table5 --scale small
    uiollms study paper-table5 --scale paper --dry_run

The results (JSON, a markdown table, a plot) are written to --out. `learning` and `recall` add a
line to curves.jsonl after every training. When they are started again, they skip these trainings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from uiollms.build import load_found_weights, load_memory_lm
from uiollms.cli.common import Output
from uiollms.cli.study_budget import measure_budget
from uiollms.cli.study_model import load_study_model
from uiollms.cli.study_options import PRESETS, make_parser
from uiollms.cli.study_savings import measure_savings
from uiollms.cli.study_tables import TABLES, describe_table, make_table
from uiollms.config.corpora import TaskEntry
from uiollms.config.load import load_env_config
from uiollms.config.sections import EnvConfig, MemoryConfig, TrainSection
from uiollms.data.sample import Sample
from uiollms.data.stream import SampleStream
from uiollms.evaluation.instances import evaluation_documents
from uiollms.evaluation.scoring import score
from uiollms.files.atomic import make_folder, replace_text
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import as_json, read_json
from uiollms.model.memory_lm import MemoryLM
from uiollms.runs.checks import check_folder
from uiollms.runs.metrics import read_lines
from uiollms.study.cost import study_cost
from uiollms.study.experiments import table_texts
from uiollms.study.gradients import estimators_of, study_gradients
from uiollms.study.learning import compare, plot_curves, step_seconds, summarise
from uiollms.study.recall import MAX_CHUNKS, MEMORY, VALUES, recall_samples, train_base
from uiollms.study.tables import markdown_table, plot, print_rows, print_texts
from uiollms.training.weighting import weigh_tokens

RESULTS = ("results.json", "table.md", "plot.png")


@contextmanager
def as_preset(model: MemoryLM, preset: dict[str, Any]) -> Iterator[None]:
    """Sets the preset's chunk size and number of slots within a context. The weights stay, because
    LoRA depends on neither. Recent tokens are limited to the chunk size."""
    config = model.memory_config
    changed = {k: preset[k] for k in ("chunk_size", "num_memory") if preset[k]}
    changed["recent_tokens"] = min(config.recent_tokens, preset["chunk_size"] or config.chunk_size)
    model.memory_config = MemoryConfig(**config.model_dump() | changed)
    try:
        yield
    finally:
        model.memory_config = config


def main(arguments: list[str] | None = None) -> None:
    args = make_parser(__doc__).parse_args(arguments)
    args.output = Output.from_arguments(args)
    preset = getattr(args, "preset", None)
    scale = getattr(args, "scale", None)
    name = "-".join(filter(None, ["study", args.what, preset, scale]))
    out = args.out or Path("runs") / name
    check_results(out)
    make_folder(out)
    if args.what in TABLES and args.dry_run:
        setting, rows = describe_table(args, out)
        args.output.print_json(setting=setting, rows=rows)
        return
    commands: dict[str, Callable[[argparse.Namespace, Path], Result]] = {
        "gradients": measure,
        "cost": measure,
        "learning": learning,
        "recall": recall,
        "budget": measure_budget,
        "savings": measure_savings,
        **dict.fromkeys(TABLES, make_table),
    }
    setting, rows = commands[args.what](args, out)
    results = as_json({"setting": setting, "rows": rows}, indent=4) + "\n"
    replace_text(out / "results.json", results)
    if args.what in TABLES:
        texts = table_texts(rows)
        replace_text(out / "table.md", markdown_table(texts))
        print_texts(texts, args.output.console())
    else:
        replace_text(out / "table.md", markdown_table(rows))
        print_rows(rows, args.output.console())
    args.output.print_json(setting=setting, rows=rows)
    args.output.print_text(f"written to {out}")


def check_results(out: Path) -> None:
    """Raises ConfigError if results would overwrite files that were not written by a study."""
    check_folder(out, out)
    ours = False
    if (out / RESULTS[0]).is_file():
        with suppress(ConfigError):  # not a file of a study
            found = read_json(out / RESULTS[0])
            ours = isinstance(found, dict) and found.keys() == {"setting", "rows"}
    for name in () if ours else RESULTS:
        if os.path.lexists(out / name):
            why = "was not written by a study and would be lost"
            raise ConfigError(f"{out / name}: {why}; choose another --out, or move the file")


Result = tuple[dict[str, Any], list[dict[str, Any]]]  # settings, and rows of the table


def measure(args: argparse.Namespace, out: Path) -> Result:
    """The commands `gradients` and `cost`, which measure estimators with trained weights."""
    preset = PRESETS[args.preset]
    config = load_env_config(args.env_conf, args.set)
    model, tokenizer, machine = load_study_model(args, config)
    with as_preset(model, preset):
        count = args.documents or preset["documents"]
        limits = dict(num_instance=count, truncation=preset["tokens"], documents="full")
        task = TaskEntry(task_type="perplexity", task_name=args.corpus, **limits)
        documents = evaluation_documents(model, tokenizer, task)
        if args.what == "gradients":
            rows = study_gradients(model, documents, preset["sizes"], args.draws, args.output.bar)
            columns = [
                "bias",
                "variance",
                "norm_ratio",
                "cosine",
                "relative_error",
                "encoder_backwards",
            ]
        else:
            rows = study_cost(
                model,
                documents[0],
                preset["sizes"],
                args.repeats,
                args.estimators,
                args.output.bar,
            )
            columns = ["seconds", "peak_mib", "encoder_backwards"]
        setting: dict[str, Any] = {
            "chunk_size": model.memory_config.chunk_size,
            "num_memory": model.memory_config.num_memory,
        }
    plot(rows, columns, out / "plot.png")
    setting |= {"documents": len(documents), "tokens": preset["tokens"], "draws": args.draws}
    machine["chunk_batch"] = model.chunk_batch
    return setting | machine | {"corpus": args.corpus}, rows


def learning(args: argparse.Namespace, out: Path) -> Result:
    """The command `learning`. Every estimator trains memory on the config's corpora, starting from
    its load_ckp if it names one. The documents of the config's first evaluation task are held
    out."""
    config = load_env_config(args.env_conf, args.set)
    train = config.train
    if not train.tasks or train.tasks[0].truncation is None:
        raise ConfigError(
            f"{args.env_conf}: train.tasks: expected a perplexity task with a truncation, whose "
            "documents are held out"
        )
    model, tokenizer = load_memory_lm(config, args.env_conf)
    if config.model.load_ckp:
        load_found_weights(model, config, config.model.load_ckp)
    with as_preset(model, PRESETS[args.preset]):
        return learn_text(args, out, config, model, tokenizer)


def learn_text(
    args: argparse.Namespace, out: Path, config: EnvConfig, model: MemoryLM, tokenizer: Any
) -> Result:
    """`learning` with a loaded model. If the config has a load_ckp, every training starts from
    the model's weights."""
    train = config.train
    documents = evaluation_documents(model, tokenizer, train.tasks[0])
    held_out = [Sample.language_modeling(ids, model.memory_config.chunk_size) for ids in documents]

    def start(seed: int) -> tuple[MemoryLM, Iterator[Sample]]:
        torch.manual_seed(seed)
        new_model = MemoryLM(model.base, model.memory_config, model.masters)
        new_model.chunk_batch = model.chunk_batch
        if config.model.load_ckp:
            new_model.load_memory_state_dict(model.memory_state_dict())
        seeded = config.model_copy(update={"train": train.model_copy(update={"seed": seed})})
        samples = SampleStream(seeded, tokenizer, new_model, partial(weigh_tokens, new_model))
        return new_model, one_by_one(samples)

    setting = describe(args, config)
    curves, record = curves_file(out, setting)
    references = setting["references"] = {
        mode: mean_nll(model, documents, mode) for mode in ("window", "raw")
    }
    estimators = estimators_of([train.tbptt])
    compare(estimators, range(args.seeds), start, held_out, train, curves, record, args.output.bar)
    plot_curves(
        {"": curves},
        {"no memory": references["window"], "raw context": references["raw"]},
        out / "plot.png",
    )
    return setting, summarise(curves, step_seconds(estimators, start))


def one_by_one(samples: SampleStream) -> Iterator[Sample]:
    while True:
        yield from (drawn.sample for drawn in samples.take(1))


def mean_nll(model: MemoryLM, documents: Sequence[torch.Tensor], mode: str) -> float:
    return torch.cat([score(model, ids, mode=mode).nll for ids in documents]).double().mean().item()


def describe(args: argparse.Namespace, config: EnvConfig) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "preset": args.preset,
        "dtype": config.model.model_dtype,
        "threads": torch.get_num_threads(),
    }


def recall(args: argparse.Namespace, out: Path) -> Result:
    """The command `recall`. Every estimator trains memory for questions about facts of `distance`
    chunks before."""
    base = train_base(args.base or out / "base", bar=args.output.bar)
    memory = MEMORY.model_copy(update={"transfer_head": not args.no_transfer_head})
    accum_grad = 8
    train = TrainSection.model_validate(
        {
            "tbptt": args.S[0],
            "train_iters": accum_grad * args.iterations,
            "max_lr": 2e-3,
            "warmup": 0.1,
            "weight_decay": 0.01,
            "accum_grad": accum_grad,
            "corpus": ({"name": "recall", "partition": 1},),
            "save": accum_grad * args.iterations,
            "eval": accum_grad * max(1, args.iterations // 10),
        }
    )
    panels: dict[str, Sequence[dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    setting = {
        "train": train.model_dump(mode="json"),
        "memory": memory.model_dump(),
        "threads": torch.get_num_threads(),
    }
    for distance in args.distances:

        def start(seed: int, distance: int = distance) -> tuple[MemoryLM, Iterator[Sample]]:
            torch.manual_seed(seed)
            model = MemoryLM(base, memory)
            model.chunk_batch = accum_grad * MAX_CHUNKS
            return model, recall_samples(distance, seed)

        stream = recall_samples(distance, seed=10**6)  # a seed of no training
        held_out = [next(stream) for _ in range(32)]
        curves, record = curves_file(out / f"distance-{distance}", setting)
        estimators = [found for found in estimators_of(args.S) if found[0] in args.estimators]
        compare(
            estimators, range(args.seeds), start, held_out, train, curves, record, args.output.bar
        )
        panels[f"distance {distance}"] = curves
        rows += [
            {"distance": distance} | row
            for row in summarise(curves, step_seconds(estimators, start))
        ]
    plot_curves(panels, {"guessing": math.log(VALUES)}, out / "plot.png")
    return setting, rows


def curves_file(folder: Path, setting: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """The curves of earlier calls with the same setting, and a function that adds a curve to this
    list and to curves.jsonl. Raises ConfigError if the file has curves of another setting."""
    make_folder(folder)
    path = folder / "curves.jsonl"
    plain = json.loads(json.dumps(setting))
    lines = read_lines(path) if path.exists() else []
    if lines and lines[0] != plain:
        raise ConfigError(
            f"{path}: its curves were trained with other settings; give another --out, or remove "
            "the folder"
        )
    lines = lines or [plain]
    # This removes an incomplete last line.
    replace_text(path, "".join(as_json(line) + "\n" for line in lines))
    curves = lines[1:]

    def record(curve: dict[str, Any]) -> None:
        curves.append(curve)
        with path.open("a", encoding="utf-8") as file:
            file.write(as_json(curve) + "\n")

    return curves, record
