"""`python -m uiollms.data`, which `python -m uiollms data` is too."""

from uiollms.cli.common import reporting_errors
from uiollms.cli.data import main

raise SystemExit(reporting_errors(main))
