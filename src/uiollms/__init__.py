"""uiollms: long-context language models through learned memory (UIO-LLMs, arXiv 2406.18173).

The names below are promises; the modules' docstrings say more. Reading order: tasks, attention, model, estimators, step.
"""

from uiollms.config.sections import MemoryConfig
from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import score
from uiollms.files.errors import ConfigError
from uiollms.model.memory import Memory
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState
from uiollms.training.estimators import TBPTT, UIO, Exact, Importance, draw_window, make_estimator, window_from_draws
from uiollms.training.step import gradient_step

__all__ = [
    "TBPTT",
    "UIO",
    "ConfigError",
    "Exact",
    "Importance",
    "Memory",
    "MemoryConfig",
    "MemoryLM",
    "MemoryState",
    "Sample",
    "draw_window",
    "gradient_step",
    "make_estimator",
    "score",
    "window_from_draws",
]
