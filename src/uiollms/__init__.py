"""Long-context language models through learned memory: UIO-LLMs, arXiv 2406.18173.

A `MemoryLM` is a frozen transformers model that compresses a document chunk by chunk and reads the
compressed chunks before the current one. The names on this page are the public interface; other
modules may change. Their order is that of use: load a model, compress documents, train, evaluate.
"""

import sys

if sys.platform == "win32":
    raise RuntimeError(
        "uiollms does not run on Windows itself, which lacks POSIX signals, the module `resource` "
        "and folders that can be synchronised to disk; use WSL 2, which is Linux: Versions and "
        "systems in docs/setup.md"
    )

from uiollms.config.corpora import TaskEntry
from uiollms.config.sections import MemoryConfig
from uiollms.data import open_corpus
from uiollms.data.documents import Document
from uiollms.data.sample import Row, Sample
from uiollms.data.tokens import continuation_ids
from uiollms.evaluation.evaluator import Evaluation
from uiollms.evaluation.results import TaskScores, TaskSummary
from uiollms.evaluation.scoring import Score, score
from uiollms.files.errors import ConfigError
from uiollms.model.memory import Memory, join
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState
from uiollms.plugins import CorpusPlugin, EstimatorPlugin, TaskPlugin
from uiollms.reports.tables import print_results
from uiollms.training.estimators import (
    TBPTT,
    UIO,
    Estimator,
    Exact,
    Importance,
    draw_window,
    make_estimator,
    window_from_draws,
)
from uiollms.training.step import gradient_step
from uiollms.training.tally import StepResult
from uiollms.weights.model_folder import load_tokenizer

__version__ = "0.2.0"

# In the order of the API page.
__all__ = [
    "MemoryLM",
    "MemoryConfig",
    "load_tokenizer",
    "Memory",
    "join",
    "continuation_ids",
    "MemoryState",
    "ConfigError",
    "open_corpus",
    "Document",
    "Sample",
    "Row",
    "gradient_step",
    "StepResult",
    "Estimator",
    "Exact",
    "TBPTT",
    "UIO",
    "Importance",
    "make_estimator",
    "draw_window",
    "window_from_draws",
    "score",
    "Score",
    "Evaluation",
    "TaskEntry",
    "TaskScores",
    "TaskSummary",
    "print_results",
    "CorpusPlugin",
    "TaskPlugin",
    "EstimatorPlugin",
]
