VENV ?= .venv
PYTHON ?= python3
INSTALLED := $(VENV)/.installed

.PHONY: run test lint bench

run: $(INSTALLED)
	$(VENV)/bin/python -m seqrec_jax.main --config=configs/cl4srec.py $(ARGS)

test: lint
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .

bench: $(VENV)-bench/.torch
	$(VENV)-bench/bin/python -m benchmarks.run $(ARGS)

# An environment of its own: PyTorch is measured beside the project, which never needs it.
$(VENV)-bench/.torch: requirements.txt benchmarks/requirements.txt
	$(MAKE) VENV=$(VENV)-bench $(VENV)-bench/.installed
	$(VENV)-bench/bin/python -m pip install -q -r benchmarks/requirements.txt
	touch $@

# Again whenever the requirements change.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	touch $@
