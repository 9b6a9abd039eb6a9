"""python -m uiollms COMMAND ...

compress  texts into a memory              report   a run folder as one page
ask       memories                         convert  trained weights into another format
chat      with documents in mind           schema   the config files' JSON Schemas
data      the corpora on this machine      study    what a gradient estimator costs and buys
eval      lm-eval's command line, with a model with memory among its models

`python -m uiollms COMMAND --help` describes one. The programs that train and evaluate a model are
train.py and test.py.
"""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from uiollms.cli.common import reporting_errors

MODULES = {
    "compress": "chat",
    "ask": "chat",
    "chat": "chat",
    "data": "data",
    "report": "report",
    "study": "study",
    "convert": "convert",
    "schema": "schema",
    "eval": "lm_eval",
}


def main(arguments: list[str] | None = None) -> int | None:
    """Run the command that the first argument names; only its own modules are imported."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(
            f"uiollms: no command {name!r}; {hint}allowed are {', '.join(MODULES)}", file=sys.stderr
        )
        return 2
    command = import_module(f"uiollms.cli.{MODULES[name]}")
    return command.main([name, *rest] if MODULES[name] == "chat" else rest)


if __name__ == "__main__":
    raise SystemExit(reporting_errors(main))
