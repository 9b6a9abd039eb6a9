"""Writes the JSON Schemas of the config files, config/schema/, and the page docs/config.md, both
generated from the typed sections.

uiollms schema                # into the working directory, as `make schema` does
uiollms schema --out /tmp/x   # into another folder, to compare

Most editors complete and check a file that names its schema in "$schema".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from uiollms.cli.options import file_path
from uiollms.config.json_schema import SCHEMAS, config_page, schema_text
from uiollms.files.atomic import make_folder, replace_text, reporting_write_errors


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uiollms schema",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=file_path,
        default=Path(),
        metavar="FOLDER",
        help="folder of config/ and docs/ (the working directory)",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    out = make_parser().parse_args(arguments).out
    texts = {f"config/schema/{name}": schema_text(name) for name in SCHEMAS} | {
        "docs/config.md": config_page()
    }
    for name, text in texts.items():
        with reporting_write_errors(out / name):
            make_folder((out / name).parent)
            replace_text(out / name, text)
        print(out / name)
