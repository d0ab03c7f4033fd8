#!/usr/bin/env bash
# Checks that need a GPU: tests marked gpu, the kernels' tests on the device, and compute-sanitizer over small ones.
# Usage: benchmarks/gpu_check.sh [tests|memcheck|racecheck ...], all three when none is named. Exit 1 when any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
SECONDS_EACH=${SECONDS_EACH:-540} # a sanitized kernel is 10 to 100 times slower

# One small problem a route: no property tests with many examples, no torch.compile, no tensors beyond 2^31 elements.
SMALL=(
    tests/kernels/test_part_pool.py
    tests/kernels/test_kmeans.py
    tests/kernels/test_contrast.py
    tests/kernels/test_assign_and_pool.py
    -k "empty or finite or two_runs or split_among or absent or every_route or ties or atomics or each_path"
    --hypothesis-seed=0 -x
)

unset TRITON_INTERPRET
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "No GPU was found: these checks need one."
    exit 2
}
failed=()

run() { # name, command...: 5 is pytest's status for "nothing was chosen"
    local name=$1 status
    shift
    echo "== $name"
    timeout "$SECONDS_EACH" "$@"
    status=$?
    ((status == 0 || status == 5)) || failed+=("$name ($status)")
}

tests() {
    run "tests marked gpu" "$PYTHON" -m pytest -m gpu tests
    run "kernels on the device" "$PYTHON" -m pytest tests/kernels -m "not gpu"
    TRITON_DEBUG=1 run "32-bit overflow" "$PYTHON" -m pytest "${SMALL[@]}" # Triton's check of integer arithmetic
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
racecheck() { sanitized racecheck "$SANITIZER" --tool racecheck --error-exitcode 9; }

(($#)) || set -- tests memcheck racecheck
for check in "$@"; do
    case $check in
    tests | memcheck | racecheck) "$check" ;;
    *) echo "$check is not a check: tests, memcheck or racecheck." && exit 2 ;;
    esac
done

((${#failed[@]} == 0)) && echo "All passed: $*." && exit 0
echo "Failed: ${failed[*]}"
exit 1
