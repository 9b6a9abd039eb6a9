"""uiollms: long-context language models through learned memory (UIO-LLMs, arXiv 2406.18173).

The names below are promises; the modules' docstrings say more. Reading order: tasks, attention, model, estimators, step.
"""

from uiollms.config import ConfigError, MemoryConfig
from uiollms.estimators import TBPTT, UIO, Exact, Importance, draw_window, make_estimator, window_from_draws
from uiollms.evaluate import score
from uiollms.library import Memory
from uiollms.memory import MemoryState
from uiollms.model import MemoryLM
from uiollms.step import gradient_step
from uiollms.tasks import Sample

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
