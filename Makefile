# make demo, test, lint and bench set up .venv first. make clean removes .venv and caches, never runs/.

# make PYTHON=/path/to/python chooses the interpreter for .venv; by default .ci/setup finds one.
PYTHON ?=
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed
# One OpenMP thread per worker: two workers with two threads each slow each other down on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-quick test-full compilers lint bench docs sanitize lock wheel release-check clean

demo: $(INSTALLED)
	$(BIN)/fgfast demo --out runs/demo

test: $(INSTALLED)
	$(PYTEST) tests fgfast

# For development: without the tests that start processes, train or compile, and with few examples per property.
test-quick: $(INSTALLED)
	FGFAST_EXAMPLES=0.2 $(PYTEST) -m "not sweep and (quick or not slow)" tests fgfast

# All tests and the sweeps, with EXAMPLES times as many examples per property, generated from SEED. PART=3/8: only the
# sweeps in the third of eight parts.
EXAMPLES ?= 10
SEED ?= 0
PART ?=
test-full: $(INSTALLED)
	FGFAST_EXAMPLES=$(EXAMPLES) FGFAST_PART=$(PART) $(PYTEST) --hypothesis-seed=$(SEED) \
		-m "$(if $(PART),sweep or hypothesis,sweep or not sweep)" tests fgfast

# Compile and test the kernels with the oldest or newest torch and Triton (WHICH=oldest or newest).
WHICH ?= oldest
compilers: $(INSTALLED)
	.ci/compilers $(WHICH)

# setup.py maps kernels/ to the package fgfast.kernels, so mypy checks it in a separate run.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p fgfast
	$(BIN)/mypy -p benchmarks
	$(BIN)/mypy --follow-imports=silent --allow-untyped-defs --allow-incomplete-defs kernels

# The CPU code of the compiled extension under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(INSTALLED)
	FGFAST_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitized --build-temp build/sanitized
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		OMP_NUM_THREADS=1 $(BIN)/python -m tests.sanitized build/sanitized

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks --benchmark-only

# The API pages in fgfast/docs, from the docstrings.
docs: $(INSTALLED)
	$(BIN)/python -m fgfast.docs

# Source distribution and wheel in dist/, for the Python of .venv.
wheel: $(INSTALLED)
	.ci/wheel

# Rewrites .ci/locks, the exact versions that are installed.
lock:
	PYTHON=$(PYTHON) .ci/lock

# Checks locks, version, changelog and wheel before a release.
release-check: $(INSTALLED)
	.ci/release-check

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/* .ci/locks/cp*.txt) .ci/setup
	@.ci/setup $(PYTHON)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
