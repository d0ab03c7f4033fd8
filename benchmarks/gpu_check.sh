#!/usr/bin/env bash
# Checks that need a GPU, in order of value, in one call of under 10 minutes: what does not fit is left out and named.
# Usage: benchmarks/gpu_check.sh [tests|memcheck|overflow|racecheck|training ...], all of them when none is named.
# BUDGET=SECONDS (540) ends the last check that has begun. Output is kept in $OUT, or in build/gpu-check.
# Exit status: 0 all passed, 1 something failed, 2 no GPU or a wrong name, 3 nothing failed but not all of it ran.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
BUDGET=${BUDGET:-540}
LEAST=${LEAST:-20} # seconds without which no check begins
WORKERS=${WORKERS:-$(($(nproc) < 8 ? $(nproc) : 8))} # most of the time of a test is Triton's compilation
LOGS=${OUT:-build/gpu-check}

# One small problem a route: no property tests with many examples, no torch.compile, no tensors beyond 2^31 elements.
SMALL=(
    tests/kernels/test_part_pool.py
    tests/kernels/test_kmeans.py
    tests/kernels/test_contrast.py
    tests/kernels/test_assign_and_pool.py
    -k "empty or finite or two_runs or split_among or absent or every_route or ties or atomics or each_path"
    --hypothesis-seed=0 -x
)
CHECKS=(tests memcheck overflow racecheck training)

unset TRITON_INTERPRET
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "No GPU was found: these checks need one."
    exit 2
}
mkdir -p "$LOGS"
failed=() unfinished=()

run() { # name, command...: 5 is pytest's status for "nothing was chosen", 124 and 137 are those of a check cut short
    local name=$1 left=$((BUDGET - SECONDS)) log status
    log=$LOGS/${name// /-}.log
    shift
    if ((left < LEAST)); then
        unfinished+=("$name (not begun)")
        return
    fi
    echo "== $name, at most $left s"
    timeout --signal=INT --kill-after=10 "$left" "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    case $status in
    0 | 5) ;;
    124 | 137)
        if grep -qE '^(FAILED|ERROR) |^[.sxX]*[FE][.sxXFE]*( |$)' "$log"; then
            failed+=("$name (and cut short)")
        else
            unfinished+=("$name (cut short)")
        fi
        ;;
    *) failed+=("$name ($status)") ;;
    esac
    echo "== $name ended after $SECONDS s in all"
}

# Few examples of each property first: every route, not every shape.
tests() {
    run "kernels on the device" env FGFAST_EXAMPLES=0.1 "$PYTHON" -m pytest -n "$WORKERS" tests/kernels -m "not gpu"
    run "device tests" "$PYTHON" -m pytest -m gpu tests/kernels
    run "sampler on the device" "$PYTHON" -m pytest tests/ops/test_mask.py
}

# Without the caching allocator every tensor is a separate allocation, and the tools see where it ends.
sanitized() {
    if [[ ! -x $SANITIZER ]]; then
        echo "compute-sanitizer was not found: name it with SANITIZER=PATH."
        failed+=("$1 (not found)")
        return
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$@" "$PYTHON" -m pytest "${SMALL[@]}"
}

memcheck() { sanitized memcheck "$SANITIZER" --tool memcheck --error-exitcode 9 --report-api-errors no; }
overflow() { TRITON_DEBUG=1 run overflow "$PYTHON" -m pytest "${SMALL[@]}"; } # Triton's check of 32-bit arithmetic
racecheck() { sanitized racecheck "$SANITIZER" --tool racecheck --error-exitcode 9; }
training() { run training "$PYTHON" -m pytest -m gpu tests --ignore=tests/kernels; }

(($#)) || set -- "${CHECKS[@]}"
for check in "$@"; do
    [[ " ${CHECKS[*]} " == *" $check "* ]] || { echo "$check is not a check: choose from ${CHECKS[*]}." && exit 2; }
done
for check in "$@"; do "$check"; done

((${#unfinished[@]} == 0)) || printf 'Not finished: %s\n' "${unfinished[@]}"
((${#failed[@]} == 0)) || printf 'Failed: %s\n' "${failed[@]}"
((${#failed[@]} == 0)) || exit 1
((${#unfinished[@]} == 0)) || exit 3
echo "All passed: $*."
