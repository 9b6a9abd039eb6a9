"""uiollms: long-context language models through learned memory (UIO-LLMs, arXiv 2406.18173).

The names below are promises; the modules' docstrings say more. Reading order: data/sample,
model/attention, model/memory_lm, training/estimators, training/step.
"""

from uiollms.config.corpora import TaskEntry
from uiollms.config.sections import MemoryConfig
from uiollms.data import open_corpus
from uiollms.data.sample import Sample
from uiollms.evaluation.evaluator import Evaluation
from uiollms.evaluation.scoring import score
from uiollms.files.errors import ConfigError
from uiollms.model.memory import Memory, join
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState
from uiollms.training.estimators import (
    TBPTT,
    UIO,
    Exact,
    Importance,
    draw_window,
    make_estimator,
    window_from_draws,
)
from uiollms.training.step import gradient_step
from uiollms.weights.model_folder import load_tokenizer

__all__ = [
    "TBPTT",
    "UIO",
    "ConfigError",
    "Evaluation",
    "Exact",
    "Importance",
    "Memory",
    "MemoryConfig",
    "MemoryLM",
    "MemoryState",
    "Sample",
    "TaskEntry",
    "draw_window",
    "gradient_step",
    "join",
    "load_tokenizer",
    "make_estimator",
    "open_corpus",
    "score",
    "window_from_draws",
]
