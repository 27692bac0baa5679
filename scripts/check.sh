#!/usr/bin/env bash
# What stands behind `make check`, `make test`, `make lint`, `make types`: one Python, the pinned tools, one step or all.
#     bash scripts/check.sh [check|test|lint|types|format] [arguments for pytest]
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
source scripts/setup.sh

# As in pyproject.toml, but with the tests marked `slow`.
MARKS_OF_CI='not gpu and not weights and not browser'

step=${1:-check}
[ $# -eq 0 ] || shift

lint() {
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
}

# One thread per process: the models in the tests are so small that more threads only wait for each other.
# Offline: a test that reaches for a hub fails at once, on every machine, instead of only where there is no network.
tests() {
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 "$PYTHON" -m pytest -q "$@"
}

case $step in
  check | test | lint | types | format) choose_python dev ;;
  *) refuse "'$step' is not a step; use check, test, lint, types or format." ;;
esac
case $step in
  check)
    lint
    "$PYTHON" -m mypy
    tests -m "$MARKS_OF_CI" "$@"
    ;;
  test) tests "$@" ;;
  lint) lint ;;
  types) "$PYTHON" -m mypy ;;
  format)
    "$PYTHON" -m ruff check --fix .
    "$PYTHON" -m ruff format .
    ;;
esac
