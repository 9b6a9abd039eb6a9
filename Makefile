# Two commands matter: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

# Tests start processes beside each other, whose spinning threads would slow each other down; alone, spinning is faster.
test test-slow: export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup test test-slow test-gpu lint demo schema bench bench-quick audit clean

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Train memory into SmolLM2-135M on State of the Union messages, from scratch, and compare on held-out ones.
demo: setup
	$(BIN)/python train.py --env_conf demo.json --restart

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Lint, types, all tests that need neither minutes nor a GPU nor a network.
test: lint
	$(BIN)/pytest

# With the real SmolLM2 model: minutes.
test-slow: setup
	$(BIN)/pytest -m slow

# On a machine with CUDA (and flash-attn for its own tests).
test-gpu: setup
	$(BIN)/pytest -m gpu

# Speed and memory against length, S and chunk batch, beside the straightforward algorithm; table, JSON and plots in runs/bench.
# glibc keeps small freed blocks apart, which keeps large ones from growing together again: off, for ours and the baseline alike.
bench: export GLIBC_TUNABLES := glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0
bench: setup
	$(BIN)/python -m benchmarks

# Does it run: a tiny model, seconds.
bench-quick: setup
	$(BIN)/python -m benchmarks --model tiny --quick --repeats 1 --out runs/bench-quick

# JSON Schema of the config files, for editors.
schema: setup
	$(BIN)/python -m uiollms.schema

# Known vulnerabilities of all that is installed. Needs a network: the tool comes into an environment of its own.
audit: requirements.lock
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install -q --disable-pip-version-check pip-audit==2.10.1
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.lock

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache
