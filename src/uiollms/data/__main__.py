"""Runs the command `python -m uiollms.data`, which is also `python -m uiollms data`."""

from uiollms.cli.common import reporting_errors
from uiollms.cli.data import main

raise SystemExit(reporting_errors(main))
