"""What the commands share: arguments, and errors as one line instead of a traceback."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

from transformers.utils import logging as transformers_logging

from uiollms.config import ConfigError


def parse_arguments(doc: str | None, arguments: list[str] | None, evaluation: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env_conf", required=True, metavar="FILE", help="environment config, such as smollm2-8x.json")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override one field of the config, value in JSON, such as train.max_lr=3e-5; may be repeated",
    )
    if evaluation:
        parser.add_argument("--use_env_conf_tasks", action="store_true", help="run the config's train.tasks instead")
    else:
        parser.add_argument(
            "--resume",
            nargs="?",
            const="",
            metavar="CHECKPOINT",
            help="go on from the newest checkpoint of the run folder, or from this one; begins where there is none yet",
        )
        parser.add_argument("--restart", action="store_true", help="begin anew although the run folder holds an unfinished run")
    return parser.parse_args(arguments)


def reporting_errors(main: Callable[[], None]) -> int:
    """Run a command; what the user can mend is printed as it is, exit code 2. Anything else is a bug and raises."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        main()
    except (ConfigError, OSError) as error:  # OSError: a disk or a network
        print(error, file=sys.stderr)
        return 2
    return 0
