#!/usr/bin/env bash
# Serve a web page to chat with a trained prefix, with the base, or with both side by side:  bash web_demo.sh
#     PREFIX=output/RUN bash web_demo.sh
#     bash web_demo.sh --port 8080 --prefix adgen=output/RUN --prefix other=output/OTHER
#     bash web_demo.sh --host 0.0.0.0 --password SECRET       # for other machines
# The address is 127.0.0.1:7860. Flags are listed by .venv/bin/python -m ptuning web --help; paths in flags are relative to
# the repository. A path in a variable is looked up in your folder, then in the repository.
#
#   PREFIX             a prefix, LoRA adapter or whole model; unset: the newest under output/
#   MODEL              the base model: a folder or a hub id; unset: the one that PREFIX was trained on
#   PYTHON             the Python to use; unset: .venv, made on the first run
set -euo pipefail
source "$(dirname "$0")/scripts/setup.sh"
show_help "$@"

if [ -n "${PREFIX:-}" ]; then
  PREFIX=$(input_path "${PREFIX%/}")
  [ -d "$PREFIX" ] || refuse "PREFIX=$PREFIX is not a folder; give the folder of a run or one of its checkpoint-N."
  if [ -f "$PREFIX/tuning_config.json" ]; then  # an adapter or a whole model replaces the base
    set -- --model "$PREFIX" "$@"
  else
    set -- --prefix "prefix=$PREFIX" "$@"
  fi
fi
if [ -n "${MODEL:-}" ]; then set -- --model "$(input_path "$MODEL")" "$@"; fi

export GRADIO_ANALYTICS_ENABLED=False HF_HUB_DISABLE_TELEMETRY=1
given=${PYTHON:-}
choose_python run
if ! "$PYTHON" -c 'import importlib.metadata as m; m.version("gradio")' >/dev/null 2>&1; then
  case $PYTHON in
    */.venv/*) ;;
    *) given=$PYTHON ;;
  esac
  [ -z "$given" ] || die "$given lacks gradio; nothing is installed into a Python that is not .venv." \
    "Type: $given -m pip install -r requirements-web.lock"
  echo "Installing requirements-web.lock into .venv, once (250 MB)." >&2
  "$(find_python)" -m pip --python "$PYTHON" install --quiet --disable-pip-version-check -r requirements-web.lock >&2 ||
    die "Installation failed; the lines above say why. Type the same command to try again."
fi

exec "$PYTHON" -m ptuning web "$@"
