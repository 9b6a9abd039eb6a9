"""Lists the plugins of installed packages: corpora, tasks and gradient estimators.

uiollms plugins
uiollms plugins --json
"""

from __future__ import annotations

import argparse

from rich import box
from rich.table import Table

from uiollms.cli.common import Output, output_arguments
from uiollms.files.errors import ConfigError
from uiollms.plugins import KINDS, PLUGIN, installed_plugins


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "uiollms plugins", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    output_arguments(parser, "one JSON object per plugin", quiet="print no table")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    table = Table("name", "kind", "package", "options or fault", box=box.SIMPLE)
    for base in KINDS:
        for plugin in installed_plugins(base):
            options, fault = None, None
            try:
                fields = plugin.load(base).model_fields
                options = {name: field.description for name, field in fields.items()}
            except ConfigError as error:
                fault = str(error)
            name = f"{PLUGIN}{plugin.name}"
            shown = fault or f"{base.field}: {', '.join(options) if options else 'none'}"
            table.add_row(name, base.kind, plugin.package, shown)
            output.print_json(
                name=name, kind=base.kind, package=plugin.package, options=options, fault=fault
            )
    console = output.console(160, highlight=False, markup=False)
    console.print(table if table.row_count else "no package with plugins is installed")
    console.print("docs/extending.md describes how to write a plugin.")
