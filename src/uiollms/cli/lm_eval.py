"""The command `lm_eval`: lm-eval's own, with a model with memory among its models.

lm_eval --model uiollms --model_args env_conf=smollm2-8x.json --tasks arc_easy --batch_size 4

lm-eval 0.4 looks for models in its own package only and has no place for plugins. So this
package brings a command of that name, which adds `uiollms` to the models and is lm-eval's own in
everything else. How to get the original back: docs/using.md.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from uiollms.cli.common import errors_as_lines
from uiollms.files.errors import ConfigError

MODEL = "uiollms"


def main(arguments: list[str] | None = None) -> int:
    """lm-eval's command line; its exit code, 2 with one line for what the user can mend."""
    if arguments is not None:  # lm-eval takes no other
        sys.argv[1:] = arguments
    return errors_as_lines(run)


def run() -> None:
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "lm_eval: lm-eval is not installed; get it with: pip install -e '.[lm-eval]'"
        )
    register()
    from lm_eval.__main__ import cli_evaluate

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
    cli_evaluate()


def register() -> None:
    """Make the model known by its name; what it needs is imported when lm-eval asks for it."""
    # First, because lm-eval fills its registry only while that is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="uiollms.evaluation.lm_eval_model:HarnessLM")
