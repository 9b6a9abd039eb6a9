"""What a gradient estimator costs and buys, measured on a real model and real documents.

    python -m uiollms.study gradients --env_conf smollm2-8x.json                     as the config trains
    python -m uiollms.study gradients --env_conf smollm2-8x.json --preset quick      a minute
    python -m uiollms.study gradients --env_conf smollm2-8x.json --preset table4     the paper's Table 4 set-up
    python -m uiollms.study cost      --env_conf smollm2-8x.json --preset figure7    the paper's Figure 7 set-up

The encoder's gradient is linear in the weights W: it is the sum over pairs s < t of W[t, s] * g[t, s], where g[t, s] is what
loss t sends to the encoder through memory s. So all g[t, s] of a document are computed once, and their Gram matrix gives
norm, angle and error of any estimator under any number of draws without another backward.

Shapes: N rows, C chunks, n pairs (t, s) with s < t, P encoder parameters, R draws.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from tqdm import tqdm

from uiollms.checkpoint import read_folder
from uiollms.cli import reporting_errors
from uiollms.config import MemoryConfig, TaskEntry, load_env_config
from uiollms.estimators import Estimator, Exact, make_estimator
from uiollms.memory import Prefix, join_slots
from uiollms.model import MemoryLM
from uiollms.pretrained import load_memory_lm
from uiollms.step import decode_rows, gradient_step
from uiollms.tasks import Sample
from uiollms.training import evaluation_documents

INFINITE = 10**6  # a window wider than any document

# documents, tokens of each, chunk_size, num_memory; None: the config's own
PRESETS: dict[str, dict[str, Any]] = {
    "config": dict(documents=4, tokens=2048, chunk_size=None, num_memory=None, windows=[1, 2, 4, 8, INFINITE]),
    "quick": dict(documents=2, tokens=512, chunk_size=64, num_memory=8, windows=[1, 2, 4, INFINITE]),
    "table4": dict(documents=8, tokens=2048, chunk_size=128, num_memory=16, windows=[1, 2, 4, 8, INFINITE]),
    "figure7": dict(documents=1, tokens=2048, chunk_size=16, num_memory=4, windows=[1, 2, 3, 4, 5, 6]),
}


def estimators_of(windows: Sequence[int]) -> list[tuple[str, int, Estimator]]:
    """(name, S, estimator) of every row of the table; the exact one has no window."""
    rows = [
        (name, S, make_estimator("uio" if name.startswith("uio") else name, S, compensate=name != "uio, no factor"))
        for S in windows
        for name in ("tbptt", "uio", "uio, no factor", "importance")
    ]
    return [*rows, ("exact", INFINITE, Exact())]


def pair_gradients(model: MemoryLM, sample: Sample) -> tuple[list[tuple[int, int]], Tensor, list[float]]:
    """All pairs (t, s), their encoder gradients g[t, s] [n, P], and the norm of every memory's summed gradient [C]
    (what the importance estimator sees)."""
    count = len(sample.chunks)
    with torch.no_grad():
        memory = [[layer.detach() for layer in model.encode_layers(chunk[None])] for chunk in sample.chunks]
    arrived: dict[tuple[int, int], list[Tensor]] = {}
    for t, row in enumerate(sample.rows):
        if t == 0 or not len(row.scored):
            continue
        leaves = [torch.cat([memory[s][i] for s in range(t)]).requires_grad_() for i in range(len(memory[0]))]
        keys, values = model.project(leaves, range(t))
        prefix = Prefix([[join_slots(k, 1)] for k in keys], [[join_slots(v, 1)] for v in values])
        loss, _, _ = decode_rows(model, sample, [t], prefix)
        grads = torch.autograd.grad((loss * row.token_weights[row.scored].to(loss)).sum(), leaves)
        for s in range(t):
            arrived[t, s] = [g[s : s + 1] for g in grads]
    parameters = [p for name, p in model.encoder.named_parameters() if f"layers.{len(memory[0]) - 1}." not in name]
    pairs, rows = [], []
    for s in range(count):
        graph = model.encode_layers(sample.chunks[s : s + 1])
        for t in (t for t in range(s + 1, len(sample.rows)) if (t, s) in arrived):
            grads = torch.autograd.grad(graph, parameters, arrived[t, s], retain_graph=True)
            pairs.append((t, s))
            rows.append(torch.cat([g.flatten() for g in grads]))
    squares = [0.0] * count
    for s in range(count):
        for layer in range(len(memory[0])):
            total = sum(arrived[t, s][layer].double() for t in range(s + 1, len(sample.rows)) if (t, s) in arrived)
            squares[s] += total.pow(2).sum().item() if isinstance(total, Tensor) else 0.0
    return pairs, torch.stack(rows), [square**0.5 for square in squares]


def gram(vectors: Tensor, block: int = 1 << 18) -> Tensor:
    """[n, P] -> inner products [n, n], summed in float64."""
    result = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for start in range(0, vectors.shape[1], block):
        part = vectors[:, start : start + block].double()
        result += part @ part.T
    return result


def draw_weights(
    estimator: Estimator, pairs: Sequence[tuple[int, int]], num_rows: int, norms: Sequence[float], draws: int, seed: int
) -> Tensor:
    """Weights of every pair in every draw, [R, n]."""
    rng = random.Random(seed)
    t, s = (torch.tensor(side) for side in zip(*pairs, strict=True))
    rows = []
    for _ in range(draws):
        weights = estimator.window(num_rows, rng)[t, s]
        columns = estimator.columns(norms, rng)
        rows.append(weights if columns is None else weights * torch.tensor(columns, dtype=torch.float64)[s])
    return torch.stack(rows)


def statistics_of(weights: Tensor, products: Tensor, pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    """weights [R, n], products [n, n] -> how the R estimates relate to the exact gradient g. `bias` is the relative error
    of the draws' mean, `bias_noise` what it would be by chance alone; `variance` is E||est - mean||^2 / ||g||^2."""
    exact = products.sum().item()
    with_exact = weights @ products.sum(1)  # <est, g>
    squares = ((weights @ products) * weights).sum(1).clamp(min=0)
    mean = weights.mean(0)
    bias = ((mean - 1) @ products @ (mean - 1)).clamp(min=0).item() / exact
    variance = (squares.mean() - mean @ products @ mean).clamp(min=0).item() / exact
    ratio = (squares / exact).sqrt()
    errors = ((squares - 2 * with_exact + exact).clamp(min=0) / exact).sqrt()
    backwards = [len({s for (_, s), w in zip(pairs, row, strict=True) if w}) for row in weights[:200].tolist()]
    return {
        "bias": bias**0.5,
        "bias_noise": (variance / len(weights)) ** 0.5,
        "variance": variance,
        "norm_ratio": ratio.mean().item(),
        "norm_ratio_variance": ratio.var().item() if len(ratio) > 1 else 0.0,
        "cosine": (with_exact / (squares * exact).sqrt().clamp(min=1e-300)).mean().item(),
        "relative_error": errors.mean().item(),
        "encoder_backwards": statistics.mean(backwards),
    }


def study_gradients(model: MemoryLM, documents: Sequence[Tensor], windows: Sequence[int], draws: int) -> list[dict[str, Any]]:
    """One row of statistics for every estimator and S, averaged over documents."""
    per_document: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number, ids in enumerate(tqdm(documents, desc="documents")):
        sample = Sample.language_modeling(ids, model.memory_config.chunk_size)
        pairs, vectors, norms = pair_gradients(model, sample)
        products = gram(vectors)
        del vectors
        for name, S, estimator in estimators_of(windows):
            weights = draw_weights(estimator, pairs, len(sample.rows), norms, draws, seed=number)
            per_document.setdefault((name, S), []).append(statistics_of(weights, products, pairs))
    return [
        {"estimator": name, "S": S} | {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        for (name, S), rows in per_document.items()
    ]


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`; then `peak.bytes`: how far memory rose above where it was. On a CPU the
    resident set is sampled every millisecond, after freed pages were given back."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        ctypes.CDLL(None).malloc_trim(0)
        self.process, self.done = psutil.Process(), threading.Event()
        self.start = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
            return
        self.done.set()
        self.thread.join()
        self.bytes = max(self.most, self.process.memory_info().rss) - self.start


def study_cost(model: MemoryLM, ids: Tensor, windows: Sequence[int], repeats: int = 1) -> list[dict[str, Any]]:
    """Seconds (median) and peak memory of one training step for every estimator and S, and the chunks re-encoded."""
    sample = Sample.language_modeling(ids, model.memory_config.chunk_size)
    gradient_step(model, sample, estimator="tbptt", S=1)  # warm up
    rows = []
    for name, S, estimator in tqdm(estimators_of(windows), desc="steps"):
        seconds, backwards, peaks = [], [], []
        for seed in range(repeats):
            model.zero_grad(set_to_none=True)
            with PeakMemory(model.device) as peak:
                start = time.perf_counter()
                result = gradient_step(model, sample, estimator=estimator, rng=seed, report_all=False)
                seconds.append(time.perf_counter() - start)
            peaks.append(peak.bytes)
            backwards.append(len(result.reencoded))
        cost = {"seconds": statistics.median(seconds), "peak_mib": max(peaks) / 2**20}
        rows.append({"estimator": name, "S": S, "encoder_backwards": statistics.mean(backwards)} | cost)
    return rows


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a markdown table; an infinite window is written as inf."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(shown(column, row[column]) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def shown(column: str, value: Any) -> str:
    if column == "S" and value == INFINITE:
        return "inf"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(rows: Sequence[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    """One panel a column: the figure against S, a line for every estimator."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.2 * len(columns), 3.6), layout="constrained")
    windows = sorted({row["S"] for row in rows if row["estimator"] != "exact"})
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        for name in dict.fromkeys(row["estimator"] for row in rows):
            found = {row["S"]: row[column] for row in rows if row["estimator"] == name}
            if name == "exact":
                axes.axhline(next(iter(found.values())), color="0.5", linestyle=":", label=name)
            else:
                axes.plot(range(len(windows)), [found[S] for S in windows], "o-", label=name, alpha=0.8)
        axes.set_xticks(range(len(windows)), ["inf" if S == INFINITE else str(S) for S in windows])
        axes.set_xlabel("S")
        axes.set_title(column)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


@contextmanager
def as_preset(model: MemoryLM, preset: dict[str, Any]) -> Iterator[None]:
    """The model with the preset's chunk size and memory: LoRA does not depend on either, so the weights stay."""
    own = model.memory_config
    changed = {k: preset[k] for k in ("chunk_size", "num_memory") if preset[k]}
    model.memory_config = MemoryConfig(**own.model_dump() | changed)
    try:
        yield
    finally:
        model.memory_config = own


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gradients", "cost"])
    parser.add_argument("--env_conf", required=True, metavar="FILE")
    parser.add_argument("--preset", choices=list(PRESETS), default="config")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--corpus", default="sotu.test", help="where the documents come from")
    parser.add_argument("--documents", type=int, help="how many, instead of the preset's")
    parser.add_argument("--draws", type=int, default=2000, help="draws of every estimator")
    parser.add_argument("--out", type=Path, help="folder of the results; runs/study-<preset> by default")
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    config = load_env_config(args.env_conf, args.set)
    model, tokenizer = load_memory_lm(config, args.env_conf)
    weights = config.model.load_ckp or config.model.released_ckp
    if weights:
        model.load_memory_state_dict(read_folder(model, Path(weights)))
    task = TaskEntry(
        task_type="perplexity",
        task_name=args.corpus,
        num_instance=args.documents or preset["documents"],
        truncation=preset["tokens"],
        compare=(),
    )
    with as_preset(model, preset):
        documents = evaluation_documents(model, tokenizer, task)
        if args.what == "gradients":
            rows = study_gradients(model, documents, preset["windows"], args.draws)
            columns = ["bias", "variance", "norm_ratio", "cosine", "relative_error", "encoder_backwards"]
        else:
            rows = study_cost(model, documents[0], preset["windows"])
            columns = ["seconds", "peak_mib", "encoder_backwards"]
        setting: dict[str, Any] = {"chunk_size": model.memory_config.chunk_size, "num_memory": model.memory_config.num_memory}
    out = args.out or Path("runs") / f"study-{args.what}-{args.preset}"
    out.mkdir(parents=True, exist_ok=True)
    setting |= {"documents": len(documents), "tokens": preset["tokens"], "draws": args.draws, "weights": weights}
    setting |= {"corpus": args.corpus, "dtype": str(model.dtype), "threads": torch.get_num_threads()}
    (out / "results.json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=4) + "\n")
    (out / "table.md").write_text(markdown_table(rows))
    plot(rows, columns, out / "plot.png")
    Console(width=150).print(Markdown(markdown_table(rows)))
    logging.info("written to %s", out)


if __name__ == "__main__":
    raise SystemExit(reporting_errors(main))
