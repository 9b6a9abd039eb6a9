"""Measures speed and memory, and writes bench.json, bench.md and bench.png into `--out`.

Numbers are ratios within one run, or are given together with the number that they are compared
with. Alternatives take turns, and medians are reported. On a CPU memory is the resident set of a
new process, whose allocator holds freed memory as in the other commands. On a GPU it is what
torch's allocator reserves, and seconds are taken between events of the GPU. The GEMM peak is
measured in the same run, at the shapes of the model. FLOPs are counted as in
uiollms/planning/flops.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import comparisons, plots
from benchmarks.measure import machine
from benchmarks.models import MODELS
from uiollms.files.atomic import replace_text
from uiollms.files.json_files import as_json
from uiollms.kernels.allocator import keep_freed_memory
from uiollms.kernels.devices import disable_cudnn_attention
from uiollms.model.memory_lm import MemoryLM

WHAT = ["baseline", "length", "S", "chunk_batch", "generation"]
LENGTHS = [2048, 4096, 8192, 16384, 32768, 63744, 99328, 131072]
PASTS = [1024, 8192, 65536]
WINDOWS = [1, 2, 4, 8]
BATCHES = [1, 2, 4, 8, 16]


def measure(name: str, model: MemoryLM, options: argparse.Namespace) -> dict[str, Any]:
    """The tables of one model that `--what` selects."""
    l, what, quick = model.memory_config.chunk_size, options.what, options.quick
    compared = 8 * l if quick else 8192
    fresh = model.device.type == "cpu" and not quick
    bench = comparisons.Bench(name, model, options.chunk_batch, options.repeats, fresh)
    bench.measure_peak()
    tables: dict[str, comparisons.Table] = {}
    if "baseline" in what:
        tables["against the baseline"] = comparisons.against_baseline(bench, compared)
    if "length" in what:
        lengths = options.lengths or ([4 * l, 8 * l] if quick else LENGTHS)
        for kind, title in (("uio", "training"), ("score", "scoring")):
            tables[f"{title} against length"] = comparisons.against_length(bench, kind, lengths)
    if "S" in what:
        tables["training against S"] = comparisons.against_S(
            bench, compared, WINDOWS[: 2 if quick else None]
        )
    if "chunk_batch" in what:
        sizes = BATCHES[: 2 if quick else None]
        tables["training against chunk_batch"] = comparisons.against_chunk_batch(
            bench, compared, sizes
        )
    if "generation" in what:
        pasts = [4 * l, 8 * l] if quick else [n for n in PASTS if n + l <= model.capacity]
        tables["generation against past"] = comparisons.against_past(
            bench, pasts, 4 if quick else 16
        )
    return {"gemm": bench.gemm, "chunk_batch": model.chunk_batch, "tables": tables}


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown tables."""
    lines = [
        "# Benchmarks",
        "",
        ", ".join(f"{key} {value}" for key, value in report["machine"].items()),
        "",
    ]
    for name, result in report["models"].items():
        peaks = ", ".join(
            f"{peak['peak'] / 1e9:.0f} with {size}" for size, peak in result["gemm"].items()
        )
        lines += [
            f"## {name}: chunk_batch {result['chunk_batch']}; GEMM peak in GFLOP/s, by "
            f"chunk_batch: {peaks}",
            "",
        ]
        for title, rows in result["tables"].items():
            lines += [
                f"### {title}",
                "",
                "| " + " | ".join(rows[0]) + " |",
                "|---" * len(rows[0]) + "|",
            ]
            lines += [
                "| " + " | ".join(shown(value) for value in row.values()) + " |" for row in rows
            ] + [""]
    return "\n".join(lines)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def main(arguments: list[str] | None = None) -> None:
    examples = """examples:
  python -m benchmarks                                             everything, hours: make bench
  python -m benchmarks --model tiny --quick --repeats 1            does it run? make bench-quick
  python -m benchmarks --what length --lengths 8192 32768 --model smollm2
  python -m benchmarks --device cuda --model llama7b --what length S chunk_batch generation"""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=examples, formatter_class=raw
    )
    parser.add_argument(
        "--what", nargs="+", default=WHAT, choices=WHAT, help="which comparisons; default: all"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="tokens of the documents of `length`"
    )
    parser.add_argument("--model", nargs="+", default=["midsize", "smollm2"], choices=list(MODELS))
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu in float32, or cuda in bfloat16, where the allocator's numbers are the memory",
    )
    parser.add_argument(
        "--quick", action="store_true", help="short documents, few settings, memory in this process"
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns of every comparison")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument(
        "--chunk-batch",
        type=int,
        nargs="+",
        default=[4, 2, 1],
        help="chunks computed at once; all but `baseline` use the first",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        disable_cudnn_attention()
    report: dict[str, Any] = {"machine": machine(), "models": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.model:
        model = MODELS[name](device)
        model.chunk_batch = options.chunk_batch[0]
        report["models"][name] = measure(name, model, options)
        # Written after every model, because the next one can take hours.
        replace_text(options.out / "bench.json", as_json(report, indent=1))
        replace_text(options.out / "bench.md", markdown(report))
    plots.draw(report, options.out / "bench.png")
    print(markdown(report))


if __name__ == "__main__":
    keep_freed_memory()
    main()
