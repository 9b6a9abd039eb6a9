"""Tables of what a choice changes: trainings from one start that differ in one thing, three seeds
each, and their paired differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uiollms.study.experiments import Cell, Experiment, Step, StudyTable, of_seeds

SEEDS = (0, 1, 2)
DEMO = "demo.json"
FOLDER = ["--env_conf", "{folder}/env.json"]

# variant -> (fields of `train`, its name in `study cost`)
ESTIMATORS: dict[str, tuple[dict[str, Any], str]] = {
    "exact": ({"estimator": "exact"}, "exact"),
    "tbptt": ({"estimator": "tbptt"}, "tbptt"),
    "uio": ({"estimator": "uio"}, "uio"),
    "uio-no-factor": ({"estimator": "uio", "compensate": False}, "uio, no factor"),
    "importance": ({"estimator": "importance"}, "importance"),
}
# The questions follow four chunks after the facts, and a truncated gradient reaches one chunk.
FACTS = "recall.facts.{split}.4"
FACT_TOKENS = 576  # nine chunks of 64


def train_variant(name: str, experiment: Experiment, what: str) -> list[Step]:
    """The trainings of a variant with all seeds."""
    return [
        Step(
            f"{name}-{seed}",
            ["train", *FOLDER, "--resume"],
            Experiment(
                experiment.base,
                experiment.memory,
                experiment.model,
                {**experiment.train, "seed": seed},
                experiment.train["tasks"],
            ),
            f"training: {what}, seed {seed}",
        )
        for seed in SEEDS
    ]


def estimators_table() -> StudyTable:
    """The estimators, from weights that bind, on questions that a truncated gradient does not
    reach."""
    task = {
        "task_type": "question answering",
        "task_name": FACTS.format(split="test"),
        "num_instance": 32,
        "truncation": FACT_TOKENS,
        "compare": ["shuffled"],
    }
    corpus = {
        "name": FACTS.format(split="train"),
        "partition": 1,
        "truncation": FACT_TOKENS,
    }
    shared = {
        "tbptt": 1,
        "train_iters": 160,
        "stages": [],
        "corpus": [corpus],
        "save": 40,
        "eval": 40,
        "tasks": [task],
    }
    weights = {"load_ckp": "{table}/start/checkpoint"}
    start = Experiment(DEMO, train={"tasks": [], "eval": 480}, tasks=[task])
    steps = [Step("start", ["train", *FOLDER, "--resume"], start, "training: the start")]
    for name, (fields, _) in ESTIMATORS.items():
        experiment = Experiment(DEMO, model=weights, train={**shared, **fields})
        steps += train_variant(name, experiment, name)
    cost = ["study", "cost", *FOLDER, "--preset", "demo", "--corpus", "stdlib.test"]
    cost += ["--repeats", "7", "--out", "{folder}"]
    steps.append(
        Step("cost", cost, Experiment(DEMO, model=weights, tasks=[task]), "7 turns of a step each")
    )
    nll = "NLL of answers (nats)"
    cells = [Cell(name, nll, f"{name}-0", of_seeds(name, SEEDS, "nll")) for name in ESTIMATORS]
    for name in ESTIMATORS:
        if name == "exact":
            continue
        for number, share in (
            ("NLL minus that of exact, equal tokens (nats)", None),
            ("NLL minus that of exact, equal time (nats)", step_share),
        ):
            read = of_seeds(name, SEEDS, "nll", minus="exact", share=share)
            cells.append(Cell(name, number, f"{name}-0", read))
    for name in ESTIMATORS:
        read = of_seeds(name, SEEDS, "bound", mode=None)
        cells.append(Cell(name, "bound (nats)", f"{name}-0", read))
    return StudyTable(
        "Estimators on facts that lie beyond S chunks",
        None,
        {
            "small": "SmolLM2-135M. The start is one training of demo.json. Each training reads "
            "160 documents of 576 tokens in chunks of 64, with S = 1; the questions follow four "
            "chunks after their facts. Equal time is that of the fastest estimator's 160 "
            "documents; intervals are Student's over three seeds."
        },
        {"small": steps},
        {"small": cells},
    )


def step_share(table: Path, variant: str) -> float:
    """The seconds of the fastest estimator's step over those of a variant's, by the results of
    `study cost` in the table's folder."""
    rows = json.loads((table / "cost" / "results.json").read_text(encoding="utf-8"))["rows"]
    seconds = {row["estimator"]: row["seconds"] for row in rows}
    return min(seconds.values()) / seconds[ESTIMATORS[variant][1]]


COPIES = {"name": "stdlib.train", "partition": 1, "task": "auto encoding"}


def text_stage(share: float, **changes: Any) -> dict[str, Any]:
    """The demo's second stage: text, and a quarter of copies. changes: of the text's entry"""
    text = {"name": "stdlib.train", "partition": 0.75, "truncation": 384, "crop": "random"}
    return {
        "share": share,
        "max_lr": 0.001,
        "corpus": [text | changes, COPIES | {"partition": 0.25}],
    }


def design_table() -> StudyTable:
    """The demo, and the demo with one thing changed."""
    copies = {"share": 0.75, "max_lr": 0.002, "corpus": [COPIES]}
    task = {
        "task_type": "perplexity",
        "task_name": "stdlib.test",
        "num_instance": 24,
        "truncation": 384,
        "documents": "full",
        "protocols": ["later"],
        "compare": ["window", "shuffled", "recent"],
    }
    plain = {"tasks": [task], "stages": [copies, text_stage(0.25)]}
    weighted = text_stage(0.25, token_weighting="context")
    variants: Mapping[str, Experiment] = {
        "demo": Experiment(DEMO, train=plain),
        "slot_input-token": Experiment(DEMO, {"slot_input": "token"}, train=plain),
        "recent_tokens-16": Experiment(DEMO, {"recent_tokens": 16}, train=plain),
        # As many tokens as the demo: 200 samples of 304 tokens in the mean.
        "no-copy-stage": Experiment(
            DEMO,
            train={**plain, "stages": [text_stage(1.0)], "train_iters": 200, "eval": 200},
        ),
        "token_weighting-context": Experiment(DEMO, train={**plain, "stages": [copies, weighted]}),
    }
    names = {
        "demo": "demo.json",
        "slot_input-token": 'slot_input "token"',
        "recent_tokens-16": "recent_tokens 16",
        "no-copy-stage": "without the stage of copies",
        "token_weighting-context": 'token_weighting "context"',
    }
    steps: list[Step] = []
    for name, experiment in variants.items():
        steps += train_variant(name, experiment, names[name])
    cells: list[Cell] = []
    numbers: Sequence[tuple[str, str, str | None]] = (
        ("NLL", "nll", "memory"),
        ("bound", "bound", None),
        ("own below recent", "below_recent", None),
    )
    for text, key, mode in numbers:
        for name in variants:
            read = of_seeds(name, SEEDS, key, mode)
            cells.append(Cell(names[name], f"{text} (nats)", f"{name}-0", read))
        for name in variants:
            if name != "demo":
                read = of_seeds(name, SEEDS, key, mode, minus="demo")
                number = f"{text} minus that of demo.json (nats)"
                cells.append(Cell(names[name], number, f"{name}-0", read))
    return StudyTable(
        "What slot_input, recent_tokens, the stage of copies and token weighting change",
        None,
        {
            "small": "SmolLM2-135M, demo.json: chunks of 64 tokens in 16 slots, 61 thousand tokens "
            "of Python's standard library; 24 held-out files of 384 tokens, chunks 1 to 5. With "
            "recent_tokens, `recent` has these raw tokens too. Intervals are Student's over three "
            "seeds."
        },
        {"small": steps},
        {"small": cells},
    )
