"""What the commands share: arguments, what they show, and errors as one line instead of a
traceback."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from uiollms.distributed.launch import check_environment
from uiollms.files.errors import ConfigError, escaped_line, terminal_lines
from uiollms.files.json_files import as_json
from uiollms.kernels.allocator import keep_freed_memory
from uiollms.kernels.devices import disable_cudnn_attention
from uiollms.runs.environment import unused_gpu

log = logging.getLogger("uiollms")


@dataclass(frozen=True)
class Output:
    """What a command shows: words and tables on stdout, progress on stderr. json: JSON alone on
    stdout, for scripts; quiet: no words, no tables, no progress. Warnings and errors are on
    stderr always."""

    quiet: bool = False
    json: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Output:
        """What was asked for with `output_arguments`."""
        return cls(args.quiet, args.json)

    @property
    def has_words(self) -> bool:
        return not (self.quiet or self.json)

    def say(self, text: str) -> None:
        if self.has_words:
            print(text, flush=True)

    def line(self, text: str) -> None:
        """One line of JSON, at once."""
        if self.json:
            print(text, flush=True)

    def result(self, **fields: Any) -> None:
        """One JSON object as a line, at once; its letters escaped where stdout is not UTF-8,
        control characters always."""
        encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
        self.line(escaped_line(as_json(fields, ensure_ascii=encoding not in ("utf-8", "utf8"))))

    def bar(self, items: Iterable[Any] | None, **settings: Any) -> tqdm:
        return tqdm(items, **settings, disable=self.quiet)

    def console(self, width: int | None, **settings: Any) -> Console:
        return Console(width=width, quiet=not self.has_words, **settings)


WORDS, SILENT = Output(), Output(quiet=True)


def step_words(nll: float, lr: float, tokens: float, seconds: float) -> str:
    """What the bar says of a training step of `tokens` tokens in `seconds`: loss, learning rate,
    tokens a second."""
    return f"nll {nll:.3f}, lr {lr:.1e}, {tokens / seconds:,.0f} tokens/s"


def output_arguments(
    parser: argparse.ArgumentParser, shown: str, quiet: str = "no progress bar, no words, no table"
) -> None:
    """Adds --quiet and --json, for `Output.of`. shown: what --json prints."""
    parser.add_argument("--quiet", action="store_true", help=quiet)
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"{shown} on stdout, and nothing else there: for scripts",
    )


def parse_arguments(
    doc: str | None, arguments: list[str] | None, evaluation: bool = False
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--env_conf",
        required=True,
        metavar="FILE",
        help="environment config, such as smollm2-8x.json",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=(
            "override one field of the config, value in JSON, such as train.max_lr=3e-5; may be "
            "repeated"
        ),
    )
    results = "the results, as in test.json, as one JSON object"
    output_arguments(
        parser,
        results
        if evaluation
        else "every line of metrics.jsonl as it is written; of --dry_run the plan",
    )
    if evaluation:
        parser.add_argument(
            "--use_env_conf_tasks", action="store_true", help="run the config's train.tasks instead"
        )
    else:
        parser.add_argument(
            "--resume",
            nargs="?",
            const="",
            metavar="CHECKPOINT",
            help=(
                "go on from the newest checkpoint of the run folder, or from this one; begins "
                "where there is none yet"
            ),
        )
        parser.add_argument(
            "--restart",
            action="store_true",
            help="begin anew although the run folder holds an unfinished run",
        )
        parser.add_argument(
            "--dry_run",
            action="store_true",
            help="print what a step takes on every device; exit code 3: too much",
        )
        parser.add_argument(
            "--device_memory",
            metavar="SIZES",
            help="for --dry_run: what GPU 0, 1, ... have, such as 24GiB,24GiB",
        )
    args = parser.parse_args(arguments)
    if not evaluation and args.device_memory and not args.dry_run:
        parser.error("--device_memory is for --dry_run")
    args.output = Output.of(args)
    return args


def reporting_errors(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit code, as `errors_as_lines`; the libraries under it say
    no more than warnings, and the process keeps the memory that its tensors give back and does
    without cuDNN's attention. A GPU that torch cannot use is said first. Letters that the
    terminal or pipe cannot show are escaped."""
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
            "file names and arguments are read as %s here, not as UTF-8; "
            "PYTHONUTF8=1 reads them so",
            encoding,
        )
    if os.environ.get("LOCAL_RANK", "0") == "0" and (unused := unused_gpu()):  # one process says it
        log.warning(unused)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return errors_as_lines(main)


def errors_as_lines(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; what the user can mend is printed as it is, exit
    code 2, and Ctrl-C ends it with a word, exit code 130 as in a shell. Anything else is a bug
    and raises."""
    try:
        return main() or 0
    except (ConfigError, OSError) as error:  # OSError: a disk or a network
        print(terminal_lines(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)  # the line may hold a ^C, half an answer or a bar
        return 128 + signal.SIGINT
