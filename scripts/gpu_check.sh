#!/usr/bin/env bash
# Checks on a GPU, without a network: what is installed, the tests, a 7B-shaped run against targets.
#
#   scripts/gpu_check.sh                                       everything
#   PYTHON=python3 TESTS=tests/job/test_statistics.py scripts/gpu_check.sh --directory /big/disk
#
# PYTHON: the interpreter; .venv's where there is one. TESTS: what pytest runs; "" for none.
# Further arguments go to gpu_check.py. Without a GPU the same is run on the CPU, in a small shape.
# A failed test does not keep the 7B-shaped run from being made; both count for the exit code.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

"$PYTHON" scripts/installed.py

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
else
  echo "no GPU here: the CPU, in a small shape"
fi

# test_real and test_fetch need what `make test` downloads.
tests="${TESTS-tests --ignore=tests/job/test_real.py --ignore=tests/scripts/test_fetch.py}"
if [ -n "$tests" ]; then
  # shellcheck disable=SC2086  # several words
  "$PYTHON" -m pytest -q $tests || failed=$?
fi

"$PYTHON" scripts/gpu_check.py "$@"
exit "${failed:-0}"
