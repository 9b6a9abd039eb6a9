"""RULER (Hsieh et al. 2024, arXiv 2404.06654) through lm-eval's tasks, in several modes.

The six tasks of TASKS write their data themselves and download nothing. A cell is a task at a
length in a mode. All modes of a task and a length read the same prompts, which depend on the seed
only. A prompt that a mode cannot read whole is a fault of the cell, never a wrong answer.
"""

from __future__ import annotations

import contextlib
import io
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nltk
import numpy as np
from datasets import Dataset
from lm_eval.tasks import TaskManager

from uiollms.evaluation.base_prompts import ANSWER_MODES
from uiollms.evaluation.lm_eval_model import HarnessLM
from uiollms.evaluation.statistics import bootstrap, mean
from uiollms.files.errors import ConfigError


@contextlib.contextmanager
def without_downloads() -> Iterator[None]:
    """Prevents nltk's downloads. lm-eval's RULER fetches nltk's punkt_tab as soon as it is
    imported, for the tasks that split essays into sentences; those of TASKS do not."""
    download = nltk.download
    nltk.download = lambda *arguments, **options: False
    try:
        yield
    finally:
        nltk.download = download


with without_downloads():
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils

FOLDER = Path(cwe_utils.__file__).parent
WORD_ORDER = cwe_utils.RNG.getstate()  # of a generator that all prompts of cwe advance
# name -> (haystack, kind of the keys, kind of the values)
NEEDLES = {
    "niah_single_1": ("repeat", "words", "numbers"),
    "niah_multikey_2": ("needle", "words", "numbers"),
    "niah_multikey_3": ("needle", "uuids", "uuids"),
}
TASKS = (*NEEDLES, "ruler_vt", "ruler_cwe", "ruler_fwe")


@dataclass(frozen=True)
class Cell:
    """The result of a task at a length in a mode.

    score:         mean over the samples of the fraction of right answers, which is lm-eval's
                   metric of RULER; None where a prompt does not fit
    interval_95:   of the score, from resampled samples
    samples:       number of prompts
    prompt_tokens: tokens of the longest prompt
    read_tokens:   mean number of raw tokens that the mode reads of a prompt
    slots:         mean number of memory slots that it reads
    seconds:       of one answer
    answers:       for each prompt its score, the references and the generated text
    fault:         why there is no score
    """

    task: str
    length: int
    mode: str
    samples: int
    prompt_tokens: int
    score: float | None = None
    interval_95: tuple[float, float] | None = None
    read_tokens: float | None = None
    slots: float | None = None
    seconds: float | None = None
    answers: tuple[dict[str, Any], ...] = ()
    fault: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_ruler(
    lm: HarnessLM,
    tasks: Sequence[str],
    lengths: Sequence[int],
    modes: Sequence[str],
    limit: int,
    seed: int = 0,
    report: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Returns the cells of all tasks, lengths and modes, in this order.

    limit: number of prompts of a cell
    report: is called with every cell when it is finished

    Raises ConfigError for unknown names, and if no cell fits.
    """
    for kind, names, allowed in (("task", tasks, TASKS), ("mode", modes, ANSWER_MODES)):
        if unknown := [name for name in names if name not in allowed]:
            raise ConfigError(f"{kind} {unknown[0]!r} is unknown; allowed are {', '.join(allowed)}")
    cells = []
    for name in tasks:
        for length in lengths:
            task = load_task(name, length, lm.tokenizer, limit, seed)
            task.build_all_requests()
            for mode in modes:
                cells.append(run_cell(lm, task, length, mode))
                report(cells[-1])
    if all(cell.score is None for cell in cells):
        raise ConfigError(f"no prompt fits: {cells[0].fault}")
    return cells


def run_cell(lm: HarnessLM, task: Any, length: int, mode: str) -> Cell:
    """Answers the requests of a task that lm-eval has built, and scores the answers."""
    requests = task.instances
    prompts = [lm.tok_encode(request.args[0]) for request in requests]
    name, longest = task.config.task, max(map(len, prompts))
    lm.mode, began = mode, time.monotonic()
    try:
        texts = lm.generate_until(requests, disable_tqdm=True)
    except ConfigError as error:  # raised before anything is generated
        return Cell(name, length, mode, len(requests), longest, fault=str(error))
    seconds = (time.monotonic() - began) / len(requests)
    scores = [
        task.process_results(request.doc, [text])[str(length)]
        for request, text in zip(requests, texts, strict=True)
    ]
    chunk_size, num_memory = lm.model.memory_config.size
    slots = [(len(ids) - 1) // chunk_size * num_memory for ids in prompts]
    read = [
        lm.num_read(ids)
        if mode != "memory"
        else len(ids) - (len(ids) - 1) // chunk_size * chunk_size
        for ids in prompts
    ]
    return Cell(
        name,
        length,
        mode,
        len(requests),
        longest,
        score=mean(scores),
        interval_95=bootstrap(scores, mean),
        read_tokens=mean(read),
        slots=mean(slots) if mode == "memory" else 0.0,
        seconds=seconds,
        answers=tuple(
            dict(score=score, references=list(request.doc["outputs"]), text=text)
            for score, request, text in zip(scores, requests, texts, strict=True)
        ),
    )


def load_task(name: str, length: int, tokenizer: Any, count: int, seed: int) -> Any:
    """Returns lm-eval's task with `count` prompts of about `length` tokens of the tokenizer. They
    are the first of the 500 that lm-eval writes in a new process after the same seed."""
    random.seed(seed)
    np.random.seed(seed)
    cwe_utils.RNG.setstate(WORD_ORDER)
    with contextlib.redirect_stdout(io.StringIO()):  # vt prints every attempt
        rows = write_rows(name, length, tokenizer, count)
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    task = {"task": name, "custom_dataset": lambda **metadata: {"test": Dataset.from_list(rows)}}
    # Only within a group does lm-eval add these fields to those of the task's own file.
    return manager.load([{"group": "rows", "task": [task]}])["tasks"][name]


def write_rows(name: str, length: int, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Returns the rows of a task, which lm-eval's functions write."""
    if name == "ruler_vt":
        (example,) = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)
        return vt_utils.sys_vartrack_w_noise_random(tokenizer, count, length, icl_example=example)
    if name == "ruler_cwe":
        return cwe_utils.sys_word_pair_random(count, length, tokenizer)
    if name == "ruler_fwe":
        return fwe_utils.sys_kwext(tokenizer, length, count)
    haystack, keys, values = NEEDLES[name]
    return prepare_niah.generate_samples(
        prepare_niah.get_haystack(haystack),
        TOKENIZER=tokenizer,
        max_seq_length=length,
        type_haystack=haystack,
        type_needle_k=keys,
        type_needle_v=values,
        template=niah_utils.TEMPLATE,
        num_samples=count,
    )
