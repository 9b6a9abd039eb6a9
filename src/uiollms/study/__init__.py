"""What a gradient estimator costs and buys, measured: see `python -m uiollms.study --help`."""
