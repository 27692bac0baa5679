#!/usr/bin/env bash
# Runs `make check`, `make test`, `make lint`, `make types` and `make format` with one Python and the pinned tools.
#     bash scripts/check.sh [check|test|lint|types|format] [arguments for pytest]
set -euo pipefail
source "$(dirname "$0")/setup.sh"

# The markers of pyproject.toml, with the `slow` tests included.
MARKS_OF_CI='not gpu and not weights and not browser'

step=${1:-check}
[ $# -eq 0 ] || shift

lint() {
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
}

# One worker per core and one thread per worker: the models in the tests are too small to gain from more threads.
# Offline: a test that contacts a hub fails at once on every machine, not only on one without a network.
tests() {
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 "$PYTHON" -m pytest -q -n "${WORKERS:-auto}" --dist loadfile "$@"
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
