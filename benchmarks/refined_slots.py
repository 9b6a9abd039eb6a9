"""Asks what limits a memory: what the encoder writes into the slots, or what fits and is read.

    python -m benchmarks.refined_slots --documents 6 --out refined
    python -m benchmarks.refined_slots --documents 6 --corpus 'files:novels/*.txt' --out novels-out

Each document of `uiollms study budget` is compressed except for its last chunk. Then the slots are
trained on passages of the compressed text, with all weights frozen, as `uiollms refine` does
(src/uiollms/training/refine.py). The last chunk, which neither the encoder nor that training has
read, is scored after no memory, another document's memory, as many recent raw tokens as slots, the
encoder's own slots, the refined slots, and the raw text. Refined slots are as many as the
encoder's, and the same decoder reads them. So by as much as they are better, the encoder's slots
could at least be improved. They are no upper limit: a longer or better training of the slots may
find more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from benchmarks.measure import machine
from uiollms.cli.chat import model_options, open_model
from uiollms.cli.common import Output, errors_as_lines, output_arguments
from uiollms.cli.options import fraction, whole_number
from uiollms.config.corpora import TaskEntry
from uiollms.evaluation.statistics import bootstrap, difference, mean
from uiollms.files.atomic import make_folder, replace_text
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import as_json
from uiollms.model.memory import Memory
from uiollms.model.memory_lm import MemoryLM
from uiollms.study.budget import evaluation_of
from uiollms.training.refine import Refinement, Settings

MODES = ("window", "shuffled", "recent", "memory", "refined", "raw")
Bar = Callable[..., Iterable[Any]]
Nlls = dict[str, dict[int, Tensor]]  # mode -> document -> nats of every scored token


def documents_of(
    model: MemoryLM, tokenizer: PreTrainedTokenizerBase, corpus: str, count: int, tokens: int
) -> list[Tensor]:
    """Returns the first documents of a corpus that have so many tokens, [T] int64 each, as `study
    budget` takes them. Raises ConfigError if there are fewer than two, and for recent_tokens."""
    config = model.memory_config
    if config.recent_tokens:
        raise ConfigError(
            f"recent_tokens: found {config.recent_tokens}; raw tokens beside the slots would hide "
            "what the slots tell; take a config with recent_tokens 0"
        )
    task = TaskEntry(
        task_type="perplexity",
        task_name=corpus,
        num_instance=count,
        compare=("shuffled",),
        chunk_size=config.chunk_size,
    )
    evaluation = evaluation_of(model, tokenizer, task, config.num_memory, tokens)
    samples = [instance.samples[0] for instance in evaluation.measurements[0].instances]
    return [torch.cat([*sample.chunks, sample.rows[-1].input_ids]) for sample in samples]


@torch.no_grad()
def nll_after(model: MemoryLM, memory: Memory | None, text: Tensor, last: Tensor) -> Tensor:
    """Returns the nats of each token of the last chunk but its first, [T - 1] float64, after a
    memory, or after `text` as raw tokens."""
    if memory is not None:
        logits = model(last[None], memory.state(model)).logits[0]
    else:
        logits = model.base(torch.cat([text, last])[None]).logits[0, len(text) :]
    return F.cross_entropy(logits[:-1].double(), last[1:].to(logits.device), reduction="none")


def refine(
    model: MemoryLM, memory: Memory, settings: Settings, steps: int, select_every: int
) -> tuple[Memory, dict[str, float]]:
    """Trains the slots of a memory. Returns the selected ones, and what `uiollms refine` prints of
    the passages that measure them."""
    refinement = Refinement(model, memory, settings)
    for step in range(1, steps + 1):
        refinement.step()
        if step % select_every == 0 or step == steps:
            refinement.select()
    found = dict(
        best_step=refinement.best_step,
        passages_before=refinement.nll(list(memory.slots)),
        passages_after=refinement.nll(refinement.best_slots()),
    )
    return refinement.memory(), found


def measure(
    model: MemoryLM,
    documents: Sequence[Tensor],
    settings: Settings,
    steps: int,
    select_every: int = 20,
    bar: Bar = iter,
) -> tuple[Nlls, list[dict[str, float]]]:
    """Returns the NLL of every document's last chunk after each of MODES, and what each training
    found. The other document is the next one. bar: shows the progress"""
    size = model.memory_config.chunk_size
    texts, lasts = [ids[:-size] for ids in documents], [ids[-size:] for ids in documents]
    memories = [model.compress(text) for text in texts]
    nlls: Nlls = {mode: {} for mode in MODES}
    trainings = []
    for i, (text, last) in enumerate(bar([*zip(texts, lasts, strict=True)])):
        refined, found = refine(model, memories[i], settings, steps, select_every)
        trainings.append(found)
        read: dict[str, tuple[Memory | None, Tensor]] = {
            "window": (None, text[:0]),
            "shuffled": (memories[(i + 1) % len(memories)], text),
            "recent": (None, text[len(text) - memories[i].num_slots :]),
            "memory": (memories[i], text),
            "refined": (refined, text),
            "raw": (None, text),
        }
        for mode, (memory, before) in read.items():
            nlls[mode][i] = nll_after(model, memory, before, last).cpu()
    return nlls, trainings


def summarize(nlls: Nlls) -> list[dict[str, Any]]:
    """The NLL of each mode, and its NLL minus that of memory on the same documents, in nats a
    token, with 95 % intervals over documents."""
    rows = []
    for mode, documents in nlls.items():
        means = [nll.mean().item() for nll in documents.values()]
        above = difference(documents, nlls["memory"])
        assert above
        rows.append(
            dict(
                mode=mode,
                documents=len(means),
                nll=mean(means),
                nll_interval_95=bootstrap(means, mean),
                above_memory=above.value,
                above_memory_interval_95=above.interval_95,
            )
        )
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.refined_slots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    number = whole_number()
    model_options(parser)
    add("--corpus", default="stdlib.test", metavar="NAME", help="documents (stdlib.test)")
    add("--documents", type=whole_number(2), default=6, metavar="N", help="how many (6)")
    add("--tokens", type=number, default=2048, metavar="N", help="of a document (2048)")
    add("--steps", type=number, default=100, metavar="N", help="updates of the slots (100)")
    add("--passage_size", type=whole_number(2), default=64, metavar="N", help="tokens (64)")
    add("--passages", type=number, default=8, metavar="N", help="passages of a step (8)")
    add("--lr", type=fraction, default=Settings().lr, metavar="X", help=f"({Settings().lr})")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where results.json is written")
    output_arguments(parser, "the table", "print no text and no progress bar")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    make_folder(args.out)
    model, tokenizer = open_model(args, output)
    documents = documents_of(model, tokenizer, args.corpus, args.documents, args.tokens)
    settings = Settings(args.passage_size, args.passages, args.lr)
    nlls, trainings = measure(model, documents, settings, args.steps, bar=output.bar)
    rows = summarize(nlls)
    names = ("env_conf", "model", "corpus", "tokens", "steps", "passage_size", "passages", "lr")
    setting = {name: getattr(args, name) for name in names}
    result = dict(setting=setting, machine=machine(), rows=rows, trainings=trainings)
    replace_text(args.out / "results.json", as_json(result, indent=1) + "\n")
    for row in rows:
        low, high = row["above_memory_interval_95"]
        output.print_text(
            f"{row['mode']}: {row['nll']:.3f} nats, minus memory {row['above_memory']:+.3f} "
            f"({low:+.3f} .. {high:+.3f})"
        )
    output.print_json(rows=rows, trainings=trainings)


if __name__ == "__main__":
    raise SystemExit(errors_as_lines(main))
