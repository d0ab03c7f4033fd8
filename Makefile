# make demo: the main job, set-up included. make test, make lint, make bench likewise. make clean removes the set-up and caches, never runs/.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint bench sanitize clean

demo: $(INSTALLED)
	$(BIN)/fgfast demo --out runs/demo

# One OpenMP thread a worker: two workers with two threads each get in each other's way on two cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests fgfast

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

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found: install one, or name it with make PYTHON=/path/to/python."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[train,dev]"
	touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
