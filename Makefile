# `make train` and `make test` are all that a fresh machine needs: Linux, Python 3.11 or newer, make.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Without CANN an installed torch_npu breaks `import torch` unless it is kept from loading itself.
export TORCH_DEVICE_BACKEND_AUTOLOAD ?= 0

# A second environment for torch_npu, on top of the first: with it transformers imports torch_npu by itself.
NPU_VENV ?= .venv-npu
NPU_RUN := $(NPU_VENV)/bin/python
NPU_STAMP := $(NPU_VENV)/.installed
# transformers 4.57, which must read exported folders as transformers 5 does.
OLDER := build/transformers-4.57
OLDER_STAMP := $(OLDER)/.installed
# What torch_npu says or does only once in a process must not have happened before: a session of their own.
FIRST := tests/sim/test_operator_table.py tests/sim/test_opinfo.py
SIMULATED := tests/sim tests/hardware $(FIRST:%=--ignore=%)
SANITIZED := $(patsubst %,tests/sim/test_%.py,streams runtime faults hccl hccl_failures hccl_parallel hccl_process_group \
	operators operators_device launch_queue train train_families train_streams)

# Most tests are busy with one core. A file stays with one worker, which starts its ranks once; `make test JOBS=4` where
# there are the cores and 12 GB of memory.
JOBS ?= 2
WORKERS := -n $(JOBS) --dist loadfile
# "not full" or "full"; all where nothing is said.
CHOSEN = $(if $(SELECT),-m '$(SELECT)')
# Not by the name that make looks for in a recipe: `make -n` would run the tests.
AGAIN := $(MAKE) --no-print-directory
SESSIONS := $(AGAIN) sessions

.PHONY: install install-npu train test test-all fuzz sessions test-sim test-sanitized test-npu lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11. Run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@# torch by itself first: its pinned build must be there before anything else asks for any build.
	$(RUN) -m pip install --quiet -c constraints.txt torch
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[train,tracking,dev]'
	@touch $(STAMP)

# No wheel of torch_npu for this platform (macOS, say) is no error: what needs it is left out and said so.
$(NPU_STAMP): $(STAMP) constraints.txt
	$(PYTHON) -m venv $(NPU_VENV)
	@$(NPU_RUN) -c 'import pathlib, site, sys; at = pathlib.Path(site.getsitepackages()[0]); \
		packages = pathlib.Path(sys.argv[1]).resolve() / at.relative_to(pathlib.Path(sys.prefix)); \
		(at / "first.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")' $(VENV)
	@if $(NPU_RUN) -m pip install --quiet --no-deps -c constraints.txt torch_npu; then rm -f $(NPU_VENV)/absent; \
		elif [ "$$(uname -sm)" = "Linux x86_64" ] || [ "$$(uname -sm)" = "Linux aarch64" ]; then exit 1; \
		else echo "torch_npu has no wheel for $$(uname -sm)" >$(NPU_VENV)/absent; fi
	@# The package comes from the first environment, its command would be run by that one's Python.
	@printf '#!/bin/sh\nexec "$$(dirname "$$0")/python" -m lightning_npu_tp "$$@"\n' >$(NPU_VENV)/bin/lightning-npu-tp
	@chmod +x $(NPU_VENV)/bin/lightning-npu-tp
	@touch $(NPU_STAMP)

install-npu: $(NPU_STAMP)

train: $(STAMP)
	$(RUN) train.py $(ARGS)

# Not an environment: it is put before the first one's packages, whose torch it uses.
$(OLDER_STAMP): $(STAMP) constraints-4.57.txt
	rm -rf $(OLDER)
	$(RUN) -m pip install --quiet --no-deps --target $(OLDER) -r constraints-4.57.txt
	@touch $(OLDER_STAMP)

$(OLDER): $(OLDER_STAMP)

# What a change needs to be trusted: each mechanism, each family and each layout once. ARGS (a folder, -k …) goes to the
# first session, which is then alone, and has nothing left out.
test: $(STAMP) $(if $(ARGS),$(OLDER_STAMP),$(NPU_STAMP))
ifneq ($(strip $(ARGS)),)
	$(RUN) -m pytest $(ARGS)
else
	@$(SESSIONS) SELECT='not full'
endif

# The full cross products beside it; which, is in tests/cross_products.py.
test-all: $(STAMP) $(NPU_STAMP) $(OLDER_STAMP)
	@$(SESSIONS) SELECT=full ARGS=

# The simulated sessions also where the first fails.
sessions:
	$(RUN) -m pytest -m '$(SELECT)' $(WORKERS); first=$$?; $(AGAIN) test-sim; second=$$?; \
		exit $$((first ? first : second))

# The real torch_npu on simulated cards; needs a C++ compiler.
test-sim: $(NPU_STAMP)
	@if [ -f $(NPU_VENV)/absent ]; then echo "skipped: $$(cat $(NPU_VENV)/absent)"; \
		elif [ -n "$(strip $(ARGS))" ]; then $(NPU_RUN) -m ascend_sim run -n 4 -- -m pytest $(ARGS); \
		else $(NPU_RUN) -m ascend_sim run -n 4 -- -m pytest $(CHOSEN) $(FIRST); first=$$?; \
		$(NPU_RUN) -m ascend_sim run -n 4 -- -m pytest $(CHOSEN) $(WORKERS) $(SIMULATED); second=$$?; \
		exit $$((first ? first : second)); fi

# Nightly, for hours: the files that exercise the simulator's own code, with its libraries under AddressSanitizer, then
# ThreadSanitizer. Any process's finding fails it, also one that the tests outlive.
test-sanitized: $(NPU_STAMP)
	@rm -rf build/sanitized; failed=0; for kind in address thread; do \
		log=$(CURDIR)/build/sanitized/$$kind; mkdir -p $$log; \
		ASAN_OPTIONS="$$ASAN_OPTIONS:log_path=$$log/finding" TSAN_OPTIONS="$$TSAN_OPTIONS:log_path=$$log/finding" \
		$(NPU_RUN) -m ascend_sim run --sanitize $$kind -n 4 -- -m pytest -o timeout=3600 $(or $(ARGS),$(SANITIZED)) || failed=1; \
		cat $$log/* 2>/dev/null && failed=1; done; exit $$failed

# Every parser of a file or text that others write, with INPUTS random inputs each; `make test-all` has a thousand.
fuzz: $(STAMP)
	FUZZ_INPUTS=$(or $(INPUTS),20000) $(RUN) -m pytest -o timeout=7200 -n $(JOBS) tests/unit/test_parsers.py $(ARGS)

# The same assertions on the cards of this machine; DEVICE=cuda for those.
test-npu: $(if $(filter cuda,$(DEVICE)),$(STAMP),$(NPU_STAMP))
	$(if $(filter cuda,$(DEVICE)),$(RUN),$(NPU_RUN)) -m pytest tests/hardware --device $(or $(DEVICE),npu) $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(STAMP)
	$(RUN) benchmarks/moe_block.py
	$(RUN) benchmarks/training_step.py

clean:
	rm -rf $(VENV) $(NPU_VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
