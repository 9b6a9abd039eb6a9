"""Prints the completion of the command `uiollms` for a shell.

uiollms --print_completion bash > ~/.local/share/bash-completion/completions/uiollms
uiollms --print_completion zsh > ~/.zfunc/_uiollms
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module

import shtab

from uiollms.cli import chat, common, study_options

SHELLS = ("bash", "zsh", "tcsh")
# Metavar of an argument -> what a shell completes there.
PATHS = {
    "FILE": shtab.FILE,
    "NAME.mem": shtab.FILE,
    "NAME.jsonl": shtab.FILE,
    "NAME.mem | QUESTION": shtab.FILE,
    "CHECKPOINT": shtab.FILE,
    "SOURCE": shtab.FILE,
    "TARGET": shtab.FILE,
    "FOLDER": shtab.DIRECTORY,
    "RUN": shtab.DIRECTORY,
}


def make_parser(commands: Mapping[str, tuple[str, str]]) -> argparse.ArgumentParser:
    """One parser of all commands, for their completion. It does not run them.

    commands: name -> its module in uiollms.cli, and its help. `eval`, whose options are lm-eval's,
    is completed by its name only.
    """
    parsers = {
        "train": common.make_parser(None),
        "test": common.make_parser(None, evaluation=True),
        "study": study_options.make_parser(),
    }
    for name, (module, _) in commands.items():
        if name not in parsers and module not in ("chat", "lm_eval"):
            parsers[name] = import_module(f"uiollms.cli.{module}").make_parser()
    for action in chat.make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):  # compress, ask, chat
            parsers |= action.choices
    parser = argparse.ArgumentParser("uiollms")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--print_completion", choices=SHELLS, help="print a shell's completion")
    group = parser.add_subparsers()
    for name, (_, help) in commands.items():
        parents = [parsers[name]] if name in parsers else []
        group.add_parser(name, help=help, parents=parents, add_help=not parents)
    complete_paths(parser)
    return parser


def complete_paths(parser: argparse.ArgumentParser) -> None:
    """Sets what a shell completes for the arguments of a parser and its commands that are files or
    folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                complete_paths(command)
        elif isinstance(action.metavar, str) and action.metavar in PATHS:
            action.complete = PATHS[action.metavar]  # type: ignore[attr-defined]


def print_completion(shell: str, commands: Mapping[str, tuple[str, str]]) -> None:
    print(shtab.complete(make_parser(commands), shell))
