#!/usr/bin/env bash
# Everything that wants a GPU, in one go, in under 8 minutes and without network: tests, benchmarks of the ops and of
# training from end to end, launch settings. Needs python3 (3.11 or newer) with torch, triton, pytest and
# pytest-benchmark (and matplotlib, for the pictures); for training, the packages of the extra [train].
#
#   bash bench/gpu.sh                    # results in bench/results/<device>
#   bash bench/gpu.sh tests training     # some of the parts: tests, ops, training, settings; memory, if named
#   OUT=/tmp/out PYTHON=python3.12 bash bench/gpu.sh
#   WHEELS=folder bash bench/gpu.sh      # wheels to put on the path first, such as that of a missing package
#
# Exits with 1 if any part failed; the parts after it are run all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
OUT=$(mkdir -p "${OUT:-bench/results}" && cd "${OUT:-bench/results}" && pwd) || exit 1
PYTHON=${PYTHON:-python3}
TESTS_SECONDS=${TESTS_SECONDS:-105}
OPS_SECONDS=${OPS_SECONDS:-75}
TRAINING_SECONDS=${TRAINING_SECONDS:-195}
SETTINGS_SECONDS=${SETTINGS_SECONDS:-15}
WANTED=${*:-tests ops training settings}

# the package as pyproject.toml maps it, without installing anything
SITE=$(mktemp -d) || exit 1
trap 'rm -rf "$SITE"' EXIT
mkdir "$SITE/pcpo_fast"
ln -s "$PWD"/pcpo_fast/* "$PWD/kernels" "$PWD/reference" "$SITE/pcpo_fast/"
ln -s "$PWD/bench" "$SITE/bench"
# PYTHONSAFEPATH keeps this folder, where the package is not whole, off the path
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

# part NAME SECONDS COMMAND...
part() {
    local name=$1 seconds=$2
    shift 2
    [[ " wheels versions $WANTED " == *" $name "* ]] || return
    echo
    echo "== $name"
    # an interrupt lets pytest write what it has
    timeout --signal=INT --kill-after=20 "$seconds" "$@"
    local status=$?
    if [ $status -eq 124 ]; then echo "== $name: stopped after $seconds s"; fi
    echo "== $name: exit status $status, $SECONDS s since the start"
    [ $status -eq 0 ] || failed+=("$name")
}

everything() {
    failed=()
    if [ -n "${WHEELS:-}" ]; then
        part wheels 30 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
    fi
    part versions 20 "$PYTHON" -c '
import pcpo_fast, torch, triton
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, pcpo_fast from {pcpo_fast.__path__[0]}")'
    part tests "$TESTS_SECONDS" "$PYTHON" -m pytest --junitxml "$OUT/tests.xml" --durations 5 -p no:cacheprovider \
        tests/test_gpu.py tests/test_gpu_rollout.py tests/test_policy_loss.py tests/test_sampler_step.py \
        tests/test_step_log_prob.py tests/test_philox.py tests/test_ops.py
    part ops $((OPS_SECONDS + 20)) "$PYTHON" -m pytest "$SITE/bench" -c pyproject.toml -p no:cacheprovider --save-results "$OUT" \
        --time-budget "$OPS_SECONDS" --ignore "$SITE/bench/test_training.py" \
        --ignore "$SITE/bench/test_memory.py"
    part training "$TRAINING_SECONDS" "$PYTHON" -m pytest "$SITE/bench/test_training.py" -c pyproject.toml \
        -p no:cacheprovider --save-results "$OUT"
    part memory 300 "$PYTHON" -m pytest "$SITE/bench/test_memory.py" -c pyproject.toml \
        -p no:cacheprovider --save-results "$OUT"
    part settings $((SETTINGS_SECONDS + 15)) "$PYTHON" -m bench.tune --seconds "$SETTINGS_SECONDS" --output "$OUT/tune.json"
    echo
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'FAILED: %s\n' "${failed[@]}"
        return 1
    fi
    echo "all parts passed in $SECONDS s"
}

everything 2>&1 | tee "$OUT/gpu.log"
exit "${PIPESTATUS[0]}"
