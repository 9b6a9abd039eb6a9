"""python -m uiollms COMMAND ...

compress  compress text files into a memory
ask       answer questions about memories
chat      chat with a model that has read memories
data      list the corpora and their documents
report    write a run folder as one HTML page
study     compare the gradient estimators
convert   convert trained weights to another format
schema    write the JSON Schemas of the config files
eval      run lm-eval's command line with the model `uiollms`

`python -m uiollms COMMAND --help` describes a command. The programs train.py and test.py train and
evaluate a model.
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
    """Runs the command that the first argument names, and imports the modules of this one only."""
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
