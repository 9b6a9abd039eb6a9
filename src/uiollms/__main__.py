"""The command `uiollms COMMAND ...`, which is also `python -m uiollms COMMAND ...`.

A command's modules are imported when the command is called. `train` and `test` are the programs
train.py and test.py of the checkout, which an installation contains as they are.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from uiollms import __version__
from uiollms.cli.common import reporting_errors
from uiollms.files.folders import shipped_dir


class Command(NamedTuple):
    """A command for the list of `uiollms --help`.

    module:  its module in uiollms.cli, or a program of `shipped_dir`
    help:    what it does, in a few words
    example: arguments, as in a shell
    """

    module: str
    help: str
    example: str


COMMANDS = {
    "train": Command("train.py", "train the memory of a model", "--env_conf smollm2-8x.json"),
    "test": Command("test.py", "evaluate a model with memory", "--env_conf smollm2-8x.json"),
    "compress": Command("chat", "compress text files into a memory", "book.txt -o book.mem"),
    "refine": Command(
        "refine", "go on training the memory of one document", "book.mem -o refined.mem"
    ),
    "ask": Command("chat", "answer questions about memories", 'book.mem "Who wrote the letter?"'),
    "chat": Command("chat", "chat with a model that has read memories", "--memory book.mem"),
    "serve": Command(
        "serve", "answer over HTTP, as OpenAI's API does, with a page", "--folder memories"
    ),
    "data": Command("data", "list the corpora and their documents", "--sample stdlib.test -n 3"),
    "plugins": Command("plugins", "list the plugins of installed packages", "--json"),
    "answers": Command(
        "answers", "answer a corpus's questions with the base", "questions.train -o answered.jsonl"
    ),
    "report": Command("report", "write a run folder as one HTML page", "runs/smollm2-8x"),
    "study": Command(
        "study",
        "compare the gradient estimators",
        "gradients --env_conf smollm2-8x.json --preset quick",
    ),
    "convert": Command(
        "convert",
        "convert trained weights to another format",
        "--env_conf 32x.json ckp/32x.pth ckp/32x",
    ),
    "schema": Command("schema", "write the JSON Schemas of the config files", "--out schemas"),
    "eval": Command(
        "lm_eval",
        "run lm-eval's command line with the model `uiollms`",
        "--model uiollms --model_args env_conf=smollm2-8x.json --tasks arc_easy",
    ),
    "ruler": Command(
        "ruler",
        "compare memory with raw and recent tokens on RULER",
        "--env_conf smollm2-8x.json --lengths 4096 --limit 5",
    ),
}


def main(arguments: list[str] | None = None) -> int | None:
    """Runs the command that the first argument names."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"uiollms {__version__}")
        return 0
    if name == "--print_completion":
        return print_completion(rest)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        allowed = ", ".join(COMMANDS)
        print(f"uiollms: no command {name!r}; {hint}allowed are {allowed}", file=sys.stderr)
        return 2
    module = COMMANDS[name].module
    if module.endswith(".py"):
        return import_program(name).main(rest)
    command = import_module(f"uiollms.cli.{module}")
    return command.main([name, *rest] if module == "chat" else rest)


def start() -> int:
    """Runs `main` as the installed command and returns its exit code."""
    return reporting_errors(main)


def print_completion(rest: list[str]) -> int:
    """Prints the completion for the shell that `rest` names. Returns the exit code."""
    from uiollms.cli import completion

    if len(rest) != 1 or rest[0] not in completion.SHELLS:
        allowed = ", ".join(completion.SHELLS)
        print(f"uiollms: --print_completion: expected one of {allowed}", file=sys.stderr)
        return 2
    commands = {name: (command.module, command.help) for name, command in COMMANDS.items()}
    completion.print_completion(rest[0], commands)
    return 0


def help_text() -> str:
    """The text of `uiollms --help`: every command with an example."""
    lines = ["usage: uiollms COMMAND ...", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<10}{command.help}", f"            uiollms {name} {command.example}"]
    return "\n".join(
        [
            *lines,
            "",
            "`uiollms COMMAND --help` describes the options of a command, with examples.",
            "`uiollms --version` prints the version.",
            "`uiollms --print_completion bash` (or zsh, tcsh) prints the completion for a shell.",
        ]
    )


def import_program(name: str) -> ModuleType:
    """Imports train.py or test.py, whose docstring, the text of its --help, then shows the command
    `uiollms train` or `uiollms test` in place of the file."""
    file = shipped_dir() / COMMANDS[name].module
    spec = importlib.util.spec_from_file_location(f"uiollms_{name}", file)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    doc = (program.__doc__ or "").replace(f"python {file.name}", f"uiollms {name}")
    program.__doc__ = doc.replace(f" {file.name} --", f" -m uiollms {name} --")  # of torchrun
    return program


if __name__ == "__main__":
    raise SystemExit(start())
