# make demo: the main job, set-up included. make test, make lint, make bench likewise. make clean removes the set-up and caches, never runs/.

# make PYTHON=/path/to/python names the interpreter of .venv; .ci/setup finds one otherwise.
PYTHON ?=
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed
# One OpenMP thread a worker: two workers with two threads each get in each other's way on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-quick test-full compilers lint bench sanitize lock release-check clean

demo: $(INSTALLED)
	$(BIN)/fgfast demo --out runs/demo

test: $(INSTALLED)
	$(PYTEST) tests fgfast

# While one works: without the tests that start processes, train or compile, and with few examples of each property.
test-quick: $(INSTALLED)
	FGFAST_EXAMPLES=0.2 $(PYTEST) -m "not sweep and (quick or not slow)" tests fgfast

# Everything, and the sweeps: EXAMPLES times as many examples of each property, drawn from SEED. PART=3/8: the sweeps of
# the third of eight parts, and nothing else.
EXAMPLES ?= 10
SEED ?= 0
PART ?=
test-full: $(INSTALLED)
	FGFAST_EXAMPLES=$(EXAMPLES) FGFAST_PART=$(PART) $(PYTEST) --hypothesis-seed=$(SEED) \
		-m "$(if $(PART),sweep or hypothesis,sweep or not sweep)" tests fgfast

# The kernels with the oldest or newest torch and Triton (WHICH=oldest or newest): what they compile to, and their tests.
WHICH ?= oldest
compilers: $(INSTALLED)
	.ci/compilers $(WHICH)

# kernels/ is the package fgfast.kernels (setup.py maps it), so mypy reads it in a run of its own.
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

# Writes .ci/locks anew: the exact versions that are installed.
lock:
	PYTHON=$(PYTHON) .ci/lock

# Locks, version, changelog and wheel, as a release needs them.
release-check: $(INSTALLED)
	.ci/release-check

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/* .ci/locks/cp*.txt) .ci/setup
	@.ci/setup $(PYTHON)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
