# `make train` and `make test` are all that a fresh machine needs: Linux, Python 3.11 or newer, make.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Without CANN an installed torch_npu breaks `import torch` unless it is kept from loading itself.
export TORCH_DEVICE_BACKEND_AUTOLOAD ?= 0

.PHONY: install train test lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11. Run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@# torch by itself first: its pinned build must be there before anything else asks for any build.
	$(RUN) -m pip install --quiet -c constraints.txt torch
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[train,tracking,dev]'
	@touch $(STAMP)

train: $(STAMP)
	$(RUN) train.py $(ARGS)

test: $(STAMP)
	$(RUN) -m pytest $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(STAMP)
	$(RUN) benchmarks/moe_block.py
	$(RUN) benchmarks/training_step.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
