"""The three sentences that a report opens with: what was trained, whether memory helps, and
whether it is the document's own memory that helps."""

from __future__ import annotations

from uiollms.evaluation.results import TaskSummary
from uiollms.evaluation.statistics import Estimate
from uiollms.reports.run_folder import RunFolder
from uiollms.reports.tables import (
    between,
    perplexity_words,
    raw_helps,
    recovered_words,
    shares_several,
)
from uiollms.runs.metrics import iterations_of

Result = TaskSummary | None


def conclusions(run: RunFolder) -> list[str]:
    """Three sentences computed from the metrics and the results of a run. The second and third are
    about the first text task, of those that compare memory with the most modes."""
    texts = [
        result
        for result in run.results
        if result.task.kind == "text" and result.modes.get("memory", {}).get("nll") is not None
    ]
    result = max(texts, key=lambda r: len(r.modes), default=None)
    return [training_sentence(run), memory_sentence(result), own_memory_sentence(result)]


def training_sentence(run: RunFolder) -> str:
    """The length of the training, and its loss at both ends."""
    steps = [line for line in run.metrics if line.get("nll") is not None]
    if not steps:
        return f"This folder has no training; its results are of the weights {run.weights_name}."
    counted = iterations_of(run.versions)
    length = f"Training took {steps[-1]['iteration']:,} {counted}"
    if len(steps) < 2:
        return f"{length}, and its loss was {steps[0]['nll']:.2f} nats per scored token."
    count = max(1, len(steps) // 10)
    first, last = (
        sum(line["nll"] for line in part) / count for part in (steps[:count], steps[-count:])
    )
    change = "fell" if last < first else "did not fall: it went"
    stages = ", over stages of different tasks" if any(line.get("stage") for line in steps) else ""
    return (
        f"{length}, and the mean loss {change} from {first:.2f} in the first tenth to {last:.2f} "
        f"nats per scored token in the last tenth{stages}."
    )


def memory_sentence(result: Result) -> str:
    """Whether memory helps where no text before the chunk can be read."""
    if result is None:
        return "No evaluation of running text is here, so nothing can be told of memory's use."
    subject = f"On {documents_of(result)}, the perplexity with memory is "
    subject += perplexity_words(result.modes["memory"])
    below = result.comparison.below_window
    if below is None or "window" not in result.modes:
        return f"{subject}; it was not compared with the same model without memory."
    other = f"{subject} and without it {perplexity_words(result.modes['window'])}"
    verdicts = ("memory helps", "memory does not help, it makes the prediction worse")
    return f"{other}: {verdict(result, below, 'window', *verdicts)}."


def own_memory_sentence(result: Result) -> str:
    """Whether the memory contains the document, and the part of raw context's gain it recovers."""
    bound = result.comparison.bound if result else None
    if result is None or bound is None:
        return (
            "Memory was not compared with that of another document, so its gain or loss may come "
            "from a prefix that is alike for all documents."
        )
    verdicts = (
        "the memory contains something of its document",
        "the document's memory serves no better than another's",
    )
    shown = between(bound.interval_95) if shares_several(result, "shuffled") else ""
    sentence = f"Another document's memory costs {bound.value:.3f}{shown} nats per token more: "
    sentence += verdict(result, bound, "shuffled", *verdicts)
    recovered = recovered_words(result)
    if not recovered:
        return f"{sentence}."
    if not raw_helps(result):
        return f"{sentence}; the raw context does not help on these documents."
    return f"{sentence}; of the gain that the raw context has, memory recovers {recovered}."


def verdict(result: TaskSummary, found: Estimate, mode: str, better: str, worse: str) -> str:
    """`better` or `worse`, if the 95 % interval of the difference lies on one side of zero. One
    document has no interval, so nothing follows from its sign."""
    low, high = found.interval_95
    if not shares_several(result, mode):
        return "one document does not show whether " + better
    if low > 0:
        return better
    return worse if high < 0 else "the difference is within chance"


def documents_of(result: TaskSummary) -> str:
    count = result.modes["memory"]["documents"]
    return f"{count} document{'s' * (count > 1)} of {result.task.name}"
