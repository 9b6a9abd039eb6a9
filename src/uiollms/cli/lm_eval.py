"""Runs lm-eval's command line with one more model, `uiollms`, which is a model with memory.

uiollms eval --model uiollms --model_args env_conf=smollm2-8x.json --tasks arc_easy --batch_size 4

lm-eval 0.4 loads models from its own package only and reads no entry points. So this command adds
`uiollms` to the models and calls lm-eval's command. The command `lm_eval` is left as it is.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from uiollms.cli.common import errors_as_lines
from uiollms.files.errors import ConfigError

MODEL = "uiollms"


def main(arguments: list[str] | None = None) -> int:
    """Runs lm-eval's command line and returns its exit code, as `errors_as_lines` does."""
    if arguments is not None:  # lm-eval reads sys.argv
        sys.argv[1:] = arguments
    return errors_as_lines(run)


def run() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-eval is not installed; run: pip install 'lm-eval[ruler]>=0.4.13,<0.5'"
        )
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def register() -> None:
    """Registers the model's name. lm-eval imports its module when a command uses it."""
    # This import comes first, because lm-eval fills its registry only while it is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="uiollms.evaluation.lm_eval_model:HarnessLM")
