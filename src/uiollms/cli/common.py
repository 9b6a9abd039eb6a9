"""Functions that all commands use: arguments, output, and errors as one line instead of a
traceback."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from uiollms.cli.progress import ProgressBar
from uiollms.distributed.launch import check_environment
from uiollms.files.errors import ConfigError, escaped_line, terminal_lines
from uiollms.files.folders import shipped_dir
from uiollms.files.json_files import as_json
from uiollms.kernels.allocator import keep_freed_memory
from uiollms.kernels.devices import disable_cudnn_attention
from uiollms.runs.environment import unused_gpu

log = logging.getLogger("uiollms")


@dataclass(frozen=True)
class Output:
    """Prints the output of a command: text and tables to stdout, progress bars to stderr. Warnings
    and errors always go to stderr.

    quiet: prints no text, no tables and no progress bars
    json:  prints nothing but JSON to stdout, for scripts
    """

    quiet: bool = False
    json: bool = False

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Output:
        """The output that the options of `output_arguments` select. With --quiet this package logs
        nothing but warnings."""
        log.setLevel(logging.WARNING if args.quiet else logging.NOTSET)
        return cls(args.quiet, args.json)

    @property
    def prints_text(self) -> bool:
        return not (self.quiet or self.json)

    def print_text(self, text: str) -> None:
        if self.prints_text:
            print(text, flush=True)

    def print_json_line(self, text: str) -> None:
        """Prints one line of JSON and flushes it."""
        if self.json:
            print(text, flush=True)

    def print_json(self, **fields: Any) -> None:
        """Prints one JSON object as a line. Control characters are escaped, and letters too if
        stdout is not UTF-8."""
        encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
        text = as_json(fields, ensure_ascii=encoding not in ("utf-8", "utf8"))
        self.print_json_line(escaped_line(text))

    def bar(self, items: Iterable[Any] | None, **settings: Any) -> tqdm:
        return ProgressBar(items, **settings, disable=self.quiet)

    def console(self, piped_width: int | None = None, **settings: Any) -> Console:
        """A console as wide as the terminal, or as the environment variable COLUMNS sets it.

        piped_width: columns where stdout is no terminal and COLUMNS is not set
        """
        if sys.stdout.isatty() or "COLUMNS" in os.environ:
            piped_width = None
        return Console(width=piped_width, quiet=not self.prints_text, **settings)


# Fields of smollm2-8x.json for `test.py --demo`: always the shipped weights, on few documents.
TEST_DEMO = ("model.save_ckp=null", "train.run_dir=runs/test-demo", "train.tasks.0.num_instance=4")
DEFAULT_OUTPUT, SILENT = Output(), Output(quiet=True)


def step_text(nll: float, lr: float, tokens: float, seconds: float) -> str:
    """The text of the progress bar after a training step of `tokens` tokens in `seconds`."""
    return f"nll {nll:.3f}, lr {lr:.1e}, {tokens / seconds:,.0f} tokens/s"


def output_arguments(
    parser: argparse.ArgumentParser,
    json_output: str,
    quiet: str = "print no text, no tables and no progress bars",
) -> None:
    """Adds --quiet and --json for `Output.from_arguments`.

    json_output: what --json prints, for its help text
    """
    parser.add_argument("--quiet", action="store_true", help=quiet)
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"for scripts: print {json_output}, and nothing else, to stdout",
    )


def make_parser(doc: str | None, evaluation: bool = False) -> argparse.ArgumentParser:
    """The parser of train.py, or with `evaluation` of test.py.

    doc: the program's docstring, whose examples also show the command's name if it is not the file
    """
    command = re.search(r"^uiollms \w+", doc or "", re.MULTILINE)
    parser = argparse.ArgumentParser(
        prog=command and command[0],
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    configs = parser.add_mutually_exclusive_group(required=True)
    configs.add_argument(
        "--env_conf",
        metavar="FILE",
        help="environment config, such as smollm2-8x.json, which is found anywhere",
    )
    configs.add_argument(
        "--demo",
        action="store_true",
        help="evaluate the shipped adapter on four files, in a minute or two"
        if evaluation
        else "train with demo.json of this package: a small model, in some ten minutes",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=(
            "override one field of the config with a JSON value, such as train.max_lr=3e-5; may be "
            "given several times"
        ),
    )
    results = "the results, as in test.json, as one JSON object"
    output_arguments(
        parser,
        results
        if evaluation
        else "every line of metrics.jsonl as it is written, or the plan of --dry_run",
    )
    if evaluation:
        parser.add_argument(
            "--use_env_conf_tasks",
            action="store_true",
            help="evaluate the tasks in the config's train.tasks",
        )
    else:
        parser.add_argument(
            "--resume",
            nargs="?",
            const="",
            metavar="CHECKPOINT",
            help=(
                "continue from the newest checkpoint of the run folder, or from this one; starts "
                "from the beginning if there is none"
            ),
        )
        parser.add_argument(
            "--restart",
            action="store_true",
            help="start again although the run folder contains an unfinished run",
        )
        parser.add_argument(
            "--dry_run",
            action="store_true",
            help="print the memory that a step needs on every device; exit code 3: it does not fit",
        )
        parser.add_argument(
            "--device_memory",
            metavar="SIZES",
            help="for --dry_run: memory of GPU 0, 1, ..., such as 24GiB,24GiB",
        )
    return parser


def parse_arguments(
    doc: str | None, arguments: list[str] | None, evaluation: bool = False
) -> argparse.Namespace:
    """The arguments of train.py, or with `evaluation` of test.py. doc: the program's docstring."""
    parser = make_parser(doc, evaluation)
    args = parser.parse_args(arguments)
    if not evaluation and args.device_memory and not args.dry_run:
        parser.error("--device_memory is used with --dry_run only")
    if args.demo:
        args.env_conf = str(shipped_dir() / ("smollm2-8x.json" if evaluation else "demo.json"))
    if args.demo and evaluation:
        args.set, args.use_env_conf_tasks = [*TEST_DEMO, *args.set], True
    args.output = Output.from_arguments(args)
    return args


def reporting_errors(main: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code, as `errors_as_lines` does.

    Libraries print warnings only. The process reuses freed memory and does not use cuDNN's
    attention. A GPU that torch cannot use is reported first. Letters that the terminal or pipe
    cannot encode are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if code := errors_as_lines(check_environment):
        return code
    keep_freed_memory()
    disable_cudnn_attention()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        log.warning(
            "file names and arguments are read as %s, not as UTF-8; set PYTHONUTF8=1 for UTF-8",
            encoding,
        )
    # Only the first process of a machine reports it.
    if os.environ.get("LOCAL_RANK", "0") == "0" and (unused := unused_gpu()):
        log.warning(unused)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return errors_as_lines(main)


def errors_as_lines(main: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code. An error that the user can correct is printed,
    with exit code 2. Ctrl-C ends the command with exit code 130, as in a shell. Other exceptions
    are bugs and are raised."""
    try:
        return main() or 0
    except (ConfigError, OSError) as error:  # OSError: a disk or a network
        print(terminal_lines(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # The cursor may be in a line with ^C, a bar or half an answer.
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
