"""`python -m uiollms.study`, which `python -m uiollms study` is too."""

from uiollms.cli.common import reporting_errors
from uiollms.cli.study import main

raise SystemExit(reporting_errors(main))
