"""Serves a model over HTTP, in the schema of OpenAI's API, with a page for the browser.

uiollms serve
uiollms serve --model adapters/smollm2-8x --port 8080
UIOLLMS_TOKEN=... uiollms serve --host 0.0.0.0 --folder /srv/memories

Documents are uploaded once, compressed in the background, kept in --folder and asked many times.
The API is described in docs/serving.md. It needs the packages of pip install "uiollms[serve]".
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

from uiollms.cli.chat import model_options, open_model
from uiollms.cli.common import Output, output_arguments
from uiollms.cli.options import file_path, whole_number
from uiollms.files.errors import ConfigError

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
MIB = 2**20


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        raise ConfigError(f'serve needs {names}, not installed here: pip install "uiollms[serve]"')
    from uiollms.serving.server import check_token, open_socket, run
    from uiollms.serving.settings import Settings

    token = args.token or os.environ.get("UIOLLMS_TOKEN") or None
    check_token(args.host, token)
    with open_socket(args.host, args.port) as listener:
        model, tokenizer = open_model(args, output)
        settings = Settings(
            max_upload=args.max_upload * MIB,
            max_memories=args.max_memories,
            cache_size=args.cache * MIB,
            max_active=args.max_active,
            max_waiting=args.max_waiting,
            max_new_tokens=args.max_new_tokens,
            timeout=args.timeout,
        )
        host = f"[{args.host}]" if ":" in args.host else args.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        name = Path(args.model or args.env_conf).resolve().stem

        def ready() -> None:
            output.print_text(f"serving {name} at {address} (Ctrl-C ends)")
            output.print_json(address=address, model=name, folder=str(args.folder))

        run(model, tokenizer, name, args.folder, listener, settings, token, ready)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uiollms serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    model_options(parser)
    add("--host", default="127.0.0.1", help="address; others than this need a token (127.0.0.1)")
    add(
        "--port",
        type=whole_number(0, 65535),
        default=8000,
        metavar="N",
        help="port; 0 takes a free one (8000)",
    )
    add("--token", help="bearer token of requests; by default the variable UIOLLMS_TOKEN")
    add(
        "--folder",
        type=file_path,
        default=Path("memories"),
        metavar="FOLDER",
        help="where memories are kept (memories)",
    )
    numbers = {
        "max_upload": (16, "MiB of the largest document"),
        "max_memories": (100, "documents that are kept"),
        "cache": (1024, "MiB of loaded memories"),
        "max_active": (4, "answers that are generated at the same time"),
        "max_waiting": (16, "requests that wait; more get status 429"),
        "max_new_tokens": (1024, "tokens of the longest answer"),
        "timeout": (600, "seconds of the longest request"),
    }
    for name, (default, text) in numbers.items():
        add(
            f"--{name}",
            type=whole_number(1, 10**6),
            default=default,
            metavar="N",
            help=f"{text} ({default})",
        )
    output_arguments(parser, "the address, as one JSON object", "print no text")
    return parser
