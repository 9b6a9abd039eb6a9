"""Runs the command `python -m uiollms.study`, which is also `python -m uiollms study`."""

from uiollms.cli.common import reporting_errors
from uiollms.cli.study import main

raise SystemExit(reporting_errors(main))
