# `make demo` and `make test` are all it takes on a machine with Python 3.11: the first one called makes .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Threads that wait sleep: waiting busily makes a machine with other work on it several times slower.
export OMP_WAIT_POLICY := PASSIVE
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test check style clean

demo: $(INSTALLED)
	$(BIN)/crvq demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build crvq-demo *.egg-info .pytest_cache .ruff_cache .hypothesis

# torch comes first and by its exact version: a build that is at hand (CPU only, say) is then taken and kept.
$(INSTALLED): setup.py pyproject.toml constraints.txt $(wildcard kernels/crvq_kernels/cpu/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	touch $@
