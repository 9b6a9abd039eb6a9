"""Writes a run folder as one HTML page that needs no other file, with its plots as PNG files."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from uiollms.config.corpora import Stage
from uiollms.files.atomic import make_folder, replace_text, reporting_write_errors
from uiollms.reports.conclusions import conclusions
from uiollms.reports.curves import plot_steps, plot_training
from uiollms.reports.plots import drawable, plot_attention, plot_lengths, plot_results
from uiollms.reports.run_folder import FAULTS, Missing, RunFolder, config_text
from uiollms.reports.tables import HEADINGS, filled_columns, rows_of, sizes_of, written_chunks
from uiollms.runs.metrics import ITERATIONS, iterations_of


@dataclass
class Picture:
    """A PNG file with its heading and a caption."""

    path: Path
    title: str
    caption: str

    @property
    def base64(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()


def write_report(run: RunFolder) -> tuple[Path, list[Path]]:
    """Writes `plots/*.png` and `report.html` into the run folder. Returns the path of the page and
    those of the plots."""
    template = files("uiollms.reports").joinpath("page.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    target = run.path / "report.html"
    with reporting_write_errors(target):
        make_folder(run.path / "plots")
        drawn = list(draw_pictures(run, run.path / "plots"))
        tables = list(result_tables(run))
        text = page.render(
            title=f"Run {run.path.resolve().name}",
            conclusions=summary_sentences(run),
            facts=list(facts(run)),
            config=run.config and config_text(run.config),
            evaluated=f"From {run.evaluated}",
            tables=tables,
            written=written_chunks(run.results),
            pictures=drawn,
            missing=run.missing,
        )
        # JSON files may contain lone surrogates, which UTF-8 cannot encode.
        replace_text(target, text.encode("utf-8", "backslashreplace").decode())
    return target, [picture.path for picture in drawn]


def summary_sentences(run: RunFolder) -> list[str]:
    """`conclusions`, or none if the numbers of the run cannot be read."""
    try:
        return conclusions(run)
    except FAULTS as error:
        run.missing.append(Missing("the summary", error_reason(error)))
        return []


@dataclass
class ResultTable:
    """The numbers of a task: headings, and one row of as many cells for every mode."""

    title: str
    sizes: str
    headings: list[str]
    rows: list[list[str]]


def result_tables(run: RunFolder) -> Iterator[ResultTable]:
    """The table of every result. Results that cannot be shown are added to `missing`."""
    for result in run.results:
        try:
            rows = rows_of(result)
        except FAULTS as error:
            run.missing.append(Missing(f"the numbers of {result.task.title}", error_reason(error)))
            continue
        filled = filled_columns(rows)
        headings = HEADINGS._replace(result=result.task.main_number[2])
        yield ResultTable(
            result.task.title,
            sizes_of(result.task),
            [headings[i] for i in filled],
            [[row[i] for i in filled] for row in rows],
        )


def draw_pictures(run: RunFolder, folder: Path) -> Iterator[Picture]:
    """Draws the plots into `folder`. Plots that cannot be drawn are added to `missing`."""
    for name, title, caption, plot in pictures(run):
        path = folder / f"{name}.png"
        try:
            plot(path)
        except OSError:
            raise
        except FAULTS as error:
            run.missing.append(Missing(title, error_reason(error)))
        else:
            yield Picture(path, title, caption)


def error_reason(error: Exception) -> str:
    message = " ".join(str(error).split())[:200]
    return f"it cannot be shown ({type(error).__name__}: {message})"


def pictures(run: RunFolder) -> Iterator[tuple[str, str, str, Callable[[Path], Path | None]]]:
    """(file name, title, caption, function that draws into a file) of every plot."""
    if any(line.get("nll") is not None for line in run.metrics):
        caption = (
            "The loss of every training batch with its running mean, and held-out NLL. If the "
            "evaluation scores other tokens than the training loss, it has its own panel. The "
            "bound is shown if memories were shuffled: it is the NLL with another document's "
            "memories minus the NLL with the document's memories, with its 95 % interval. At 0 "
            "the memory is a prefix that helps every document alike."
        )
        loss = run.config.train.loss if run.config else "paper"
        curve = partial(plot_training, run.metrics, loss=loss, counted=iterations_of(run.versions))
        yield "training", "Training curve", caption, curve
        caption = (
            "Gradient norms are those before clipping, of all trained tensors and of each part. "
            "Tokens are those that the decoders of all processes read, without evaluations and "
            "checkpoints. Memory is the peak of the first process so far."
        )
        steps = partial(plot_steps, run.metrics, iterations_of(run.versions))
        yield "steps", "Steps", caption, steps
    text = [result for result in run.results if result.task.kind == "text"]
    if text:
        caption = (
            "Perplexity of the tokens between two powers of two. Tokens left of the dotted line "
            "read no memory."
        )
        yield "position", "Perplexity by position", caption, partial(plot_results, text)
    scored = [scores for scores in run.nlls if scores.task.kind == "text"]
    if scored:
        caption = (
            "Perplexity of documents that are cut to their first tokens, over the documents that "
            "have as many. The last point is the length of the longest document."
        )
        yield (
            "length",
            "Perplexity by length, with and without memory",
            caption,
            partial(plot_lengths, scored),
        )
    others = drawable([result for result in run.results if result.task.kind != "text"])
    if others:
        caption = "Accuracy by the depth at which the sentence is hidden; other tasks as bars."
        yield "tasks", "Other tasks", caption, partial(plot_results, others)
    if run.attention:
        about = run.attention.about
        caption = (
            "Percent of a layer's attention, averaged over heads and tokens, in one document of "
            f"{about['tokens']} tokens from {about['task']} in chunks of "
            f"{about['chunk_size']} with {about['num_memory']} slots each, weights: "
            f"{about['weights']}. Left: the memories of each age, averaged over the chunks that "
            "read one of that age (logarithmic colours, down to a thousandth of the largest "
            "value). Right: all memories together; the rest goes to the chunk's tokens."
        )
        yield "attention", "Attention to memory", caption, partial(plot_attention, run.attention)


def facts(run: RunFolder) -> Iterator[tuple[str, str]]:
    """The rows (name, value) of the table that describes the run."""
    versions = run.versions
    if run.config:
        model, train = run.config.model, run.config.train
        dtype = versions.get("dtype") or model.model_dtype
        yield "model", f"{model.model_name} ({model.model_structure}), {dtype}"
    yield "weights", run.weights_name
    if run.compressor:
        c = run.compressor
        recent = (
            f", the last {c.recent_tokens} tokens before a chunk read again"
            if c.recent_tokens
            else ""
        )
        sizes = f"chunks of {c.chunk_size} tokens into {c.num_memory} slots a layer"
        yield "compressor", f"{sizes}, LoRA rank {c.lora_rank}{recent}"
    steps = [line for line in run.metrics if "lr" in line]
    if run.config and steps:
        chosen = f"{train.estimator}, S = {train.tbptt}" if train.estimator != "exact" else "exact"
        yield "gradient", f"{chosen}; loss: {train.loss} protocol"
        yield (
            "optimizer",
            f"AdamW, peak learning rate {train.max_lr:g}, "
            f"{train.accum_grad} document{'s' * (train.accum_grad > 1)} a step, seed {train.seed}",
        )
        shares = [
            f"{c.name} ({c.partition:.0%}, {c.truncation or 'all'} tokens)" for c in train.corpus
        ]
        yield "corpora", ", ".join(shares)
        if train.stages:
            yield "stages", ", ".join(stage_words(stage) for stage in train.stages)
    if steps:
        goal = f" of {run.config.train.train_iters}" if run.config else ""
        took = f"in {duration(run.metrics[-1]['seconds'])}, evaluations included"
        yield iterations_of(run.versions), f"{steps[-1]['iteration']}{goal} {took}"
        skipped = sum("skipped" in line for line in steps)
        if skipped:
            yield "skipped", f"{skipped} steps, whose loss or gradient was not finite"
    tokens = sum(line.get("tokens", 0) for line in steps)
    if tokens:
        yield "tokens read", f"{tokens:,}"
    if versions:
        names = ("platform", "device", "processes")
        yield (
            "machine",
            ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name)),
        )
        yield "git revision", versions.get("git") or "none: not a clone"
        named = {
            name: value
            for name, value in versions.items()
            if name not in (*names, ITERATIONS, "git", "dtype") and value
        }
        yield "versions", ", ".join(f"{name} {value}" for name, value in named.items())


def stage_words(stage: Stage) -> str:
    """A stage of training, such as "40% of stdlib.train (auto encoding) at 64/16, 128/32"."""
    corpora = [f"{c.name} ({c.task})" if c.task else c.name for c in stage.corpus or ()]
    sizes = [f"{chunk_size}/{num_memory}" for chunk_size, num_memory in stage.sizes or ()]
    words = f"{stage.share:.0%}" + (f" of {' and '.join(corpora)}" if corpora else "")
    return words + (f" at {', '.join(sizes)}" if sizes else "")


def duration(seconds: float) -> str:
    """4105 -> "1 h 8 min", 75 -> "1 min 15 s"."""
    minutes, rest = divmod(math.floor(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{seconds:.1f} s"
    )
